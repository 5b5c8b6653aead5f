"""One rule for packed attention, as a predicate over integers; every backend is a lowering of it.

Shapes: T tokens of a packed row, D documents, q and k positions in the row.

Three documents of 3, 2 and 4 tokens in one row (x: query may see key)::

    q\\k  0 0 0 1 1 2 2 2 2
    0    x . . . . . . . .
    0    x x . . . . . . .
    0    x x x . . . . . .
    1    . . . x . . . . .
    1    . . . x x . . . .
    2    . . . . . x . . .
    2    . . . . . x x . .
    2    . . . . . x x x .
    2    . . . . . x x x x

One document of 4 tokens in blocks of 2 for WeDLM, clean stream and elided noisy stream (positions 1 and 2 are masked)::

    q\\k  0 1 2 3 | 1 3 2
    0    x . . . . . .
    1    x x . . . . .
    2    x x x . . . .
    3    x x x x . . .
    1    x . . . x . .
    3    x x . . . x .
    2    x x . . . x x
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Group(NamedTuple):
    """Consecutive blocks of a document's noisy stream that a backend handles together.

    Attributes:
        length: tokens of the group.
        clean: largest anchor among them: the clean tokens that the group can see.
        lower: smallest anchor among them. A block's tokens are those from its anchor to its end, so that all positions of the
            group lie between ``lower`` and ``clean + length``.
    """

    length: int
    clean: int
    lower: int

    def first(self, window: int | None) -> int:
        """The first clean position that the group can see: a sliding window ends before its smallest anchor."""
        return 0 if window is None else max(0, self.lower + 1 - window)


@dataclass(frozen=True)
class Layout:
    """The integers of one packed row.

    Attributes:
        doc: [T] int, document of each token.
        pos: [T] int, logical position of each token, from 0 in each document.
        doc_lengths: D lengths that sum to T, on the host: backends that cut the row must not wait for the device.
        block: [T] int, WeDLM's block of each token of a noisy stream, -1 in clean streams; None: there are clean streams only.
        pieces: for each document, its clean length and the groups of blocks of its noisy stream, on the host; see ``Group``.
        limit: [T] int, clean tokens are seen at positions below it: pos + 1 in clean streams, the block's anchor in noisy ones.
        tiles: for each sliding window (None: without one), lists of tiles as ``tiles.tile_lists`` makes them.
    """

    doc: Tensor
    pos: Tensor
    doc_lengths: list[int]
    block: Tensor | None = None
    limit: Tensor | None = None
    pieces: list[tuple[int, list[Group]]] | None = None
    tiles: Mapping[int | None, Tensor] | None = None

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> Layout:
        """Read the layout keys of a packed batch: ``doc_ids``, ``position_ids`` [1, T] and ``doc_lengths``; with noisy streams
        ``block_ids``, ``limits`` [1, T] and ``doc_pieces`` as well; ``tile_lists``, if a worker has made them."""
        more: dict[str, Any] = {"tiles": batch.get("tile_lists")}
        if "block_ids" in batch:
            more |= {"block": batch["block_ids"][0], "limit": batch["limits"][0], "pieces": batch["doc_pieces"]}
        return cls(batch["doc_ids"][0], batch["position_ids"][0], batch["doc_lengths"], **more)

    def allowed(self, window: int | None = None) -> Tensor:
        """[T, T] bool, ``allowed[q, k]``: may query q see key k?

        doc[q] == doc[k]  and  k <= q                                      with clean streams only; with noisy ones
        doc[q] == doc[k]  and  ( pos[k] < limit[q]                         if k is in the clean stream
                               | block[q] == block[k] and k <= q )         if k is in the noisy stream
        and, in a layer with a sliding window,  pos[q] - pos[k] < window
        """
        row = torch.arange(len(self.doc), device=self.doc.device)
        behind = row[None, :] <= row[:, None]
        if self.block is None or self.limit is None:
            seen = behind
        else:
            in_block = (self.block[:, None] == self.block[None, :]) & behind
            seen = torch.where(self.block[None, :] < 0, self.pos[None, :] < self.limit[:, None], in_block)
        mask = (self.doc[:, None] == self.doc[None, :]) & seen
        if window is not None:
            mask &= self.pos[:, None] - self.pos[None, :] < window
        return mask

    def group_mask(self, start: int, row: int, group: Group, window: int | None = None) -> Tensor:
        """[S, clean - first + S] bool, ``allowed`` for the S queries of a group: the document's clean tokens from the first that
        the group can see (``Group.first``), then the group.

        The document begins at row ``start``, the group at ``row``. The mask is kept: every layer asks for it again.
        """
        return self.kept(("group", row, window), lambda: self._group_mask(start, row, group, window))

    def _group_mask(self, start: int, row: int, group: Group, window: int | None) -> Tensor:
        assert self.block is not None and self.limit is not None, "groups belong to noisy streams"
        own = slice(row, row + group.length)
        block, order = self.block[own], torch.arange(group.length, device=self.pos.device)
        seen = self.pos[start + group.first(window) : start + group.clean]
        clean = seen[None, :] < self.limit[own][:, None]
        noisy = (block[:, None] == block[None, :]) & (order[None, :] <= order[:, None])
        mask = torch.cat([clean, noisy], dim=1)
        if window is not None:
            keys = torch.cat([seen, self.pos[own]])
            mask &= self.pos[own][:, None] - keys[None, :] < window
        return mask

    def kept(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """``make()``, called once per layout and ``key``: every layer of a forward asks for the same things again."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @cached_property
    def _made(self) -> dict[Hashable, Any]:
        return {}


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """[L, L] bool mask of one document: the rule of ``Layout.allowed`` with D = 1."""
    pos = torch.arange(length, device=device)
    mask = pos[None, :] <= pos[:, None]
    if window is not None:
        mask &= pos[:, None] - pos[None, :] < window
    return mask


def draw(allowed: Tensor) -> str:
    """The o/x picture of a mask: one line per query, ``x`` where it may see the key."""
    return "\n".join(" ".join("x" if cell else "." for cell in row) for row in allowed.tolist())
