"""Objectives as data: what each asks of token rows, how it collates them, what its parts weigh, and what it measures.

A new objective is a class here; ``SFTTrainer.compute_loss`` stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from hf_sft.arguments import DataArguments, DPOArguments, WeDLMArguments
from hf_sft.collators import RATIOS, Batch, CausalCollator, PairCollator, WeDLMCollator, WeDLMEvalCollator
from hf_sft.data.rows import RowRules
from hf_sft.metrics import PairTotals, TokenTotals
from hf_sft.noise import MaskRule
from hf_sft.preference_losses import PairLoss

Collator = Callable[[Any], Batch]
_EVALUATION_SEED = 0  # fixed: measurements of two runs differ by their models alone


class Objective(Protocol):
    """What the Trainer needs of an objective."""

    @property
    def coefficients(self) -> tuple[float, float]:
        """c of each kind of target in the loss: next token, mask slot."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads of token rows beside ``input_ids`` and ``labels``: whole numbers."""

    @property
    def kinds(self) -> int:
        """K, the kinds of targets that evaluation tells apart; those from 2 on are measured and not learned."""

    def row_rules(self, *, evaluation: bool) -> RowRules:
        """What it asks of token rows."""

    @property
    def mask_token_id(self) -> int | None:
        """The token at mask slots; None for an objective without them."""

    def collator(self, packed: bool, pad_token_id: int, *, evaluation: bool) -> Collator:
        """From bins of token rows to batches; padded rows are for next tokens alone."""

    def log(self, totals: Any) -> dict[str, float]:
        """What a line of the training log says of its tokens, beside the loss."""

    def metrics(self, totals: Any) -> dict[str, float]:
        """What an evaluation says, without a prefix."""


@dataclass(frozen=True)
class Causal:
    """Predict the next token."""

    coefficients: tuple[float, float] = (1.0, 0.0)
    columns: tuple[str, ...] = ()
    kinds: int = 2
    mask_token_id: int | None = None

    def row_rules(self, *, evaluation: bool) -> RowRules:
        return RowRules()

    def collator(self, packed: bool, pad_token_id: int, *, evaluation: bool) -> Collator:
        return CausalCollator(packed, pad_token_id)

    def log(self, totals: TokenTotals) -> dict[str, float]:
        return {"token_accuracy": totals.accuracy(), "supervised_share": totals.supervised_share}

    def metrics(self, totals: TokenTotals) -> dict[str, float]:
        return {
            "loss": totals.loss(self.coefficients),
            "perplexity": totals.perplexity(),
            "token_accuracy": totals.accuracy(),
            "supervised_tokens": int(totals.rows[0]),
        }


@dataclass(frozen=True)
class WeDLM:
    """Recover masked tokens under causal attention, and predict the next token on the clean stream (arXiv 2512.22737).

    loss = 1 / (1 + a) * masked part + a / (1 + a) * next-token part, with a = ``ar_loss_weight``, 0 without ``enable_ar_loss``.

    Args:
        arguments: as the user wrote them.
        mask_token_id: as ``models.mask_token.resolve_mask_token`` found it.
        seed: of the noise.
        end_tail: end-of-turn tokens behind the last answer of a conversation.
    """

    arguments: WeDLMArguments
    mask_token_id: int
    seed: int
    end_tail: int = 0

    columns = ()
    kinds = WeDLMEvalCollator.kinds

    def row_rules(self, *, evaluation: bool) -> RowRules:
        # What is measured does not depend on how many ends are learned: answers end once.
        return RowRules(0 if evaluation else self.end_tail, self.mask_token_id)

    @cached_property
    def coefficients(self) -> tuple[float, float]:
        a = self.arguments.ar_loss_weight if self.arguments.enable_ar_loss else 0.0
        return a / (1 + a), 1 / (1 + a)

    def collator(self, packed: bool, pad_token_id: int, *, evaluation: bool) -> Collator:
        if not packed:  # functions on logits see the clean stream, one document per row
            return CausalCollator(False, pad_token_id)
        block_size = self.arguments.block_size
        if evaluation:
            return WeDLMEvalCollator(
                self.mask_token_id, MaskRule(block_size), seed=_EVALUATION_SEED, pad_token_id=pad_token_id
            )
        rule = MaskRule(
            block_size,
            self.arguments.mask_sampling,
            self.arguments.loss_weighting_scheme,
            self.arguments.mask_per_block,
        )
        learns_next = self.coefficients[0] > 0
        return WeDLMCollator(self.mask_token_id, rule, self.seed, enable_ar_loss=learns_next, pad_token_id=pad_token_id)

    def log(self, totals: TokenTotals) -> dict[str, float]:
        values = {"masked_loss": totals.part(1), "masked_accuracy": totals.accuracy(1)}
        if self.coefficients[0]:
            values |= {"next_token_loss": totals.part(0), "token_accuracy": totals.accuracy()}
            values |= {"supervised_share": totals.supervised_share}
        return values

    def metrics(self, totals: TokenTotals) -> dict[str, float]:
        if not totals.items[1]:
            return Causal().metrics(totals)  # the clean stream alone was measured
        values = {
            "loss": totals.loss(self.coefficients),
            "perplexity": totals.perplexity(),
            "token_accuracy": totals.accuracy(),
            "supervised_tokens": int(totals.items[1]),
        }
        grid = {ratio: 2 + place for place, ratio in enumerate(RATIOS)}
        losses = {f"masked_loss_at_{ratio}": totals.mean(kind) for ratio, kind in grid.items()}
        accuracies = {f"masked_accuracy_at_{ratio}": totals.accuracy(kind) for ratio, kind in grid.items()}
        values |= {
            "any_order_bound": totals.part(1),
            "masked_loss": _mean(losses),
            "masked_accuracy": _mean(accuracies),
        }
        return values | {name: value for name, value in {**losses, **accuracies}.items() if not math.isnan(value)}


def _mean(values: dict[str, float]) -> float:
    """Over the ratios that were met: few documents have too few blocks for all of them."""
    met = [value for value in values.values() if not math.isnan(value)]
    return sum(met) / len(met) if met else math.nan


@dataclass(frozen=True)
class Preference:
    """Prefer the chosen answers of pairs to the rejected ones (``hf_sft.preference_losses``).

    loss = mean over pairs of their loss + ``auxiliary`` * mean over the tokens of the chosen answers of their nll.

    Args:
        loss: of a pair.
        auxiliary: weight of the second part.
        max_prompt_length, max_answer_length: the last so many tokens of a prompt and the first of an answer are kept.
    """

    loss: PairLoss
    auxiliary: float = 0.0
    max_prompt_length: int | None = None
    max_answer_length: int | None = None

    columns = ("rejected_start",)
    kinds = 2
    mask_token_id = None

    @classmethod
    def of(cls, dpo: DPOArguments) -> Preference:
        """As the arguments say; orpo brings its own auxiliary term of weight 1."""
        loss = PairLoss(
            dpo.dpo_loss_type, dpo.dpo_beta, dpo.label_smoothing, dpo.simpo_gamma, dpo.dpo_length_normalized
        )
        auxiliary = dpo.dpo_sft_weight + (dpo.dpo_loss_type == "orpo")
        return cls(loss, auxiliary, dpo.max_prompt_length, dpo.max_answer_length)

    @property
    def coefficients(self) -> tuple[float, float]:
        return 1.0, self.auxiliary

    def row_rules(self, *, evaluation: bool) -> RowRules:
        return RowRules(max_prompt_length=self.max_prompt_length, max_answer_length=self.max_answer_length)

    def collator(self, packed: bool, pad_token_id: int, *, evaluation: bool) -> Collator:
        return PairCollator(packed, pad_token_id)

    def log(self, totals: PairTotals) -> dict[str, float]:
        values = {
            "rewards/chosen": totals.mean("chosen_reward"),
            "rewards/rejected": totals.mean("rejected_reward"),
            "rewards/accuracies": totals.mean("preferred"),
            "logps/chosen": totals.mean("chosen_logp"),
            "logps/rejected": totals.mean("rejected_logp"),
        }
        values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
        if self.auxiliary:
            values["chosen_loss"] = totals.chosen_nll / totals.chosen_tokens if totals.chosen_tokens else math.nan
        return values

    def metrics(self, totals: PairTotals) -> dict[str, float]:
        low, high = totals.accuracy_interval()
        return {
            "loss": totals.loss(self.coefficients),
            **self.log(totals),
            "rewards/accuracies_low": low,
            "rewards/accuracies_high": high,
            "pairs": int(totals.pairs),
        }


def build_objective(
    data: DataArguments,
    wedlm: WeDLMArguments,
    *,
    mask_token_id: int | None,
    seed: int,
    dpo: DPOArguments | None = None,
) -> Objective:
    """The objective of ``data.objective``; for ``task_type`` dpo that of ``dpo``.

    Raises:
        ValueError: an unknown objective, or wedlm without a mask token.
    """
    if data.task_type == "dpo":
        return Preference.of(dpo or DPOArguments())
    if data.objective == "causal":
        return Causal()
    if data.objective != "wedlm":
        raise ValueError(f"objective is {data.objective!r}; choose causal or wedlm")
    if mask_token_id is None:
        raise ValueError("objective is wedlm, and no mask token is known: set mask_token or mask_token_id")
    has_end = data.task_type == "sft" and data.train_on != "all"
    return WeDLM(wedlm, mask_token_id, seed, wedlm.num_learnable_im_end if has_end else 0)
