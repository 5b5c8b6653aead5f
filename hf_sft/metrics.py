"""Sums over tokens, kept on the device and divided once: the same however a data set is cut into batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sft.losses import RowScores

_FIELDS = ("weighted_nll", "nll", "correct", "rows", "items")


@dataclass(frozen=True)
class TokenTotals:
    """Plain sums per kind of target (0 next token, 1 mask slot, others measured in evaluation alone) and over all tokens.

    Attributes:
        weighted_nll: sum of weight * nll per kind, in nats.
        nll: sum of nll per kind, in nats.
        correct: targets with the largest logit, per kind.
        rows: scored rows per kind.
        items: N per kind, by which the loss is divided.
        tokens: tokens that went through the model, padding and noisy streams not counted.
    """

    weighted_nll: list[float]
    nll: list[float]
    correct: list[float]
    rows: list[float]
    items: list[float]
    tokens: float

    def loss(self, coefficients: Sequence[float]) -> float:
        """``sum over kinds of c_kind * sum_i weight_i * nll_i / N_kind``; a kind that counts nothing adds nothing."""
        return sum(c * self.part(kind) for kind, c in enumerate(coefficients) if c and self.items[kind])

    def part(self, kind: int) -> float:
        """``sum_i weight_i * nll_i / N`` of one kind; NaN without items."""
        return self.weighted_nll[kind] / self.items[kind] if self.items[kind] else math.nan

    def mean(self, kind: int = 0) -> float:
        """``sum_i nll_i / rows``, without weights; NaN without rows."""
        return self.nll[kind] / self.rows[kind] if self.rows[kind] else math.nan

    def accuracy(self, kind: int = 0) -> float:
        """Share of rows whose target has the largest logit; NaN without rows."""
        return self.correct[kind] / self.rows[kind] if self.rows[kind] else math.nan

    def perplexity(self, kind: int = 0) -> float:
        """``exp(sum_i nll_i / N)``: of the mean over tokens, not a mean of exponentials. inf where it overflows."""
        mean = self.mean(kind)
        return math.exp(mean) if not mean > 700 else math.inf

    @property
    def supervised_share(self) -> float:
        """Next-token rows per token; NaN without tokens."""
        return self.rows[0] / self.tokens if self.tokens else math.nan


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type of sums over tokens: float64 keeps counts exact beyond 2**24 rows; MPS has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class TokenSums:
    """Accumulates what batches score, without waiting for the device.

    Args:
        kinds: K, how many kinds of targets are told apart.
    """

    def __init__(self, device: torch.device, kinds: int = 2) -> None:
        self._sums = torch.zeros(kinds, len(_FIELDS), dtype=sum_dtype(device), device=device)
        self._tokens = 0

    def add(self, scores: RowScores, weight_R: Tensor, kind_R: Tensor, items_K: Tensor, tokens: int) -> None:
        """Add one batch: its row scores, weights [R] and kinds [R], its N per kind [up to K], and the number of its tokens."""
        nll = scores.nll.to(self._sums.dtype)
        columns = [weight_R * nll, nll, scores.correct.to(nll.dtype), torch.ones_like(nll)]
        self._sums[:, :4].index_add_(0, kind_R, torch.stack(columns, dim=1).to(nll.dtype))
        self._sums[: len(items_K), 4] += items_K
        self._tokens += tokens

    def state(self) -> Tensor:
        """[5 K + 1] the sums as one tensor, to be added up over ranks."""
        tokens = torch.tensor([self._tokens], dtype=self._sums.dtype, device=self._sums.device)
        return torch.cat([self._sums.flatten(), tokens])

    def load(self, state: Tensor) -> None:
        """Go on from a ``state``."""
        self._sums = state[:-1].to(self._sums).reshape(self._sums.shape).clone()
        self._tokens = int(state[-1])

    @staticmethod
    def totals(state: Tensor) -> TokenTotals:
        """Read a ``state`` (waits for the device)."""
        *values, tokens = state.tolist()
        width = len(_FIELDS)
        return TokenTotals(**{name: values[i::width] for i, name in enumerate(_FIELDS)}, tokens=tokens)
