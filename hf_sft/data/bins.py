"""Bins of documents, and the order in which ranks see them.

The order of an epoch depends on (seed, epoch) alone. It is cut into optimizer steps of ``world x accumulation x batch`` bins, so
that the same bins share a step however it is divided among ranks and micro-batches. The last step is filled up with empty bins:
every rank has the same number of micro-batches, and nothing is repeated or dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from hf_sft.data.packing import pack_documents

EMPTY = -1


class Bins(Dataset):
    """Token rows grouped into bins; an item is addressed by ``(epoch, bin)`` and is a list of token rows,
    each with its number in the data set (``document``) and the ``epoch``.

    The epoch travels with the index because loader workers do not hear of it otherwise.

    Args:
        rows: token rows ``{"input_ids", "labels"}``: a list, or a ``datasets.Dataset`` (read through Arrow without copies).
        capacity: pack documents into bins of so many tokens; None: one document per bin.

    Raises:
        ValueError: if a document is longer than ``capacity``.
    """

    def __init__(self, rows: Any, capacity: int | None) -> None:
        self.rows = (
            rows.select_columns(["input_ids", "labels"]).with_format("arrow") if hasattr(rows, "with_format") else rows
        )
        self.lengths, self.largest_id = _measure(self.rows)
        self.bins = (
            [[i] for i in range(len(self.lengths))] if capacity is None else pack_documents(self.lengths, capacity)
        )
        self.capacity = capacity

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: tuple[int, int]) -> list[dict[str, Any]]:
        epoch, number = index
        if number == EMPTY:
            return []
        documents = self.bins[number]
        if isinstance(self.rows, Sequence):
            rows = [self.rows[i] for i in documents]
        else:
            table = self.rows[documents]
            columns = {name: _split_column(table[name]) for name in ("input_ids", "labels")}
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        # Which document of which epoch it is decides the noise of objectives that draw any.
        return [{**row, "document": i, "epoch": epoch} for i, row in zip(documents, rows, strict=True)]


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
        return [] if number == EMPTY else [self.examples[number]]


class BinSampler:
    """Batches of ``(epoch, bin)`` for one rank; a batch sampler for ``DataLoader``.

    Args:
        bins: number of bins.
        batch_size: bins per micro-batch.
        accumulation: micro-batches per optimizer step.
        world, rank: number of processes and the number of this one.
        seed: of the order; None keeps the order of the file.
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
    ) -> None:
        self.bins, self.batch_size, self.world, self.rank, self.seed = bins, batch_size, world, rank, seed
        self.steps = -(-bins // (batch_size * accumulation * world))
        self.batches = self.steps * accumulation
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = (
            np.arange(self.bins)
            if self.seed is None
            else np.random.default_rng([self.seed, self.epoch]).permutation(self.bins)
        )
        padded = np.full(self.batches * self.world * self.batch_size, EMPTY)
        padded[: self.bins] = order
        for batch in padded.reshape(self.batches, self.world, self.batch_size)[:, self.rank]:
            yield [(self.epoch, int(number)) for number in batch]


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
