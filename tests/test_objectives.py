"""Objectives from arguments: what collators draw, what the parts weigh, what rows get, what evaluation says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hf_sft.arguments import DataArguments, WeDLMArguments
from hf_sft.collators import RATIOS, CausalCollator, WeDLMCollator, WeDLMEvalCollator
from hf_sft.metrics import TokenTotals
from hf_sft.noise import MaskRule
from hf_sft.objectives import Causal, WeDLM, build_objective

MASK_ID, SEED, PAD = 258, 11, 257


def wedlm(seed: int = SEED, data: dict[str, Any] | None = None, **options: Any) -> WeDLM:
    made = build_objective(
        DataArguments(objective="wedlm", **(data or {})), WeDLMArguments(**options), mask_token_id=MASK_ID, seed=seed
    )
    assert isinstance(made, WeDLM)
    return made


def bins() -> list[list[dict[str, Any]]]:
    ids = [np.random.default_rng(n).integers(0, 255, length) for n, length in enumerate((60, 25, 9))]
    rows = [{"input_ids": i, "labels": np.where(np.arange(len(i)) < 5, -100, i)} for i in ids]
    return [[{**row, "document": 4 + number, "epoch": 1} for number, row in enumerate(rows)]]


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    plain = [
        {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in (first, second)
    ]
    return plain[0] == plain[1]


# ---- training ----

CHOICES = [
    dict(),
    dict(block_size=16, mask_sampling="reference"),
    dict(block_size=4, loss_weighting_scheme="uniform"),
    dict(block_size=8, mask_per_block=False),
    dict(block_size=8, mask_sampling="reference", loss_weighting_scheme="uniform", mask_per_block=False),
]


@pytest.mark.parametrize("options", CHOICES)
def test_the_training_collator_is_the_arguments(options: dict) -> None:
    arguments = WeDLMArguments(**options)
    rule = MaskRule(
        arguments.block_size, arguments.mask_sampling, arguments.loss_weighting_scheme, arguments.mask_per_block
    )
    for seed in (SEED, 0):
        got = wedlm(seed, **options).collator(True, PAD, evaluation=False)
        assert type(got) is WeDLMCollator
        assert got == WeDLMCollator(MASK_ID, rule, seed, enable_ar_loss=True, elide=True, pad_token_id=PAD)


def test_the_defaults_are_the_papers() -> None:
    got = wedlm().collator(True, PAD, evaluation=False)
    assert got.rule == MaskRule(32, "elbo", "weighted", True)
    assert wedlm().coefficients == (0.5, 0.5)


@pytest.mark.parametrize("a", [1.0, 0.5, 3.0, 0.01])
def test_the_parts_weigh_a_and_1_over_1_plus_a(a: float) -> None:
    assert wedlm(ar_loss_weight=a).coefficients == (a / (1 + a), 1 / (1 + a))
    assert wedlm(ar_loss_weight=a).collator(True, PAD, evaluation=False).enable_ar_loss is True


@pytest.mark.parametrize("off", [dict(ar_loss_weight=0.0), dict(enable_ar_loss=False, ar_loss_weight=2.0)])
def test_without_the_next_token_loss_no_such_row_is_scored(off: dict) -> None:
    objective = wedlm(**off)
    assert objective.coefficients == (0, 1)
    batch = objective.collator(True, PAD, evaluation=False)(bins())
    assert (batch["target_kind"] == 1).all() and batch["num_items"][0] == 0
    totals = totals_of({1: (6.0, 9.0)})
    assert objective.log(totals).keys() == {"masked_loss", "masked_accuracy"}
    assert wedlm().log(totals_of({0: (1.0, 2.0), 1: (6.0, 9.0)})).keys() == {
        "masked_loss", "masked_accuracy", "next_token_loss", "token_accuracy", "supervised_share",
    }  # fmt: skip


# ---- evaluation ----


@pytest.mark.parametrize("options", [*CHOICES, dict(enable_ar_loss=False), dict(ar_loss_weight=0.0)])
def test_evaluation_measures_the_same_whatever_is_trained(options: dict) -> None:
    size = options.get("block_size", 32)
    want = wedlm(seed=0, block_size=size).collator(True, PAD, evaluation=True)
    batch = want(bins())
    for seed in (0, 1, 99):
        got = wedlm(seed, **options).collator(True, PAD, evaluation=True)
        assert isinstance(got, WeDLMEvalCollator) and got == want
        assert got.rule == MaskRule(size, "elbo", "weighted", True)
        assert got.enable_ar_loss is True and got.mask_token_id == MASK_ID and got.pad_token_id == PAD
        assert same(got(bins()), batch)
    assert set(batch["target_kind"].tolist()) > {0, 1} and batch["num_items"][0] > 0
    later = [[{**row, "epoch": 7} for row in bins()[0]]]  # the same in every epoch
    assert same(want(later), batch)


@pytest.mark.parametrize("evaluation", [True, False])
def test_padded_rows_are_for_next_tokens_alone(evaluation: bool) -> None:
    for objective in (wedlm(enable_ar_loss=False), Causal()):
        assert objective.collator(False, PAD, evaluation=evaluation) == CausalCollator(False, PAD)
    assert Causal().collator(True, PAD, evaluation=evaluation) == CausalCollator(True, PAD)


# ---- token rows ----


@pytest.mark.parametrize(
    "data, tail",
    [
        ({}, 3),
        ({"train_on": "last"}, 3),
        ({"train_on": "all"}, 0),  # every token of a row is learned as it is
        ({"task_type": "pretrain"}, 0),  # texts have no turns that end
        ({"task_type": "pretrain", "train_on": "all"}, 0),
    ],
)
def test_the_tail_of_ends_is_for_answers_in_training(data: dict, tail: int) -> None:
    objective = wedlm(data=data, num_learnable_im_end=3)
    training, evaluation = (objective.row_rules(evaluation=evaluation) for evaluation in (False, True))
    assert (training.end_tail, evaluation.end_tail) == (tail, 0)
    assert training.mask_token_id == evaluation.mask_token_id == objective.mask_token_id == MASK_ID
    assert wedlm(data=data, num_learnable_im_end=0).row_rules(evaluation=False).end_tail == 0


def test_next_tokens_ask_nothing_of_rows() -> None:
    data = DataArguments(objective="causal")
    objective = build_objective(data, WeDLMArguments(), mask_token_id=None, seed=SEED)
    assert objective == Causal() and objective.coefficients == (1, 0)
    for evaluation in (True, False):
        rules = objective.row_rules(evaluation=evaluation)
        assert (rules.end_tail, rules.mask_token_id) == (0, None)


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="objective is 'casual'; choose causal or wedlm"):
        build_objective(DataArguments(objective="casual"), WeDLMArguments(), mask_token_id=MASK_ID, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no mask token is known: set mask_token or mask_token_id"):
        build_objective(DataArguments(objective="wedlm"), WeDLMArguments(), mask_token_id=None, seed=0)


# ---- metrics ----


def totals_of(kinds: dict[int, tuple[float, float]], rows: int = 5) -> TokenTotals:
    """Of each kind that was met: the sum of nll and of weight * nll over ``rows`` rows, of which ``kind % 5`` are correct."""
    columns = {name: [0.0] * WeDLMEvalCollator.kinds for name in ("weighted_nll", "nll", "correct", "rows", "items")}
    for kind, (nll, weighted) in kinds.items():
        values = dict(weighted_nll=weighted, nll=nll, correct=kind % 5, rows=rows, items=rows if kind != 1 else 8)
        for name, value in values.items():
            columns[name][kind] = float(value)
    return TokenTotals(**columns, tokens=20.0)


@pytest.mark.parametrize("a", [1.0, 0.25, 0.0])
def test_without_slots_the_loss_is_the_next_tokens_mean(a: float) -> None:
    """Where functions on logits are evaluated the clean stream alone is run: its loss is not scaled by a / (1 + a)."""
    totals = totals_of({0: (7.0, 7.0)})
    values = wedlm(ar_loss_weight=a).metrics(totals)
    assert values["loss"] == totals.mean() == 7 / 5
    assert values == Causal().metrics(totals) and values["supervised_tokens"] == 5
    assert values["perplexity"] == pytest.approx(math.exp(7 / 5), rel=1e-12)


def test_masked_means_are_over_the_ratios_that_were_met() -> None:
    met = {2: (4.0, 4.0), 5: (10.0, 10.0), 11: (1.0, 1.0)}  # 0.1, 0.4, 1.0
    totals = totals_of({0: (7.0, 7.0), 1: (6.0, 12.0), **met})
    values = wedlm(ar_loss_weight=0.5).metrics(totals)
    want = {
        "loss": 0.5 / 1.5 * 7 / 5 + 1 / 1.5 * 12 / 8,
        "perplexity": math.exp(7 / 5),
        "token_accuracy": 0.0,
        "supervised_tokens": 8,
        "any_order_bound": 12 / 8,
        "masked_loss": (4 + 10 + 1) / 5 / 3,
        "masked_accuracy": (2 + 0 + 1) / 5 / 3,
        "masked_loss_at_0.1": 4 / 5, "masked_loss_at_0.4": 10 / 5, "masked_loss_at_1.0": 1 / 5,
        "masked_accuracy_at_0.1": 2 / 5, "masked_accuracy_at_0.4": 0.0, "masked_accuracy_at_1.0": 1 / 5,
    }  # fmt: skip
    assert values == pytest.approx(want, rel=1e-12)


def test_all_ratios_are_told_when_all_were_met() -> None:
    totals = totals_of({kind: (1.0 + kind, 1.0 + kind) for kind in range(WeDLMEvalCollator.kinds)})
    values = wedlm().metrics(totals)
    losses = [values[f"masked_loss_at_{ratio}"] for ratio in RATIOS]
    assert losses == pytest.approx([(3 + place) / 5 for place in range(10)], rel=1e-12)
    assert values["masked_loss"] == pytest.approx(np.mean(losses), rel=1e-12)


def test_slots_without_a_ratio_that_was_met_have_no_mean() -> None:
    values = wedlm().metrics(totals_of({0: (7.0, 7.0), 1: (6.0, 12.0)}))
    assert math.isnan(values["masked_loss"]) and math.isnan(values["masked_accuracy"])
    assert not any("_at_" in name for name in values)
