"""Sums over tokens, kept on the device and divided once: the same however a data set is cut into batches and ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sft.losses import RowScores

_FIELDS = ("weighted_nll", "nll", "correct", "rows")


@dataclass(frozen=True)
class TokenTotals:
    """Plain sums per kind of target (0 next token, 1 mask slot) and over all tokens.

    Attributes:
        weighted_nll: sum of weight * nll per kind, in nats.
        nll: sum of nll per kind, in nats.
        correct: targets with the largest logit, per kind.
        rows: scored rows per kind.
        tokens: tokens that went through the model, padding not counted.
    """

    weighted_nll: list[float]
    nll: list[float]
    correct: list[float]
    rows: list[float]
    tokens: float

    def loss(self, coefficients: tuple[float, float] = (1.0, 1.0)) -> float:
        """``sum over kinds of c_kind * sum_i weight_i * nll_i / N_kind``; a kind without rows adds nothing."""
        parts = zip(coefficients, self.weighted_nll, self.rows, strict=True)
        return sum(c * total / count for c, total, count in parts if count)

    def accuracy(self, kind: int = 0) -> float:
        """Share of rows whose target has the largest logit; NaN without rows."""
        return self.correct[kind] / self.rows[kind] if self.rows[kind] else math.nan

    def perplexity(self, kind: int = 0) -> float:
        """``exp(sum_i nll_i / N)``: of the mean over tokens, not a mean of exponentials. inf where it overflows."""
        mean = self.nll[kind] / self.rows[kind] if self.rows[kind] else math.nan
        return math.exp(mean) if not mean > 700 else math.inf

    @property
    def supervised_share(self) -> float:
        """Scored rows per token; NaN without tokens."""
        return sum(self.rows) / self.tokens if self.tokens else math.nan


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type of sums over tokens: float64 keeps counts exact beyond 2**24 rows; MPS has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class TokenSums:
    """Accumulates what batches score, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, len(_FIELDS), dtype=sum_dtype(device), device=device)
        self._tokens = 0

    def add(self, scores: RowScores, weight_R: Tensor, kind_R: Tensor, tokens: int) -> None:
        """Add one batch: its row scores, weights [R] and kinds [R], and the number of its tokens."""
        nll = scores.nll.to(self._sums.dtype)
        columns = [weight_R * nll, nll, scores.correct.to(nll.dtype), torch.ones_like(nll)]
        self._sums.index_add_(0, kind_R, torch.stack(columns, dim=1).to(nll.dtype))
        self._tokens += tokens

    def state(self) -> Tensor:
        """[9] the sums as one tensor, to be added up over ranks."""
        tokens = torch.tensor([self._tokens], dtype=self._sums.dtype, device=self._sums.device)
        return torch.cat([self._sums.flatten(), tokens])

    @staticmethod
    def totals(state: Tensor) -> TokenTotals:
        """Read a ``state`` (waits for the device)."""
        values = state.tolist()
        per_kind = {name: [values[i], values[len(_FIELDS) + i]] for i, name in enumerate(_FIELDS)}
        return TokenTotals(**per_kind, tokens=values[-1])
