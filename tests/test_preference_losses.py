"""Losses of preference pairs against their formulas, written out, and against TRL's functions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid

from hf_sft.metrics import PairSums, PairTotals
from hf_sft.preference_losses import PairLoss

CHOSEN, REJECTED = [-30.0, -12.5, -44.0, -3.0], [-31.0, -40.0, -10.0, -3.5]
REFERENCE_CHOSEN, REFERENCE_REJECTED = [-33.0, -11.0, -41.0, -4.0], [-29.0, -38.0, -13.0, -2.5]
LENGTHS_CHOSEN, LENGTHS_REJECTED = [10, 5, 20, 1], [12, 9, 4, 2]


def both(chosen: list[float], rejected: list[float]) -> torch.Tensor:
    return torch.tensor([chosen, rejected], dtype=torch.float64).T.reshape(-1)


LOGPS, REFERENCE = both(CHOSEN, REJECTED), both(REFERENCE_CHOSEN, REFERENCE_REJECTED)
TOKENS = both(LENGTHS_CHOSEN, LENGTHS_REJECTED)


def plain(kind: str, b: float, e: float, g: float, mean: bool) -> list[float]:
    """The formulas of the papers, pair by pair, with math alone."""
    found = []
    for n in range(len(CHOSEN)):
        w, lo = (1 / LENGTHS_CHOSEN[n], 1 / LENGTHS_REJECTED[n]) if mean else (1, 1)
        s_w, s_l, r_w, r_l = CHOSEN[n] * w, REJECTED[n] * lo, REFERENCE_CHOSEN[n] * w, REFERENCE_REJECTED[n] * lo
        h = (s_w - r_w) - (s_l - r_l)

        def log_sigmoid(x: float) -> float:
            return -math.log1p(math.exp(-x))

        if kind == "sigmoid":
            found.append(-(1 - e) * log_sigmoid(b * h) - e * log_sigmoid(-b * h))
        elif kind == "robust":
            found.append((-(1 - e) * log_sigmoid(b * h) + e * log_sigmoid(-b * h)) / (1 - 2 * e))
        elif kind == "hinge":
            found.append(max(0.0, 1 - b * h))
        elif kind == "ipo":
            found.append((h - 1 / (2 * b)) ** 2)
        elif kind == "simpo":
            x = b * (s_w - s_l) - g
            found.append(-(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x))
        else:
            odds = [s - math.log(1 - math.exp(s)) for s in (s_w, s_l)]
            found.append(-b * log_sigmoid(odds[0] - odds[1]))
    return found


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(
    ("kind", "smoothing", "normalized"),
    [
        ("sigmoid", 0.0, False), ("sigmoid", 0.2, False), ("sigmoid", 0.2, True), ("robust", 0.1, False),
        ("hinge", 0.0, False), ("hinge", 0.0, True), ("ipo", 0.0, True), ("simpo", 0.0, True), ("simpo", 0.1, True),
        ("orpo", 0.0, True),
    ],
)  # fmt: skip
def test_formulas(kind, smoothing, normalized, beta) -> None:
    loss = PairLoss(kind, beta, smoothing, gamma=0.3, length_normalized=normalized)
    rewards = loss.rewards(LOGPS, REFERENCE if loss.needs_reference else None, TOKENS)
    expected = plain(kind, beta, smoothing, 0.3, normalized)
    torch.testing.assert_close(
        loss.losses(rewards), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["ipo", "orpo", "simpo"])
def test_losses_of_means_are_so_without_being_asked(kind) -> None:
    reference = None if kind != "ipo" else REFERENCE
    found = [PairLoss(kind, length_normalized=flag).rewards(LOGPS, reference, TOKENS) for flag in (False, True)]
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo", "orpo", "simpo"])
def test_gradients(kind) -> None:
    """Against finite differences, in float64."""
    loss = PairLoss(kind, 0.3, 0.1 if kind in ("sigmoid", "robust", "simpo") else 0.0)
    reference = REFERENCE if loss.needs_reference else None
    assert torch.autograd.gradcheck(
        lambda logps: loss.losses(loss.rewards(logps, reference, TOKENS)), LOGPS.clone().requires_grad_()
    )


def test_a_certain_model_has_finite_odds() -> None:
    logps = torch.tensor([0.0, -1e-30, -800.0, -1e-3], dtype=torch.float64, requires_grad=True)
    loss = PairLoss("orpo").losses(PairLoss("orpo").rewards(logps, None, torch.ones(4))).sum()
    loss.backward()
    assert loss.isfinite() and logps.grad is not None and logps.grad.isfinite().all()


def test_trl_has_the_same_orpo_and_simpo() -> None:
    """TRL's functions take mean log-probabilities for both."""
    orpo = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    cpo = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    means = (LOGPS / TOKENS).view(-1, 2)
    trainer = SimpleNamespace(
        beta=0.4, simpo_gamma=0.3, label_smoothing=0.1, loss_type="simpo", accelerator=SimpleNamespace(device="cpu"),
        is_peft_model=False, cpo_alpha=0.0, alpha=0.0,
    )  # fmt: skip
    theirs = cpo.cpo_loss(trainer, means[:, 0], means[:, 1])[0]
    ours = PairLoss("simpo", 0.4, 0.1, gamma=0.3)
    torch.testing.assert_close(ours.losses(ours.rewards(LOGPS, None, TOKENS)), theirs, rtol=1e-12, atol=1e-12)
    theirs = orpo.odds_ratio_loss(trainer, means[:, 0], means[:, 1])[0]  # what is added to the mean loss
    ours = PairLoss("orpo", 0.4)
    found = -ours.losses(ours.rewards(LOGPS, None, TOKENS))
    torch.testing.assert_close(found, theirs.double(), rtol=1e-6, atol=1e-6)  # float32 there


def test_the_interval_is_wilsons() -> None:
    """The hand calculation of 81 of 263 (Newcombe, Statistics in Medicine 17, 1998, table I: 0.2553 to 0.3662)."""
    totals = PairTotals(0, 263, 0, 0, 81, 0, 0, 0, 0, 0)
    assert totals.accuracy_interval() == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert all(map(math.isnan, PairTotals(0, 0, 0, 0, 0, 0, 0, 0, 0, 0).accuracy_interval()))


def test_sums_add_up() -> None:
    sums, again = PairSums(torch.device("cpu")), PairSums(torch.device("cpu"))
    for factor in (1.0, 2.0):
        values = {name: torch.tensor(factor * (n + 1.0)) for n, name in enumerate(PairSums.names)}
        sums.add(values, tokens=7)
    sums.add_router_loss(torch.tensor(0.5))
    again.load(sums.state())
    totals = again.totals(again.state())
    assert totals.loss_sum == 3 and totals.pairs == 6 and totals.tokens == 14 and totals.router_loss == 0.5
    assert totals.loss((1.0, 0.5)) == pytest.approx(3 / 6 + 0.5 * 24 / 27)
    assert torch.equal(again.state(), sums.state())


def test_the_log_of_a_sigmoid_does_not_overflow() -> None:
    far = torch.tensor([-1e4, 0.0, 1e4, 0.0], dtype=torch.float64)
    losses = PairLoss("sigmoid", 1.0).losses(PairLoss("sigmoid", 1.0).rewards(far, torch.zeros(4), torch.ones(4)))
    assert losses.tolist() == [1e4, -logsigmoid(torch.tensor(1e4)).item()]
