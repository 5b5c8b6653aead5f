"""From data files, or examples in memory, to token rows in Arrow."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

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
from hf_sft.data.chat import TokenRow
from hf_sft.data.concat import join
from hf_sft.data.files import Record, content_hash, parts_of, read_records, size_of
from hf_sft.data.prepared import (
    Part,
    PreparedData,
    RowHashes,
    code_version,
    identity,
    is_marked,
    is_prepared,
    load_part,
    load_prepared,
    mark,
    mix,
    prepared_splits,
    save_counts,
)
from hf_sft.data.rows import NO_RULES, SCHEMA, Chunk, Encoding, RowRules, encode_records
from hf_sft.data.tokenize import RowCounts
from hf_sft.sources import Source, read_sources

logger = logging.getLogger(__name__)

_LARGE = 1 << 20  # bytes from which several processes tokenise faster than one
_MOST_WORKERS = 8
_JOINED_AT_ONCE = 256  # rows


# ---- files ----


def prepare_dataset(
    files: Any,
    tokenizer: Any,
    *,
    data: DataArguments,
    split: str = "train",
    rules: RowRules = NO_RULES,
    seed: int = 0,
) -> PreparedData:
    """Token rows of data files, from the cache if nothing that they depend on has changed.

    The process with LOCAL_RANK 0 prepares, the others of the machine wait for its folders. Each source has a folder of its own.

    Args:
        files: as ``DataArguments.train_file``: a path, an object with a path and settings, or a list of these; or the folder
            of ``hf-sft prepare``.
        tokenizer: a fast tokenizer.
        split: ``train`` or ``eval``: which records of a file that holds both, which share under ``eval_split``, and whether
            ``max_train_samples`` or ``max_eval_samples`` counts.
        rules: what the objective asks of token rows.
        seed: of the draws: template, ``eval_split``, weights.

    Raises:
        ValueError: a file, a record (with ``bad_records: error``) or a template is wrong, or no row is left.
    """
    sources = read_sources(files)
    if any(is_prepared(source.path) for source in sources):
        return _prepared_folder(sources, tokenizer, data, split, rules, seed)
    of_training = data.eval_file is None  # what evaluation reads is a part of the training files
    seeks_eval = data.eval_split is not None or (split == "eval" and of_training)
    holders = [source for source in sources if _brings_eval(source)] if seeks_eval else []
    if data.eval_split is not None and holders:
        raise ValueError(
            f"eval_split is set, and {holders[0].path} brings evaluation records of its own: leave eval_split out to use them, "
            "or name a file of the training records alone"
        )
    held_out = None if data.eval_split is None else _HeldOut(sources, data, seed)
    left = data.max_train_samples if split == "train" else data.max_eval_samples
    parts = []
    for number, source in enumerate(sources):
        if split == "eval" and of_training:
            if holders and source not in holders:
                continue
            source = replace(source, weight=1.0)  # weights are for learning
        reader = _Reader(source, number, data, split, left, held_out)
        parts.append(_prepare_source(reader, tokenizer, Encoding.of(data, rules, source, seed)))
        if left is not None:
            left -= parts[-1].counts.read
            if left <= 0:
                break
    prepared = mix(parts, seed=seed)
    if not len(prepared.rows):
        raise ValueError(f"the weights of {', '.join(source.path for source in sources)} leave no row: raise them")
    _warn(prepared.report, data)
    return PreparedData(prepared.rows, {"split": split, **prepared.report})


def _prepared_folder(
    sources: list[Source], tokenizer: Any, data: DataArguments, split: str, rules: RowRules, seed: int
) -> PreparedData:
    """The rows of a folder that ``hf-sft prepare`` has made; it is taken whole."""
    folder = next(source.path for source in sources if is_prepared(source.path))
    if len(sources) > 1:
        raise ValueError(f"{folder} is a folder of hf-sft prepare and stands alone: prepare the mixture instead")
    limit = "max_train_samples" if split == "train" else "max_eval_samples"
    given = [] if sources[0] == Source(folder) else ["the settings of a source"]
    given += [name for name in ("eval_split", limit) if getattr(data, name) is not None]
    if given:
        raise ValueError(
            f"{folder} is a folder of hf-sft prepare and is taken whole: {', '.join(given)} cannot be honoured; give them "
            "to hf-sft prepare"
        )
    return load_prepared(folder, split, tokenizer, Encoding.of(data, rules, seed=seed))


def evaluation_files(data: DataArguments) -> Any:
    """What evaluation reads: ``eval_file``; else the training files, if records are kept from them or they bring some.

    A stream is not searched for any.
    """
    if data.eval_file is not None or data.train_file is None or data.streaming:
        return data.eval_file
    if data.eval_split is not None:
        return data.train_file
    return data.train_file if any(map(_brings_eval, read_sources(data.train_file))) else None


def files_hash(files: Any, *, streaming: bool = False) -> str:
    """Of everything that the named files hold, wherever they are, and of how they are mixed.

    ``streaming``: their sizes and times count, since nothing is read twice.
    """
    sources = read_sources(files)
    contents = [
        hash_files([Path(source.path) / f"{split}.arrow" for split in prepared_splits(source.path)])
        if is_prepared(source.path)
        else content_hash(source.path, streaming=streaming, **source.place)
        for source in sources
    ]
    return cache_key({"settings": [repr(replace(source, path="")) for source in sources], "contents": contents})


def _brings_eval(source: Source) -> bool:
    """Whether a source has evaluation records beside those for training."""
    if is_prepared(source.path):
        return "eval" in prepared_splits(source.path)
    return "eval" in parts_of(source.path, **source.place)


class _HeldOut:
    """Which records ``eval_split`` keeps for evaluation: drawn over all sources together, from the seed."""

    def __init__(self, sources: list[Source], data: DataArguments, seed: int) -> None:
        self.sources, self.data, self.seed = sources, data, seed

    def key(self) -> list[Any]:
        """What the draw depends on; a number of records is shared out among all sources."""
        files = [[content_hash(each.path, **each.place), each.limit] for each in self.sources]
        return [files, self.data.eval_split, self.seed]

    @cached_property
    def masks(self) -> list[np.ndarray]:
        """[records] bool for each source: whether it is kept for evaluation."""
        sizes = [sum(1 for _ in read_source(source, "train", self.data)) for source in self.sources]
        total, share = sum(sizes), float(self.data.eval_split or 0)
        count = round(share * total) if share < 1 else int(share)
        if not 0 < count < total:
            raise ValueError(
                f"eval_split is {share:g}, which keeps {count} of {total} records for evaluation: both sides need at least "
                "one; name eval_file instead (a text file is one record)"
            )
        mask = np.zeros(total, bool)
        mask[np.random.default_rng([self.seed, 1]).permutation(total)[:count]] = True
        return np.split(mask, np.cumsum(sizes)[:-1])


def read_source(source: Source, part: str, data: DataArguments, *, streaming: bool = False) -> Iterator[Record]:
    """The records of a source, up to its limit; see ``read_records``."""
    texts = data.task_type == "pretrain"
    records = read_records(source.path, part=part, texts=texts, streaming=streaming, **source.place)
    return itertools.islice(records, source.limit)


@dataclass(frozen=True)
class _Reader:
    """The records of one source for one split.

    Args:
        number: the source's place in the mixture.
        limit: use the first so many.
        held_out: what ``eval_split`` keeps from training.
    """

    source: Source
    number: int
    data: DataArguments
    split: str
    limit: int | None
    held_out: _HeldOut | None

    def key(self) -> list[Any]:
        """What the records depend on."""
        source = self.source
        held_out = None if self.held_out is None else [self.number, self.held_out.key()]
        place = [self.split, source.limit, self.limit, *source.place.values()]
        return [content_hash(source.path, **source.place), place, held_out]

    def records(self) -> Iterator[Record]:
        if self.held_out is None:
            return itertools.islice(read_source(self.source, self.split, self.data), self.limit)
        kept = self.held_out.masks[self.number] == (self.split == "eval")
        return itertools.islice(itertools.compress(read_source(self.source, "train", self.data), kept), self.limit)


def _prepare_source(reader: _Reader, tokenizer: Any, encoding: Encoding) -> Part:
    source, data = reader.source, reader.data
    key = cache_key(
        {
            "records": reader.key(),
            "identity": identity(tokenizer, encoding),
            "encoding": repr(encoding),
            "bad_records": data.bad_records,
            "code": code_version(),
        }
    )
    folder = Path(data.data_cache_dir or default_cache_dir()).expanduser() / key

    def write(target: Path) -> None:
        counts, hashes = RowCounts(), RowHashes()
        records = tqdm(reader.records(), desc=f"tokenising {Path(source.path).name}", unit=" rows", disable=None)
        chunks = encode_records(records, tokenizer, encoding, source.path, _workers(source, data))
        with pa.OSFile(str(target / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            for rows in _finished(_counted(chunks, counts, hashes, data.bad_records), counts, encoding):
                writer.write_batch(rows)
        if counts.read or reader.held_out is None:  # of a small source, eval_split may take all or nothing
            _refuse_nothing(counts, source.path, "train on" if reader.split == "train" else "evaluate on")
        save_counts(target, counts, hashes)

    if not is_local_main():
        wait_for_folder(folder, written_since=process_start() if data.rebuild_cache else 0.0)
    elif data.rebuild_cache or not folder.is_dir():
        write_folder(folder, write, replace=data.rebuild_cache)
    return load_part(folder, source.path, source.weight)


def _workers(source: Source, data: DataArguments) -> int:
    if data.preprocessing_num_workers is not None:
        return data.preprocessing_num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_WORKERS, cores) if size_of(source.path) >= _LARGE else 1


# ---- memory ----


def rows_from_examples(
    examples: Any, tokenizer: Any, *, data: DataArguments, rules: RowRules = NO_RULES, seed: int = 0
) -> Dataset:
    """Token rows of examples in memory; see :func:`prepare_examples`."""
    return prepare_examples(examples, tokenizer, data=data, rules=rules, seed=seed).rows


def prepare_examples(
    examples: Any, tokenizer: Any, *, data: DataArguments, rules: RowRules = NO_RULES, seed: int = 0
) -> PreparedData:
    """Token rows of a list or a ``datasets.Dataset``, without a cache.

    Args:
        examples: conversations (under ``task_type: pretrain`` texts) in any format that files may have; or token rows
            ``{"input_ids", "labels"}``, which are used as they are. Rows that are too long are treated as
            ``data.overlength`` says in both cases.
        tokenizer: a fast tokenizer; not used for token rows.
        rules: what the objective asks of token rows; a tail is not added to those that are tokenised already.
        seed: of the draw of a template, if there are several.

    Raises:
        ValueError: an example is wrong (with ``bad_records: error``), or no row is left.
    """
    if isinstance(examples, PreparedData):
        return examples
    if is_marked(examples):
        return PreparedData(examples, {})
    if isinstance(examples, (str, Path)):
        raise ValueError(
            f"A data set is wanted, and this is a path: {str(examples)!r}. Use prepare_dataset, or load the file."
        )
    if not hasattr(examples, "__len__"):
        raise ValueError(
            f"{type(examples).__name__} has no length; streams are not supported. Pass a list or a Dataset."
        )
    counts, hashes = RowCounts(), RowHashes()
    records = (Record(n, examples[n], "example") for n in range(len(examples)))
    encoding = Encoding.of(data, rules, seed=seed)
    chunks = encode_records(records, tokenizer, encoding, "memory")
    batches = list(_finished(_counted(chunks, counts, hashes, data.bad_records), counts, encoding))
    _refuse_nothing(counts, "memory")
    if left_out := counts.read - counts.kept:
        logger.warning("%d of %d examples are left out: %s", left_out, counts.read, reasons(counts))
    rows = Dataset(InMemoryTable(pa.Table.from_batches(batches, SCHEMA)))
    return PreparedData(mark(rows), counts.report())


# ---- joining texts ----


def _finished(batches: Iterable[pa.RecordBatch], counts: RowCounts, encoding: Encoding) -> Iterable[pa.RecordBatch]:
    """The rows that are trained on: as they come, or those that are cut from the joined texts, which are counted here."""
    if not encoding.joined:
        return batches
    rows = join(map(_columns, batches), encoding.max_length)
    groups = iter(lambda: list(itertools.islice(rows, _JOINED_AT_ONCE)), [])
    return (_joined_batch(group, counts) for group in groups)


def _columns(batch: pa.RecordBatch) -> list[np.ndarray]:
    """Token ids, labels, and for each token the record that it comes from."""
    lists = [batch.column(name) for name in ("input_ids", "labels")]
    records = batch.column("record").to_numpy()
    return [*(each.flatten().to_numpy() for each in lists), np.repeat(records, np.diff(lists[0].offsets.to_numpy()))]


def _joined_batch(rows: list[tuple[np.ndarray, ...]], counts: RowCounts) -> pa.RecordBatch:
    """``rows`` in ``SCHEMA``; the record of a row is that of its first token."""
    counts.count([TokenRow(input_ids=ids.tolist(), labels=labels.tolist()) for ids, labels, _ in rows])
    lengths = np.array([len(ids) for ids, _, _ in rows], np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    flat = [np.concatenate([row[place] for row in rows]) for place in (0, 1)]
    ids, labels = (pa.ListArray.from_arrays(offsets, pa.array(column, pa.int32())) for column in flat)
    found = {"input_ids": ids, "labels": labels, "source": pa.array(np.zeros(len(rows), np.int32))}
    found |= {"record": pa.array([records[0] for _, _, records in rows], pa.int64()), "full_length": pa.array(lengths)}
    arrays = [found.get(entry.name, pa.nulls(len(rows), entry.type)) for entry in SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


# ---- counting and refusing ----


def _counted(
    chunks: Iterable[Chunk], counts: RowCounts, hashes: RowHashes, bad_records: str
) -> Iterator[pa.RecordBatch]:
    """The rows of the chunks; in ``counts`` what became of all records, in ``hashes`` those of the rows.

    Raises:
        ValueError: bad records in a chunk, with ``bad_records: error``; documents that are too long, with ``overlength: error``.
    """
    for chunk in chunks:
        counts.add(chunk.counts)
        refuse(chunk, counts, bad_records)
        hashes.add(chunk.hashes)
        if len(chunk.hashes):
            yield chunk.rows
    counts.duplicates = hashes.duplicates()


def refuse(chunk: Chunk, counts: RowCounts, bad_records: str) -> None:
    """Raise ValueError for a chunk whose records must not be left out.

    Args:
        counts: of all records so far, this chunk's among them.
    """
    if chunk.too_long:
        raise ValueError(_problems("documents are too long", chunk.too_long, len(chunk.too_long), counts.read))
    if counts.bad and bad_records == "error":
        problem = _problems("records cannot be used", counts.bad_examples, counts.bad.total(), counts.read)
        raise ValueError(f"{problem}\nMend them, or set bad_records to skip, which leaves them out and counts them.")


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


def reasons(counts: RowCounts) -> str:
    """Why records are left out, with their numbers."""
    found = {"too long (overlength)": counts.overlength, "no supervised token": counts.unsupervised, **counts.bad}
    return ", ".join(f"{number} {reason}" for reason, number in found.items() if number) or "none"


def _refuse_nothing(counts: RowCounts, name: str, what_for: str = "train on") -> None:
    if counts.kept:
        return
    ways = []
    if counts.overlength:
        ways.append("Raise max_seq_length, or set overlength to truncate (split for texts).")
    if counts.formats["preference"] and (counts.overlength or counts.unsupervised):
        ways.append("max_prompt_length keeps the end of long prompts.")
    if counts.bad:
        ways.append("Mend the data; columns names fields that are called otherwise.")
    why = f" ({reasons(counts)})" if counts.read else ""
    raise ValueError(
        " ".join([f"{name}: of {counts.read} records none is left to {what_for}{why}.", *ways])
        + "".join(f"\n  {e}" for e in counts.bad_examples)
    )


def _warn(report: dict[str, Any], data: DataArguments) -> None:
    pairs = report["formats"].get("preference", 0)
    if pairs and data.data_format == "auto" and data.task_type == "sft":
        logger.warning(
            "%d records are preference pairs: task_type sft learns the chosen answers and never sees the rejected ones "
            "(data_format: preference says that this is meant)",
            pairs,
        )
