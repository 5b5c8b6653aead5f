"""From a data file, or examples in memory, to token rows in Arrow."""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable
from tqdm import tqdm

from hf_sft.arguments import DataArguments
from hf_sft.data.cache import (
    cache_key,
    default_cache_dir,
    hash_files,
    is_local_main,
    process_start,
    wait_for_folder,
    write_folder,
)
from hf_sft.data.chat import ChatEncoder, EncodingError, TokenRow, fast_backend
from hf_sft.data.files import BadRecord, Record, check_file, read_records
from hf_sft.data.formats import Conversation, FormatError, check_template_kwargs, to_conversation
from hf_sft.data.templates import resolve_template
from hf_sft.data.texts import TextEncoder, read_texts, to_text
from hf_sft.data.tokenize import Overlength, RowCounts, check_token_row, cut_tail, is_token_row

logger = logging.getLogger(__name__)

_CHUNK = 1000  # records in memory at once
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
_PREPARED = "token rows prepared by hf_sft"


@dataclass(frozen=True)
class RowRules:
    """What an objective asks of token rows.

    Args:
        end_tail: end-of-turn tokens that are learned behind a conversation's last answer; see ``ChatEncoder``.
        mask_token_id: no row may hold it.
    """

    end_tail: int = 0
    mask_token_id: int | None = None

    def apply(self, row: TokenRow | ValueError, max_length: int, *, encoded: bool) -> TokenRow | ValueError:
        """The row as the objective wants it, or what is wrong with it; a tail never makes a row too long.

        ``encoded``: the row was made here; one that came as token rows has no tail of ours.
        """
        if isinstance(row, ValueError):
            return row
        if self.mask_token_id in row["input_ids"]:
            return EncodingError(
                f"it holds the mask token {self.mask_token_id}; take it out of the text, or choose another mask_token"
            )
        return cut_tail(row, max_length, self.end_tail) if self.end_tail and encoded else row


@dataclass(frozen=True)
class PreparedData:
    """Token rows and the account of how they came about.

    Args:
        rows: columns ``input_ids`` and ``labels``, lists of int32; memory-mapped if they come from a file.
        report: counts; see ``RowCounts.report``.
    """

    rows: Dataset
    report: dict[str, Any]


def prepare_dataset(
    path: str | Path, tokenizer: Any, *, data: DataArguments, split: str = "train", rules: RowRules = RowRules()
) -> PreparedData:
    """Token rows of a data file, from the cache if nothing that they depend on has changed.

    The process with LOCAL_RANK 0 prepares, the others of the machine wait for its folder.

    Args:
        path: JSON lines or a JSON array; under ``task_type: pretrain`` also a text file.
        tokenizer: a fast tokenizer.
        split: ``train`` or ``eval``: whether ``max_train_samples`` or ``max_eval_samples`` counts.
        rules: what the objective asks of token rows.

    Raises:
        ValueError: the file, a record (with ``bad_records: error``) or the template is wrong, or no row is left.
    """
    path = check_file(path)
    encoder = _encoder(tokenizer, data, rules)
    limit = data.max_train_samples if split == "train" else data.max_eval_samples
    folder = Path(data.data_cache_dir or default_cache_dir()).expanduser() / _key(path, encoder, data, rules, limit)

    def write(target: Path) -> None:
        counts = RowCounts(str(path))
        records = tqdm(
            itertools.islice(_read(path, data), limit), desc=f"tokenising {path.name}", unit=" rows", disable=None
        )
        with pa.OSFile(str(target / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
            for rows in _token_rows(records, counts, data, rules, tokenizer, lambda: encoder):
                writer.write_batch(_batch(rows))
        _refuse_nothing(counts)
        (target / "report.json").write_text(json.dumps(counts.report(), ensure_ascii=False, indent=2), encoding="utf-8")

    if not is_local_main():
        wait_for_folder(folder, written_since=process_start() if data.rebuild_cache else 0.0)
    elif data.rebuild_cache or not folder.is_dir():
        write_folder(folder, write, replace=data.rebuild_cache)
    prepared = _load(folder)
    return PreparedData(prepared.rows, {"split": split, **prepared.report})


def rows_from_examples(examples: Any, tokenizer: Any, *, data: DataArguments, rules: RowRules = RowRules()) -> Dataset:
    """Token rows of examples in memory; see :func:`prepare_examples`."""
    return prepare_examples(examples, tokenizer, data=data, rules=rules).rows


def prepare_examples(
    examples: Any, tokenizer: Any, *, data: DataArguments, rules: RowRules = RowRules()
) -> PreparedData:
    """Token rows of a list or a ``datasets.Dataset``, without a cache.

    Args:
        examples: conversations (under ``task_type: pretrain`` texts) in any format that files may have; or token rows
            ``{"input_ids", "labels"}``, which are used as they are. Rows that are too long are treated as
            ``data.overlength`` says in both cases.
        tokenizer: a fast tokenizer; not used for token rows.
        rules: what the objective asks of token rows; a tail is not added to those that are tokenised already.

    Raises:
        ValueError: an example is wrong (with ``bad_records: error``), or no row is left.
    """
    if isinstance(examples, PreparedData):
        return examples
    if isinstance(examples, Dataset) and examples.info.description == _PREPARED:
        return PreparedData(examples, {})
    if isinstance(examples, (str, Path)):
        raise ValueError(
            f"A data set is wanted, and this is a path: {str(examples)!r}. Use prepare_dataset, or load the file."
        )
    if not hasattr(examples, "__len__"):
        raise ValueError(
            f"{type(examples).__name__} has no length; streams are not supported. Pass a list or a Dataset."
        )
    counts = RowCounts("memory")
    encoders: list[Encoder] = []

    def encoder() -> Encoder:  # token rows need none, and perhaps have no template
        if not encoders:
            encoders.append(_encoder(tokenizer, data, rules))
        return encoders[0]

    records = (Record(n, examples[n], "example") for n in range(len(examples)))
    batches = [_batch(rows) for rows in _token_rows(records, counts, data, rules, tokenizer, encoder)]
    _refuse_nothing(counts)
    if left_out := counts.read - counts.kept:
        logger.warning("%d of %d examples are left out: %s", left_out, counts.read, _reasons(counts))
    return PreparedData(_dataset(pa.Table.from_batches(batches, _SCHEMA)), counts.report())


def write_data_report(
    output_dir: str | Path, reports: dict[str, dict[str, Any]], packing: dict[str, Any] | None = None
) -> Path:
    """Write ``data_report.json``: the report of each split, and how full the bins are (:func:`packing_report`)."""
    path = Path(output_dir) / "data_report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**reports, **({"packing": packing} if packing else {})}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def packing_report(bins: int, capacity: int, tokens: int) -> dict[str, Any]:
    """fill = tokens / (bins * capacity)."""
    return {"bins": bins, "capacity": capacity, "tokens": tokens, "fill": tokens / (bins * capacity)}


# ---------------------------------------------------------------------------------------------------------------------


Encoder = ChatEncoder | TextEncoder


def _encoder(tokenizer: Any, data: DataArguments, rules: RowRules) -> Encoder:
    if tokenizer is None:
        raise ValueError("conversations and texts need a tokenizer: pass it as processing_class, or give token rows")
    if data.task_type == "pretrain":
        return TextEncoder(tokenizer)
    kwargs = data.chat_template_kwargs
    if isinstance(kwargs, str):
        try:
            kwargs = json.loads(kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(f"chat_template_kwargs is no JSON ({error}): {kwargs!r}. Write a JSON object.") from None
    template = resolve_template(tokenizer, data.chat_template)
    return ChatEncoder(tokenizer, template, check_template_kwargs(kwargs), end_tail=rules.end_tail)


def _read(path: Path, data: DataArguments) -> Iterator[Record]:
    return read_texts(path) if data.task_type == "pretrain" else read_records(path)


def _key(path: Path, encoder: Encoder, data: DataArguments, rules: RowRules, limit: int | None) -> str:
    tokenizer = encoder.tokenizer
    template = None
    if isinstance(encoder, ChatEncoder):
        template = [encoder.template, repr(encoder.template_kwargs), data.train_on]
    return cache_key(
        {
            "data": hash_files([path]),
            "name": str(path.resolve()),  # the report names the file
            "code": hash_files(sorted(Path(__file__).parent.glob("*.py"))),
            "versions": [version(name) for name in ("transformers", "tokenizers", "jinja2", "pyarrow")],
            "tokenizer": [
                fast_backend(tokenizer).to_str(),
                repr(tokenizer.special_tokens_map),
                encoder.forbidden.pattern,
            ],
            "template": template,
            "arguments": [data.task_type, data.max_seq_length, data.overlength_rule, data.bad_records, limit],
            "rules": repr(rules),
        }
    )


def _token_rows(
    records: Iterable[Record],
    counts: RowCounts,
    data: DataArguments,
    rules: RowRules,
    tokenizer: Any,
    encoder: Callable[[], Encoder],
) -> Iterator[list[TokenRow]]:
    """The rows that are kept, chunk by chunk.

    Raises:
        ValueError: bad records in a chunk, with ``bad_records: error``.
    """
    vocabulary = len(tokenizer) if tokenizer is not None else None
    records = iter(records)
    while chunk := list(itertools.islice(records, _CHUNK)):
        counts.read += len(chunk)
        kept: list[TokenRow] = []
        too_long: list[str] = []
        results = _encode_chunk(chunk, encoder, data, vocabulary)
        for record, result in zip(chunk, results, strict=True):
            place = f"{counts.source}, {record.unit} {record.number}"
            row = rules.apply(result, data.max_seq_length, encoded=not is_token_row(record.value))
            if isinstance(row, ValueError):
                counts.add_bad(place, str(row))
                continue
            try:
                kept += counts.fit(row, data.max_seq_length, cast(Overlength, data.overlength_rule))
            except EncodingError as error:
                too_long.append(f"{place}: {error}")
        if too_long:
            raise ValueError(_problems("documents are too long", too_long, len(too_long), counts.read))
        if counts.bad and data.bad_records == "error":
            problem = _problems("records cannot be used", counts.bad_examples, counts.bad.total(), counts.read)
            raise ValueError(
                f"{problem}\nMend them, or set bad_records to skip, which leaves them out and counts them."
            )
        if kept:
            yield kept


def _encode_chunk(
    chunk: list[Record], encoder: Callable[[], Encoder], data: DataArguments, vocabulary: int | None
) -> list[TokenRow | ValueError]:
    """The token row of each record, or what is wrong with it."""
    parsed = [_parse(record, data, vocabulary) for record in chunk]
    wanted = [value for value in parsed if isinstance(value, (Conversation, str))]
    if not wanted:
        encoded: Iterator[Any] = iter([])
    elif isinstance(known := encoder(), TextEncoder):
        encoded = iter(known.encode(cast(list[str], wanted)))
    else:
        encoded = iter(known.encode(cast(list[Conversation], wanted), train_on=data.train_on))
    return [next(encoded) if isinstance(value, (Conversation, str)) else value for value in parsed]


def _parse(record: Record, data: DataArguments, vocabulary: int | None) -> Conversation | str | TokenRow | ValueError:
    value = record.value
    try:
        if isinstance(value, BadRecord):
            return FormatError(value.reason)
        if is_token_row(value):
            return check_token_row(value, vocabulary)
        return to_text(value) if data.task_type == "pretrain" else to_conversation(value)
    except (FormatError, EncodingError) as error:
        return error


def _problems(what: str, examples: list[str], count: int, read: int) -> str:
    """Records that fail for one reason are told once, with the places of the others."""
    places: dict[str, list[str]] = {}
    for example in examples:
        place, _, reason = example.partition(": ")
        places.setdefault(reason, []).append(place)
    lines = []
    for reason, found in list(places.items())[:10]:
        lines.append(f"{found[0]}: {reason}")
        if others := [place.rsplit(", ", 1)[-1] for place in found[1:20]]:
            lines.append(f"  the same: {', '.join(others)}")
    told = sum(min(len(found), 20) for found in list(places.values())[:10])
    more = [f"... and {count - told} more"] if count > told else []
    return "\n  ".join([f"{count} of the first {read} {what}:", *lines, *more])


def _reasons(counts: RowCounts) -> str:
    found = {"too long (overlength)": counts.overlength, "no supervised token": counts.unsupervised, **counts.bad}
    return ", ".join(f"{number} {reason}" for reason, number in found.items() if number) or "none"


def _refuse_nothing(counts: RowCounts) -> None:
    if not counts.kept:
        raise ValueError(
            f"{counts.source}: of {counts.read} records none is left to train on ({_reasons(counts)}). "
            "Raise max_seq_length, set overlength to truncate, or mend the data."
            + "".join(f"\n  {e}" for e in counts.bad_examples)
        )


def _batch(rows: list[TokenRow]) -> pa.RecordBatch:
    offsets = pa.array(np.cumsum([0, *(len(row["input_ids"]) for row in rows)]), pa.int32())
    columns = []
    for name in ("input_ids", "labels"):
        lists = (row[name] for row in rows)  # type: ignore[literal-required]
        flat = np.fromiter(itertools.chain.from_iterable(lists), np.int32, offsets[-1].as_py())
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(flat)))
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _dataset(table: pa.Table) -> Dataset:
    rows = Dataset(InMemoryTable(table))
    rows.info.description = _PREPARED
    return rows


def _load(folder: Path) -> PreparedData:
    damage: Exception | None = None
    for _ in range(20):
        try:
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            rows = Dataset.from_file(str(folder / "rows.arrow"))
            rows.info.description = _PREPARED
            return PreparedData(rows, report)
        except FileNotFoundError as error:  # another process may be replacing the folder at this moment
            damage = error
            time.sleep(0.1)
        except (OSError, pa.ArrowInvalid, ValueError) as error:
            damage = error
            break
    raise ValueError(f"The cached data in {folder} is damaged ({damage}). Set rebuild_cache: true.")
