"""Bins of documents, and the order in which ranks see them.

The order of an epoch depends on (seed, epoch) alone. It is cut into optimizer steps of ``world x accumulation x batch`` bins, so
that the same bins share a step however it is divided among ranks and micro-batches. The last step is filled up with empty bins:
every rank has the same number of micro-batches, and nothing is repeated or dropped. Inside a step bins are dealt so that in each
micro-batch, after which ranks wait for each other, all have about the same number of tokens (:func:`deal`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from hf_sft.data.packing import pack_documents

EMPTY = -1


def deal(lengths: np.ndarray, accumulation: int, world: int, batch: int) -> np.ndarray:
    """Deal the bins of optimizer steps to micro-batches and ranks.

    The longest bins go into the first micro-batch: those of one micro-batch are then about as long as each other, which saves
    padding too. There they are handed out in ``batch`` rounds of one bin per rank; in each round the rank with the fewest
    tokens so far gets the longest. So in every micro-batch two ranks differ by at most the difference of its longest and its
    shortest bin, and by at most one bin in number.

    Args:
        lengths: [S, accumulation * world * batch] int, tokens of each bin of S steps; ``EMPTY`` for what fills up a step.

    Returns:
        [S, accumulation, world, batch] int: places in the step.
    """
    steps, shape = len(lengths), (len(lengths), accumulation, batch, world)
    order = np.argsort(-lengths, axis=1, kind="stable")
    tokens = np.take_along_axis(lengths, order, axis=1).clip(0).reshape(shape)
    places = order.reshape(shape)
    sums = np.zeros((steps, accumulation, world), dtype=np.int64)
    dealt = np.empty((steps, accumulation, world, batch), dtype=places.dtype)
    for turn in range(batch):
        ranks = np.argsort(sums, axis=-1, kind="stable")
        np.put_along_axis(dealt[..., turn], ranks, places[:, :, turn], axis=-1)
        np.put_along_axis(sums, ranks, np.take_along_axis(sums, ranks, axis=-1) + tokens[:, :, turn], axis=-1)
    return dealt


class Bins(Dataset):
    """Token rows grouped into bins; an item is addressed by ``(epoch, bin)`` and is a list of token rows,
    each with its number in the data set (``document``) and the ``epoch``.

    The epoch travels with the index because loader workers do not hear of it otherwise.

    Args:
        columns: of the rows, beside ``input_ids`` and ``labels``: whole numbers.
        rows: token rows ``{"input_ids", "labels"}``: a list, or a ``datasets.Dataset`` (read through Arrow without copies).
        capacity: pack documents into bins of so many tokens; None: one document per bin.

    Attributes:
        notes: name -> [documents, ...]: what is written into each document's row beside its columns.

    Raises:
        ValueError: if a document is longer than ``capacity``.
    """

    def __init__(self, rows: Any, capacity: int | None, columns: tuple[str, ...] = ()) -> None:
        self.columns = columns
        self.notes: dict[str, np.ndarray] = {}
        self.whole_rows = (
            rows if hasattr(rows, "with_format") and {"source", "record"} <= set(rows.column_names) else None
        )
        self.rows = (
            rows.select_columns(["input_ids", "labels", *columns]).with_format("arrow")
            if hasattr(rows, "with_format")
            else rows
        )
        self.lengths, self.largest_id = _measure(self.rows)
        self.bins = (
            [[i] for i in range(len(self.lengths))] if capacity is None else pack_documents(self.lengths, capacity)
        )
        self.capacity = capacity

    def __len__(self) -> int:
        return len(self.bins)

    @cached_property
    def fills(self) -> np.ndarray:
        """[bins] int64: tokens of each bin."""
        members = np.fromiter(itertools.chain.from_iterable(self.bins), np.int64, len(self.lengths))
        starts = np.cumsum([0, *map(len, self.bins[:-1])])
        return np.add.reduceat(np.asarray(self.lengths, np.int64)[members], starts) if self.bins else members

    def origin(self, document: int) -> tuple[int, int]:
        """The number of the source and of its record that a document comes from; -1 for what is not known."""
        if self.whole_rows is None:
            return -1, -1
        row = self.whole_rows[document]
        return int(row["source"]), int(row["record"])

    def __getitem__(self, index: tuple[int, int]) -> list[dict[str, Any]]:
        epoch, number = index
        if number == EMPTY:
            return []
        documents = self.bins[number]
        # Which document of which epoch it is decides the noise of objectives that draw any.
        return [
            {**row, "document": i, "epoch": epoch, **{name: values[i] for name, values in self.notes.items()}}
            for i, row in zip(documents, self.documents(documents), strict=True)
        ]

    def documents(self, numbers: list[int]) -> list[dict[str, Any]]:
        """The token rows of these documents."""
        if isinstance(self.rows, Sequence):
            return [self.rows[i] for i in numbers]
        table = self.rows[numbers]
        columns: dict[str, Sequence[Any]] = {name: _split_column(table[name]) for name in ("input_ids", "labels")}
        columns |= {name: table[name].to_pylist() for name in self.columns}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class NumberedBin(list[Any]):
    """A bin of examples that do not say themselves which they are.

    Attributes:
        number: of its example in the data set.
    """

    number: int


class Examples(Dataset):
    """A data set handed to a user's own collator as it is: each bin is one example.

    Args:
        examples: anything with ``len`` and integer indexing.
    """

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: tuple[int, int]) -> list[Any]:
        _, number = index
        found = NumberedBin([] if number == EMPTY else [self.examples[number]])
        found.number = number
        return found


class BinSampler:
    """Batches of ``(epoch, bin)`` for one rank; a batch sampler for ``DataLoader``.

    Args:
        bins: number of bins.
        batch_size: bins per micro-batch.
        accumulation: micro-batches per optimizer step.
        world, rank: number of processes and the number of this one.
        seed: of the order; None keeps the order of the file.
        lengths: tokens of each bin, by which they are dealt (:func:`deal`); None: all count alike.
        balanced: False cuts steps into micro-batches and ranks in their order, so that ranks behind each other give the order
            of the file, and what fills up the last step stands at its end.
        start, start_epoch: the first ``start`` bins of that epoch's order have been seen before, in steps of another size: it
            yields the rest, though ``len`` is always that of a whole epoch.

    Raises:
        ValueError: ``start`` or ``lengths`` do not fit the number of bins.
    """

    def __init__(
        self,
        bins: int,
        batch_size: int,
        *,
        accumulation: int = 1,
        world: int = 1,
        rank: int = 0,
        seed: int | None = None,
        lengths: Sequence[int] | np.ndarray | None = None,
        balanced: bool = True,
        start: int = 0,
        start_epoch: int = 0,
    ) -> None:
        if not 0 <= start <= bins:
            raise ValueError(f"start is {start}: of {bins} bins none to all can have been seen before")
        if lengths is not None and len(lengths) != bins:
            raise ValueError(f"{len(lengths)} lengths are given for {bins} bins: each bin has one")
        self.bins, self.batch_size, self.world, self.rank, self.seed = bins, batch_size, world, rank, seed
        self.accumulation, self.start, self.start_epoch = accumulation, start, start_epoch
        self.balanced = balanced and world * accumulation > 1
        self.lengths = np.ones(bins, np.int64) if lengths is None else np.asarray(lengths, np.int64)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._steps(self.bins) * self.accumulation

    def _steps(self, bins: int) -> int:
        return -(-bins // (self.batch_size * self.accumulation * self.world))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = (
            np.arange(self.bins)
            if self.seed is None
            else np.random.default_rng([self.seed, epoch]).permutation(self.bins)
        )
        order = order[self.start if epoch == self.start_epoch else 0 :]
        shape = (self._steps(len(order)), self.accumulation, self.world, self.batch_size)
        padded = np.full(math.prod(shape), EMPTY)
        padded[: len(order)] = order
        steps = padded.reshape(shape[0], math.prod(shape[1:]))
        if self.balanced:
            lengths = np.where(steps == EMPTY, EMPTY, self.lengths[steps])
            steps = np.take_along_axis(steps, deal(lengths, *shape[1:]).reshape(steps.shape), axis=1)
        for batch in steps.reshape(-1, self.world, self.batch_size)[:, self.rank].tolist():
            yield [(epoch, number) for number in batch]


class BinLoader(DataLoader):
    """A ``DataLoader`` over bins that hands the epoch on to its sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch; a stream knows its own."""
        if self.batch_sampler is not None:
            self.batch_sampler.set_epoch(epoch)  # type: ignore[attr-defined]


def _measure(rows: Any) -> tuple[list[int], int]:
    """Length of each document, and the largest token id (-1 without tokens)."""
    if isinstance(rows, Sequence):
        return [len(row["input_ids"]) for row in rows], max(
            (max(row["input_ids"], default=-1) for row in rows), default=-1
        )
    import pyarrow.compute as pc

    lengths: list[int] = []
    largest = -1
    for start in range(0, len(rows), 10_000):
        column = rows[start : start + 10_000]["input_ids"]
        lengths += pc.list_value_length(column).to_pylist()
        largest = max(largest, pc.max(pc.list_flatten(column)).as_py() or -1)
    return lengths, largest


def _split_column(column: Any) -> list[np.ndarray]:
    """A chunked Arrow column of integer lists as one array per list, without building Python lists."""
    return [scalar.values.to_numpy(zero_copy_only=False) for scalar in column]
