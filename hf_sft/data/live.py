"""Training data that are tokenised while the model trains: one record at a time, or as an endless stream.

``lazy_preprocess`` keeps the records in memory and draws from all of them; ``streaming`` holds a buffer and a window of
documents. Both depend on (seed, epoch) alone, so that a resume goes on where it was.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from hf_sft.arguments import DataArguments
from hf_sft.data.bins import EMPTY, deal
from hf_sft.data.concat import join
from hf_sft.data.files import BadRecord, Record, size_of
from hf_sft.data.packing import pack_documents
from hf_sft.data.pipeline import read_source, reasons, refuse
from hf_sft.data.prepared import weighted
from hf_sft.data.rows import Encoding, RowEncoder, RowRules
from hf_sft.data.tokenize import RowCounts
from hf_sft.sources import read_sources

logger = logging.getLogger(__name__)

_ENCODED_AT_ONCE = 64  # records
_WINDOW = 512  # documents that a stream packs together
Item = dict[str, Any]  # a token row with its number (document) and epoch


@dataclass(frozen=True)
class LiveSource:
    """Where records come from, and what makes token rows of them.

    Args:
        name: for messages.
        open: gives the records from the first on.
        encoder: makes token rows.
        weight: as ``Source.weight``.
        size: bytes, or what there is of the kind; a stream draws from larger sources more often.
    """

    name: str
    open: Callable[[], Iterator[Record]]
    encoder: RowEncoder
    weight: float = 1.0
    size: float = 1.0


class LiveRecords:
    """Training records that are not tokenised yet; the Trainer makes :class:`LazyBins` or :class:`StreamBins` of them.

    Args:
        sources: where they come from.
        data: lengths, what happens to bad records, buffer.
        seed: of all draws.
    """

    def __init__(self, sources: Sequence[LiveSource], data: DataArguments, seed: int) -> None:
        self.sources, self.data, self.seed = list(sources), data, seed

    @classmethod
    def of_files(cls, files: Any, tokenizer: Any, *, data: DataArguments, rules: RowRules, seed: int) -> LiveRecords:
        """Of ``DataArguments.train_file``.

        Raises:
            ValueError: no such file, or no template.
        """
        sources = []
        for source in read_sources(files):
            encoder = RowEncoder(tokenizer, Encoding.of(data, rules, source, seed), source.path)
            _ = encoder.encoders  # a template that is missing is told now
            opened = partial(read_source, source, "train", data, streaming=data.streaming)
            sources.append(LiveSource(source.path, opened, encoder, source.weight, size_of(source.path)))
        return cls(sources, data, seed)

    @classmethod
    def of_examples(
        cls, examples: Any, tokenizer: Any, *, data: DataArguments, rules: RowRules, seed: int
    ) -> LiveRecords:
        """Of a list, a ``datasets.Dataset`` or anything that can be iterated again and again."""
        if iter(examples) is examples:
            raise ValueError(
                f"train_dataset is a {type(examples).__name__}, which can be read once only: pass a list, a datasets."
                "IterableDataset, or an object whose __iter__ begins anew"
            )
        encoder = RowEncoder(tokenizer, Encoding.of(data, rules, seed=seed), "memory")
        return cls([LiveSource("memory", partial(_examples, examples), encoder)], data, seed)

    @property
    def report(self) -> dict[str, Any]:
        """What is known before the records are read."""
        how = "streaming" if self.data.streaming else "lazy_preprocess"
        return {"split": "train", "tokenised": how, "sources": [{"source": each.name} for each in self.sources]}


def is_stream(examples: Any) -> bool:
    """Whether examples can be iterated and have no length."""
    return hasattr(examples, "__iter__") and not hasattr(examples, "__len__")


def _examples(examples: Iterable[Any]) -> Iterator[Record]:
    return (Record(number, value, "example") for number, value in enumerate(examples))


def _rows(live: LiveRecords, number: int, records: list[Record], embedding_rows: int, counts: RowCounts) -> list[Item]:
    """The token rows of those records of a source that can be used; what became of all goes into ``counts``.

    Raises:
        ValueError: bad records (with ``bad_records: error``), documents that are too long (with ``overlength: error``), or
            token ids beyond the model's.
    """
    chunk = live.sources[number].encoder.encode(records)
    refuse(chunk, chunk.counts, live.data.bad_records)
    if chunk.counts.bad:
        logger.warning("left out: %s", "; ".join(chunk.counts.bad_examples))
    counts.add(chunk.counts)
    columns = [chunk.rows.column(name) for name in ("input_ids", "labels", "record", "rejected_start")]
    rows: list[Item] = [
        {
            "input_ids": ids.values.to_numpy(),
            "labels": labels.values.to_numpy(),
            "source": number,
            "record": record.as_py(),
        }
        | ({"rejected_start": border.as_py()} if border.is_valid else {})
        for ids, labels, record, border in zip(*columns, strict=True)
    ]
    for row in rows:
        if row["input_ids"].max() >= embedding_rows:
            raise ValueError(
                f"the data hold token id {row['input_ids'].max()}, and the model has {embedding_rows} embedding rows: the "
                "tokenizer and the model do not belong together"
            )
    return rows


# ---- lazy_preprocess ----


class LazyBins(Dataset):
    """Bins of one document, tokenised when they are fetched; addressed by ``(epoch, bin)`` like ``Bins``.

    A record that is left out (too long, nothing to learn, or bad) is an empty bin.

    Args:
        live: the records; read once, kept as JSON.
        capacity: not None if documents of a micro-batch share a row.
        embedding_rows: token ids must be smaller.

    Raises:
        ValueError: a file cannot be read, or holds a record that cannot (with ``bad_records: error``).
    """

    def __init__(self, live: LiveRecords, capacity: int | None, embedding_rows: int) -> None:
        self.live, self.capacity, self.embedding_rows = live, capacity, embedding_rows
        self.tables: list[pa.Array] = []
        places = []
        limit = live.data.max_train_samples
        for number, source in enumerate(live.sources):
            counts = RowCounts()
            self.tables.append(
                pa.array(_as_json(itertools.islice(source.open(), limit), source, counts, live.data), pa.large_binary())
            )
            count = len(self.tables[-1])
            limit = None if limit is None else limit - counts.read
            if counts.bad:
                logger.warning("%s: left out of %d records: %s", source.name, counts.read, reasons(counts))
            chosen = weighted(count, source.weight, [live.seed, number])
            places.append(np.stack([np.full(len(chosen), number), chosen], axis=1))
        self.places = np.concatenate(places)
        if not len(self.places):
            raise ValueError(f"{', '.join(source.name for source in live.sources)}: no record is left to train on")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: tuple[int, int]) -> list[Item]:
        epoch, number = index
        if number == EMPTY:
            return []
        source, place = map(int, self.places[number])
        record = Record(*json.loads(self.tables[source][place].as_py()))
        counts = RowCounts()
        rows = _rows(self.live, source, [record], self.embedding_rows, counts)
        if not counts.kept and not counts.bad:
            logger.info("left out: %s: %s", record.where(self.live.sources[source].name), reasons(counts))
        return [{**row, "document": int(number), "epoch": epoch} for row in rows]


def _plain(value: Any) -> Any:
    """Of arrays and their numbers, what JSON can hold."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _as_json(records: Iterator[Record], source: LiveSource, counts: RowCounts, data: DataArguments) -> Iterator[bytes]:
    for record in records:
        counts.read += 1
        if isinstance(record.value, BadRecord):
            where = record.where(source.name)
            if data.bad_records == "error":
                raise ValueError(
                    f"{where}: {record.value.reason}\nMend it, or set bad_records to skip, which leaves it out and counts it."
                )
            counts.add_bad(where, ValueError(record.value.reason))
            continue
        yield json.dumps(record, default=_plain).encode()


# ---- streaming ----


def _joined(rows: Iterator[Item], length: int) -> Iterator[Item]:
    columns = ((row["input_ids"], row["labels"]) for row in rows)
    return ({"input_ids": ids, "labels": labels} for ids, labels in join(columns, length))


def _sample(rows: Iterator[Item], share: float, rng: np.random.Generator) -> Iterator[Item]:
    return (row for row in rows if rng.random() < share)


class StreamBins(IterableDataset):
    """An endless stream of micro-batches, each a list of bins: those of one rank.

    Sources are read at once and drawn from at random, larger ones more often; documents pass through a buffer, from which they
    are drawn at random, and are packed best-fit in windows. Every rank reads everything and takes its share, so that none waits
    for another. With several loader workers each does so too, and they take turns.

    Args:
        live: the records.
        capacity: tokens of a bin; None: one document per bin.
        embedding_rows: token ids must be smaller.
    """

    batch_size = world = 1
    rank = 0

    def __init__(self, live: LiveRecords, capacity: int | None, embedding_rows: int) -> None:
        self.live, self.capacity, self.embedding_rows = live, capacity, embedding_rows

    def dealt(self, batch_size: int, world: int, rank: int) -> StreamBins:
        """The share of process ``rank`` of ``world``, in micro-batches of ``batch_size`` bins."""
        share = copy.copy(self)
        share.batch_size, share.world, share.rank = batch_size, world, rank
        return share

    def __iter__(self) -> Iterator[list[list[Item]]]:
        worker = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        bins = itertools.chain.from_iterable(map(self.bins, itertools.count()))
        for number in itertools.count():
            step = list(itertools.islice(bins, self.batch_size * self.world))
            if number % turns == turn:
                yield self._share(step)

    def _share(self, step: list[list[Item]]) -> list[list[Item]]:
        """This rank's bins of a step, which never lacks one: a stream has no end."""
        if self.world == 1:
            return step
        lengths = [sum(len(item["input_ids"]) for item in members) for members in step]
        return [step[place] for place in deal(np.array([lengths]), 1, self.world, self.batch_size)[0, 0, self.rank]]

    def bins(self, epoch: int) -> Iterator[list[Item]]:
        """The bins of one pass over the data."""
        documents = self._numbered(epoch)
        if self.capacity is None:
            yield from ([document] for document in documents)
            return
        rng = np.random.default_rng([self.live.seed, epoch, 2])
        waiting: list[Item] = []
        while window := [*waiting, *itertools.islice(documents, _WINDOW)]:
            packed = pack_documents([len(item["input_ids"]) for item in window], self.capacity)
            ended = len(window) - len(waiting) < _WINDOW
            fills = [sum(len(window[i]["input_ids"]) for i in members) for members in packed]
            rest = None if ended or len(packed) == 1 else int(np.argmin(fills))  # the emptiest waits for more
            for number in rng.permutation(len(packed)):
                if number != rest:
                    yield [window[i] for i in packed[number]]
            waiting = [] if rest is None else [window[i] for i in packed[rest]]

    def _numbered(self, epoch: int) -> Iterator[Item]:
        """Documents in the order of the epoch, each with its number in it; or rows of the texts, joined in that order."""
        counts = RowCounts()
        rows = self._shuffled(epoch, counts)
        if self.live.data.joins_texts:
            rows = _joined(rows, self.live.data.max_seq_length)
        for number, row in enumerate(rows):
            yield {**row, "document": number, "epoch": epoch}
        names = ", ".join(source.name for source in self.live.sources)
        if not counts.kept:
            raise ValueError(f"{names}: no record can be used: the stream is empty ({reasons(counts)})")
        if self.rank == 0:
            logger.info(
                "%s: %d records read in pass %d of the stream, %d kept; left out: %s",
                names, counts.read, epoch, counts.kept, reasons(counts),
            )  # fmt: skip

    def _shuffled(self, epoch: int, counts: RowCounts) -> Iterator[Item]:
        rng = np.random.default_rng([self.live.seed, epoch, 1])
        buffer: list[Item] = []
        for row in self._mixed(epoch, counts):
            if len(buffer) < self.live.data.shuffle_buffer:
                buffer.append(row)
                continue
            place = int(rng.integers(len(buffer)))
            buffer[place], row = row, buffer[place]
            yield row
        rng.shuffle(buffer)  # type: ignore[arg-type]
        yield from buffer

    def _mixed(self, epoch: int, counts: RowCounts) -> Iterator[Item]:
        """Rows of all sources, drawn in proportion to their sizes, so that they end at about the same time; a source of weight
        2.5 is read twice, and every second of its rows once more."""
        rng = np.random.default_rng([self.live.seed, epoch, 0])
        readers: list[Iterator[Item]] = []
        sizes: list[float] = []
        for number, source in enumerate(self.live.sources):
            whole = int(source.weight)
            readers += [self._read(number, counts) for _ in range(whole)]
            sizes += [source.size] * whole
            if share := source.weight - whole:
                draw = np.random.default_rng([self.live.seed, epoch, 3, number])
                readers.append(_sample(self._read(number, counts), share, draw))
                sizes.append(source.size * share)
        borders = list(itertools.accumulate(sizes))
        while readers:
            place = bisect.bisect_right(borders, rng.random() * borders[-1])
            place = min(place, len(readers) - 1)  # rounding
            try:
                yield next(readers[place])
            except StopIteration:
                del readers[place], sizes[place]
                borders = list(itertools.accumulate(sizes))

    def _read(self, number: int, counts: RowCounts) -> Iterator[Item]:
        records = itertools.islice(self.live.sources[number].open(), self.live.data.max_train_samples)
        while chunk := list(itertools.islice(records, _ENCODED_AT_ONCE)):
            yield from _rows(self.live, number, chunk, self.embedding_rows, counts)
