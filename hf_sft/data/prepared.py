"""Token rows with the account of how they came about: in the cache, in memory, and in folders that ``hf-sft prepare`` writes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from hf_sft.data.cache import hash_files, write_file, write_folder
from hf_sft.data.chat import fast_backend, forbidden_tokens
from hf_sft.data.files import shorten
from hf_sft.data.rows import SCHEMA, Encoding
from hf_sft.data.tokenize import RowCounts

PREPARED_FILE = "prepared.json"
_MARK = "token rows prepared by hf_sft"
# Versions that a row may depend on.
_PACKAGES = ("transformers", "tokenizers", "jinja2", "pyarrow")


@dataclass(frozen=True)
class PreparedData:
    """Token rows and the account of how they came about.

    Args:
        rows: ``input_ids`` and ``labels``, lists of int32, and where they come from: ``source``, ``record``,
            ``full_length`` (``rows.SCHEMA``); memory-mapped if they come from a file.
        report: counts; see ``RowCounts.report``, and ``sources``, the same for each source.
    """

    rows: Dataset
    report: dict[str, Any]


class RowHashes:
    """Hashes of rows as they come, to find those that are equal. 8 bytes a row."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> None:
        self.parts.append(hashes)

    def whole(self) -> np.ndarray:
        """[rows] uint64."""
        return np.concatenate([np.empty(0, np.uint64), *self.parts])

    def duplicates(self) -> int:
        """Rows that are equal to an earlier one."""
        whole = self.whole()
        return len(whole) - len(np.unique(whole))


@dataclass(frozen=True)
class Part:
    """The rows of one source, their counts and their hashes ([rows] uint64)."""

    name: str
    rows: Dataset
    counts: RowCounts
    hashes: np.ndarray
    weight: float = 1.0

    def report(self) -> dict[str, Any]:
        return {"source": self.name, "weight": self.weight, **self.counts.report()}


def mix(parts: Sequence[Part], *, seed: int) -> PreparedData:
    """The parts one behind the other; each row as often as its part's weight says.

    A weight of 2.5 means every row twice, and a seeded half of them once more.
    """
    total, hashes = RowCounts(), RowHashes()
    for part in parts:
        total.add(part.counts)
        hashes.add(part.hashes)
    total.duplicates = hashes.duplicates()
    rows = [_weighted(part, number, len(parts), seed) for number, part in enumerate(parts)]
    whole = rows[0] if len(rows) == 1 else concatenate_datasets(rows)
    report = {**total.report(), "rows": len(whole), **total.histograms(), "sources": [part.report() for part in parts]}
    return PreparedData(mark(whole), report)


def _weighted(part: Part, number: int, count: int, seed: int) -> Dataset:
    rows = part.rows
    if count > 1:
        rows = rows.remove_columns("source").add_column("source", np.full(len(rows), number, np.int32))  # type: ignore[call-arg]
    if part.weight == 1:
        return rows
    return rows.select(weighted(len(rows), part.weight, [seed, number]))


def weighted(count: int, weight: float, seed: Sequence[int]) -> np.ndarray:
    """[count * weight] int: each of ``count`` places ``int(weight)`` times, and a seeded share of them once more."""
    whole = int(weight)
    drawn = np.random.default_rng(seed).permutation(count)[: round((weight - whole) * count)]
    return np.concatenate([np.tile(np.arange(count), whole), np.sort(drawn)])


def mark(rows: Dataset) -> Dataset:
    """``rows``, known from now on to be prepared."""
    rows.info.description = _MARK
    return rows


def is_marked(rows: Any) -> bool:
    return isinstance(rows, Dataset) and rows.info.description == _MARK


def identity(tokenizer: Any, encoding: Encoding) -> dict[str, Any]:
    """What the tokens and labels of a record depend on, as plain values: tokenizer, template, supervision, objective."""
    tokens = [
        fast_backend(tokenizer).to_str(),
        repr(tokenizer.special_tokens_map),
        sorted(forbidden_tokens(tokenizer)),
    ]
    cut: dict[str, Any] = {}
    if encoding.joined:
        cut = {"pretrain_packing": "concat", "max_seq_length": encoding.max_length}
    elif encoding.task == "pretrain":
        cut = {"pretrain_packing": "documents", "split_overlap": encoding.split_overlap}
    return {
        "tokenizer": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
        "chat_template": encoding.templates(tokenizer),
        "chat_template_kwargs": dict(encoding.template_kwargs or {}),
        "task_type": encoding.task,
        "train_on": encoding.train_on,
        "num_learnable_im_end": encoding.rules.end_tail,
        "mask_token_id": encoding.rules.mask_token_id,
        "max_prompt_length": encoding.rules.max_prompt_length,
        "max_answer_length": encoding.rules.max_answer_length,
        **cut,
    }


def code_version() -> list[str]:
    """Of the code that makes rows, ours and that of others."""
    folder = Path(__file__).parent
    files = sorted([*folder.glob("*.py"), *folder.glob("chat_templates/*")])
    return [hash_files(files), *map(version, _PACKAGES)]


# ---- one source in a folder of the cache ----


def load_part(folder: Path, name: str, weight: float = 1.0) -> Part:
    """The rows and counts of a folder of the cache.

    Raises:
        ValueError: the folder is damaged.
    """
    damage: Exception | None = None
    for _ in range(20):
        try:
            counts = RowCounts.from_values(json.loads((folder / "counts.json").read_text(encoding="utf-8")))
            hashes = np.load(folder / "hashes.npy", allow_pickle=False)
            return Part(name, Dataset.from_file(str(folder / "rows.arrow")), counts, hashes, weight)
        except FileNotFoundError as error:  # another process may be replacing the folder at this moment
            damage = error
            time.sleep(0.1)
        except (OSError, pa.ArrowInvalid, ValueError, TypeError, KeyError) as error:
            damage = error
            break
    raise ValueError(f"The cached data in {folder} is damaged ({damage}). Set rebuild_cache: true.")


def save_counts(folder: Path, counts: RowCounts, hashes: RowHashes) -> None:
    np.save(folder / "hashes.npy", hashes.whole())
    (folder / "counts.json").write_text(json.dumps(vars(counts), ensure_ascii=False), encoding="utf-8")


# ---- folders of hf-sft prepare ----


def is_prepared(path: str | Path) -> bool:
    """Whether ``hf-sft prepare`` has made the folder."""
    return (Path(path) / PREPARED_FILE).is_file()


def check_new_folder(folder: str | Path) -> Path:
    """The path, if nothing is there yet; ValueError if there is."""
    if Path(folder).exists():
        raise ValueError(f"{folder} exists already, and nothing is written over: name another output_dir, or remove it")
    return Path(folder)


def save_prepared(
    folder: str | Path, prepared: Mapping[str, PreparedData], identities: Mapping[str, Any], packing: Mapping[str, Any]
) -> None:
    """Write rows, identities and ``data_report.json`` of each split; the folder appears when it is whole.

    Raises:
        ValueError: the folder exists, or cannot be written to.
    """
    folder = check_new_folder(folder)

    def write(target: Path) -> None:
        for split, part in prepared.items():
            rows = part.rows.with_format("arrow")
            with pa.OSFile(str(target / f"{split}.arrow"), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
                for start in range(0, len(rows), 1000):
                    writer.write_table(rows[start : start + 1000].select(SCHEMA.names).cast(SCHEMA))
        content = {"version": 1, "identity": dict(identities), "code": code_version()}
        (target / PREPARED_FILE).write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
        write_data_report(target, {split: part.report for split, part in prepared.items()}, packing)

    write_folder(folder, write, way_out="Name another output_dir.")


def prepared_splits(folder: str | Path) -> list[str]:
    return [split for split in ("train", "eval") if (Path(folder) / f"{split}.arrow").is_file()]


def load_prepared(folder: str | Path, split: str, tokenizer: Any, encoding: Encoding) -> PreparedData:
    """A split of a folder that ``hf-sft prepare`` has written.

    Raises:
        ValueError: it was made with another tokenizer, template or objective than this run has, its rows are longer than
            ``encoding.max_length``, it has no such split, or it is damaged.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / PREPARED_FILE).read_text(encoding="utf-8"))
        reports = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
        made_with, report = content["identity"].get(split), reports.get(split)
        rows = None if made_with is None else Dataset.from_file(str(folder / f"{split}.arrow"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {Path(str(error.filename)).name}: prepare the data again") from None
    except (OSError, pa.ArrowInvalid, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the prepared data in {folder} are damaged ({error}): prepare them again") from None
    if rows is None or report is None:
        raise ValueError(f"{folder} was prepared without {split} data: give hf-sft prepare some")
    _check_identity(folder, made_with, identity(tokenizer, encoding))
    if report["longest"] > encoding.max_length:
        raise ValueError(
            f"{folder} holds documents of up to {report['longest']} tokens, and max_seq_length is {encoding.max_length}: "
            "raise it, or prepare the data again"
        )
    return PreparedData(mark(rows), report)


def _check_identity(folder: Path, made_with: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wrong = []
    for key, value in wanted.items():
        found = made_with.get(key)
        if found == value:
            continue
        if key == "tokenizer":
            wrong.append("the tokenizer is another one")
        else:
            wrong.append(f"{key} is {shorten(value, 80)}, and the data were prepared with {shorten(found, 80)}")
    if wrong:
        raise ValueError(
            f"{folder} was prepared for another run:\n  "
            + "\n  ".join(wrong)
            + "\nTrain with the same settings, or prepare the data again with these."
        )


# ---- reports ----


def write_data_report(
    output_dir: str | Path, reports: Mapping[str, dict[str, Any]], packing: Mapping[str, Any] | None = None
) -> Path:
    """Write ``data_report.json``: the report of each split, and how full the bins are (:func:`packing_report`)."""
    content = {**reports, **({"packing": packing} if packing else {})}
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    return write_file(Path(output_dir) / "data_report.json", text)


def packing_report(bins: int, capacity: int, tokens: int) -> dict[str, Any]:
    """fill = tokens / (bins * capacity)."""
    return {"bins": bins, "capacity": capacity, "tokens": tokens, "fill": tokens / (bins * capacity)}
