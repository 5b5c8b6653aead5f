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
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The integers of one packed row.

    Attributes:
        doc: [T] int, document of each token.
        pos: [T] int, logical position of each token, from 0 in each document.
        doc_lengths: D lengths that sum to T, on the host: backends that cut the row must not wait for the device.
    """

    doc: Tensor
    pos: Tensor
    doc_lengths: list[int]

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> Layout:
        """Read the layout keys of a packed batch (``doc_ids`` [1, T], ``position_ids`` [1, T], ``doc_lengths``)."""
        return cls(batch["doc_ids"][0], batch["position_ids"][0], batch["doc_lengths"])

    def allowed(self, window: int | None = None) -> Tensor:
        """[T, T] bool, ``allowed[q, k]``: may query q see key k?

        doc[q] == doc[k]  and  k <= q  and, in a layer with a sliding window,  pos[q] - pos[k] < window
        """
        row = torch.arange(len(self.doc), device=self.doc.device)
        mask = (self.doc[:, None] == self.doc[None, :]) & (row[None, :] <= row[:, None])
        if window is not None:
            mask &= self.pos[:, None] - self.pos[None, :] < window
        return mask


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
