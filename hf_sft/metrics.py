"""Sums over tokens or pairs, kept on the device and divided once: the same however a data set is cut into batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

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
        router_loss: mean load-balancing loss per micro-batch; None without one.
    """

    weighted_nll: list[float]
    nll: list[float]
    correct: list[float]
    rows: list[float]
    items: list[float]
    tokens: float
    router_loss: float | None = None

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


def evaluated(history: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """step -> the last value of ``metric`` in an evaluation there. Lines of answers alone, between evaluations, do not count.

    Args:
        history: lines of the log, each with a ``step``.
        metric: with or without ``eval_`` before it.
    """
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    return {line["step"]: line[name] for line in history if name in line and any(map(_is_runtime, line))}


def _is_runtime(key: str) -> bool:
    return key.startswith("eval_") and key.endswith("_runtime")


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type of sums over tokens: float64 keeps counts exact beyond 2**24 rows; MPS has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Sums:
    """Sums on the device: ``_sums``, of any shape, and beside them tokens and router losses. Nothing waits for the device."""

    def __init__(self, device: torch.device, shape: tuple[int, ...]) -> None:
        self._sums = torch.zeros(shape, dtype=sum_dtype(device), device=device)
        self._router = torch.zeros(2, dtype=self._sums.dtype, device=device)  # sum of losses, their number
        self._tokens = 0

    def add_router_loss(self, loss: Tensor) -> None:
        """Count the load-balancing loss [] of one micro-batch."""
        self._router += torch.stack([loss.detach(), torch.ones_like(loss)]).to(self._router)

    def state(self) -> Tensor:
        """[N + 3] the sums as one tensor, to be added up over ranks."""
        tokens = torch.tensor([self._tokens], dtype=self._sums.dtype, device=self._sums.device)
        return torch.cat([self._sums.flatten(), self._router, tokens])

    def load(self, state: Tensor) -> None:
        """Go on from a ``state``."""
        self._sums = state[:-3].to(self._sums).reshape(self._sums.shape).clone()
        self._router = state[-3:-1].to(self._router).clone()
        self._tokens = int(state[-1])


def _router_mean(total: float, count: float) -> float | None:
    return total / count if count else None


class TokenSums(_Sums):
    """Accumulates what batches score.

    Args:
        kinds: K, how many kinds of targets are told apart.
    """

    def __init__(self, device: torch.device, kinds: int = 2) -> None:
        super().__init__(device, (kinds, len(_FIELDS)))

    def add(self, scores: RowScores, weight_R: Tensor, kind_R: Tensor, items_K: Tensor, tokens: int) -> None:
        """Add one batch: its row scores, weights [R] and kinds [R], its N per kind [up to K], and the number of its tokens."""
        nll = scores.nll.to(self._sums.dtype)
        columns = [weight_R * nll, nll, scores.correct.to(nll.dtype), torch.ones_like(nll)]
        self._sums[:, :4].index_add_(0, kind_R, torch.stack(columns, dim=1).to(nll.dtype))
        self._sums[: len(items_K), 4] += items_K
        self._tokens += tokens

    @staticmethod
    def totals(state: Tensor) -> TokenTotals:
        """Read a ``state`` (waits for the device)."""
        *values, router, batches, tokens = state.tolist()
        width = len(_FIELDS)
        columns = {name: values[i::width] for i, name in enumerate(_FIELDS)}
        return TokenTotals(**columns, tokens=tokens, router_loss=_router_mean(router, batches))


@dataclass(frozen=True)
class PairTotals:
    """Plain sums over preference pairs.

    Attributes:
        loss_sum: of the pairs, without the auxiliary term.
        pairs: their number.
        chosen_reward, rejected_reward: see ``hf_sft.preference_losses``.
        preferred: pairs whose chosen answer has the larger reward; a tie counts half.
        chosen_logp, rejected_logp: log-probabilities of the answers, in nats.
        chosen_nll, chosen_tokens: over the tokens of the chosen answers.
        tokens: that went through the model, padding not counted.
        router_loss: mean load-balancing loss per micro-batch; None without one.
    """

    loss_sum: float
    pairs: float
    chosen_reward: float
    rejected_reward: float
    preferred: float
    chosen_logp: float
    rejected_logp: float
    chosen_nll: float
    chosen_tokens: float
    tokens: float
    router_loss: float | None = None

    def loss(self, coefficients: Sequence[float]) -> float:
        """``c_0 * mean loss of a pair + c_1 * mean nll of a chosen token``."""
        auxiliary = coefficients[1] * self.chosen_nll / self.chosen_tokens if self.chosen_tokens else 0.0
        return coefficients[0] * self.mean("loss_sum") + auxiliary

    def mean(self, name: str) -> float:
        """Per pair; NaN without pairs."""
        return getattr(self, name) / self.pairs if self.pairs else math.nan

    def accuracy_interval(self, z: float = 1.959964) -> tuple[float, float]:
        """Wilson's interval of the accuracy (E. B. Wilson, JASA 22, 1927), by default for 95 %."""
        if not self.pairs:
            return math.nan, math.nan
        n, share = self.pairs, self.preferred / self.pairs
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return middle - half, middle + half


class PairSums(_Sums):
    """Accumulates what pairs score.

    Attributes:
        names: of the sums; those of ``PairTotals`` that are over pairs.
    """

    names = tuple(entry.name for entry in fields(PairTotals))[:-2]

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, (len(self.names),))

    def add(self, values: dict[str, Tensor], tokens: int) -> None:
        """Add one batch: the sum over its pairs [] for each of the names of ``PairTotals``, and the number of its tokens."""
        self._sums += torch.stack([values[name].to(self._sums.dtype) for name in self.names])
        self._tokens += tokens

    @staticmethod
    def totals(state: Tensor) -> PairTotals:
        """Read a ``state`` (waits for the device)."""
        *values, router, batches, tokens = state.tolist()
        named = dict(zip(PairSums.names, values, strict=True))
        return PairTotals(**named, tokens=tokens, router_loss=_router_mean(router, batches))
