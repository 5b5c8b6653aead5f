"""Which tiles of a packed row's mask hold a pair at all, and which hold nothing else: from the integers on the host.

Symbols: T tokens of the row, padded to n tiles of ``TILE``; a run is a stretch of queries that follow one formula.

    run                     row q of it sees                                of keys in
    clean stream            max(first, q - window + 1) <= k <= q            the same clean stream, which begins at row first
    group of noisy blocks   clean tokens at positions below its limit       the document's clean stream, and
                            rows of its block up to itself                  the group itself
    padding                 itself

The limits of a group's rows are on the device; the host knows bounds (``layout.Group``), and takes the wider one for tiles
that are needed and the narrower one for tiles that are full. Every run is cut at the borders of query tiles, and for each
piece the needed and the full keys are intervals: two intervals per piece make the n x n tables by differences and sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_sft.attention.layout import Layout

TILE = 128  # FlexAttention's default


class TileTable(NamedTuple):
    """Attributes:
    partial: [n, n] bool, tiles of queries x keys in which the rule has to be evaluated.
    full: [n, n] bool, tiles in which every query sees every key.
    """

    partial: np.ndarray
    full: np.ndarray


class _Runs(NamedTuple):
    """Columns, one entry per run: rows ``start`` to ``end``, the document's ``first`` row, and bounds in clean positions."""

    start: np.ndarray
    end: np.ndarray
    first: np.ndarray
    lower: np.ndarray  # groups: no limit and no position is below it; -1 marks clean streams
    clean: np.ndarray  # groups: largest limit
    upper: np.ndarray  # groups: every position is below it


def padded_length(length: int) -> int:
    """The length that a row of ``length`` tokens is padded to, so that kernels are compiled for few lengths: a multiple of
    ``TILE`` up to 1,024, beyond that one of four lengths per doubling (2,560, 3,072, 3,584, 4,096, 5,120, ...)."""
    step = max(TILE, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def tile_lists(layout: Layout, window: int | None = None) -> Tensor:
    """``tile_table`` as FlexAttention's kernels walk it: [4, n, n + 1] int32 on the host, for the padded row.

    Four lists of lists: partial tiles by query tile and full tiles by query tile, for the forward pass; partial and full tiles by
    key tile, for the backward pass. Each begins with the number of its tiles; behind them stand the others, so that the shape
    depends on the padded length alone.
    """
    table = tile_table(layout, padded_length(sum(layout.doc_lengths)), window)
    lists = [_listed(tiles) for tiles in (table.partial, table.full, table.partial.T, table.full.T)]
    return torch.from_numpy(np.stack(lists).astype(np.int32))


def _listed(tiles: np.ndarray) -> np.ndarray:
    """[n, n] bool to [n, n + 1]: per row the number of its tiles, and the columns, those with a tile first."""
    return np.concatenate([tiles.sum(1, keepdims=True), np.argsort(~tiles, axis=1, kind="stable")], axis=1)


@dataclass(frozen=True)
class TileLists:
    """What a loader's worker adds to a batch for FlexAttention: ``tile_lists`` for each sliding window of a model's layers."""

    windows: tuple[int | None, ...]

    def __call__(self, layout: Layout) -> dict[str, Any]:
        return {"tile_lists": {window: tile_lists(layout, window) for window in self.windows}}


def tile_table(layout: Layout, padded: int, window: int | None = None) -> TileTable:
    """Tiles of the rule of ``Layout.allowed``, for rows padded to ``padded`` with tokens that see themselves only.

    Args:
        layout: only its lists on the host are read.
        padded: length of the padded row, a multiple of ``TILE`` at or above T.
        window: sliding window in tokens.
    """
    runs, count = _runs(layout), padded // TILE
    # Cut at the borders of query tiles: rows a to b of piece i stand in tile row[i].
    tiles = -(-runs.end // TILE) - runs.start // TILE
    of = np.repeat(np.arange(len(tiles)), tiles)
    row = np.arange(len(of)) - np.repeat(np.cumsum(tiles) - tiles, tiles) + (runs.start // TILE)[of]
    run = _Runs(*(column[of] for column in runs))
    a, b = np.maximum(run.start, row * TILE), np.minimum(run.end, (row + 1) * TILE)
    span, noisy = padded if window is None else window, run.lower >= 0
    # Keys that some row of the piece sees, and keys that all of them see.
    lowest = np.where(noisy, run.first + run.lower, a) - span + 1
    needed = np.maximum(run.first, lowest), np.where(noisy, run.first + run.clean, b)
    lowest = np.where(noisy, run.first + run.upper, b) - span
    shared = np.maximum(run.first, lowest), np.where(noisy, run.first + run.lower, a + 1)
    end = np.where(needed[0] < needed[1], -(-needed[1] // TILE), 0)
    table = _sums(count, row, needed[0] // TILE, end, 1) > 0
    table |= _sums(count, row[noisy], run.start[noisy] // TILE, -(-b[noisy] // TILE), 1) > 0
    # A tile is full if the pieces that see all of it have all its rows between them.
    full = _sums(count, row, -(-shared[0] // TILE), shared[1] // TILE, b - a) == TILE
    padding = np.arange(sum(layout.doc_lengths) // TILE, count)
    table[padding, padding] = True
    return TileTable(table & ~full, full)


def _runs(layout: Layout) -> _Runs:
    rows: list[tuple[int, int, int, int, int, int]] = []
    pieces = layout.pieces if layout.pieces is not None else [(length, []) for length in layout.doc_lengths]
    first = 0
    for length, groups in pieces:
        row = first + length
        rows.append((first, row, first, -1, 0, 0))
        for group in groups:
            upper = min(length, group.clean + group.length)
            rows.append((row, row + group.length, first, group.lower, group.clean, upper))
            row += group.length
        first = row
    columns = np.array(rows, dtype=np.int64).reshape(-1, 6)
    return _Runs(*columns[columns[:, 0] < columns[:, 1]].T)


def _sums(count: int, row: np.ndarray, start: np.ndarray, end: np.ndarray, value: np.ndarray | int) -> np.ndarray:
    """[count, count] sums of ``value`` over the intervals ``start`` to ``end`` of the rows; empty ones add nothing."""
    end = np.maximum(start, end)
    differences = np.zeros((count, count + 1), dtype=np.int64)
    np.add.at(differences, (row, start), value)
    np.add.at(differences, (row, end), -np.asarray(value))
    return np.cumsum(differences, axis=1)[:, :count]
