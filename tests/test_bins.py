"""How bins are dealt: nothing lost, nothing twice, the same steps on every cut, and equal work for all ranks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft.data.bins import EMPTY, Bins, BinSampler

CUTS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))  # batch, accumulation, world
LENGTHS = st.lists(st.integers(1, 300), max_size=120)


def epoch_of(
    cut: tuple[int, int, int], lengths: list[int], epoch: int = 0, known: bool = True, **options: Any
) -> np.ndarray:
    """[steps, accumulation, world, batch]: what each rank is dealt."""
    batch, accumulation, world = cut
    ranks = []
    for rank in range(world):
        sampler = BinSampler(
            len(lengths), batch, accumulation=accumulation, world=world, rank=rank,
            **{"lengths": lengths if known else None, "seed": 3, **options},
        )  # fmt: skip
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert {each for micro in batches for each, _ in micro} <= {epoch}
        assert "start" in options or len(batches) == len(sampler)
        ranks.append(np.array([[number for _, number in micro] for micro in batches], int).reshape(len(batches), batch))
    assert len({len(rank) for rank in ranks}) == 1  # every rank has the same number of micro-batches
    steps = len(ranks[0]) // accumulation
    return np.stack(ranks, axis=1).reshape(steps, accumulation, world, batch)


def sets(dealt: np.ndarray) -> list[set[int]]:
    return [set(step[step != EMPTY].tolist()) for step in dealt]


@settings(max_examples=150, deadline=None)
@given(CUTS, LENGTHS, st.integers(0, 2), st.booleans())
def test_every_bin_is_seen_once_and_work_is_equal(cut, lengths, epoch, known) -> None:
    dealt = epoch_of(cut, lengths, epoch, known=known)
    assert sorted(dealt[dealt != EMPTY].tolist()) == list(range(len(lengths)))
    counts = (dealt != EMPTY).sum(-1)  # [steps, accumulation, world]
    assert np.all(np.ptp(counts, axis=-1) <= 1)  # in each micro-batch,
    assert np.all(np.ptp(counts.sum(1), axis=-1) <= 1)  # and over each step, the filled-up last one too
    if not known:
        return
    tokens = np.where(dealt == EMPTY, 0, np.array([*lengths, 0])[dealt])
    if cut[1] * cut[2] > 1:
        spread = tokens.max((-2, -1)) - tokens.min((-2, -1)) if tokens.size else np.zeros((0, cut[1]))
        assert np.all(np.ptp(tokens.sum(-1), axis=-1) <= spread)
        assert np.all(tokens.min((-2, -1))[:, :-1] >= tokens.max((-2, -1))[:, 1:])  # long ones with long ones


@settings(max_examples=100, deadline=None)
@given(CUTS, LENGTHS, st.integers(0, 2), st.data())
def test_the_same_bins_share_a_step_on_any_cut(cut, lengths, epoch, data) -> None:
    total = cut[0] * cut[1] * cut[2]
    batch = data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    world = data.draw(st.sampled_from([n for n in range(1, total // batch + 1) if total // batch % n == 0]))
    other = (batch, total // batch // world, world)
    one = epoch_of((total, 1, 1), lengths, epoch)
    assert sets(epoch_of(cut, lengths, epoch)) == sets(epoch_of(other, lengths, epoch)) == sets(one)
    order = np.random.default_rng([3, epoch]).permutation(len(lengths))
    assert one[one != EMPTY].tolist() == order.tolist()  # alone, bins come in the order of the seed


@settings(max_examples=100, deadline=None)
@given(CUTS, LENGTHS, st.data())
def test_a_run_that_goes_on_with_another_batch_sees_the_rest(cut, lengths, data) -> None:
    start = data.draw(st.integers(0, len(lengths)))
    order = np.random.default_rng([3, 1]).permutation(len(lengths))
    rest = epoch_of(cut, lengths, 1, start=start, start_epoch=1)
    assert sorted(rest[rest != EMPTY].tolist()) == sorted(order[start:].tolist())
    size = cut[0] * cut[1] * cut[2]
    assert sets(rest) == [set(order[n : n + size].tolist()) for n in range(start, len(lengths), size)]
    np.testing.assert_array_equal(epoch_of(cut, lengths, 2, start=start, start_epoch=1), epoch_of(cut, lengths, 2))
    whole = BinSampler(len(lengths), cut[0], accumulation=cut[1], world=cut[2])
    assert len(BinSampler(len(lengths), cut[0], accumulation=cut[1], world=cut[2], start=start)) == len(whole)


def test_an_order_that_is_kept_is_that_of_the_file() -> None:
    dealt = epoch_of((2, 1, 3), [5, 1, 9, 2, 7, 3, 8], seed=None, balanced=False)
    assert dealt.ravel().tolist() == [*range(7), *[EMPTY] * 5]
    assert epoch_of((3, 1, 1), [5, 1, 9, 2], seed=None).ravel().tolist() == [0, 1, 2, 3, EMPTY, EMPTY]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="start is 5: of 4 bins"):
        BinSampler(4, 1, start=5)
    with pytest.raises(ValueError, match="3 lengths are given for 4 bins"):
        BinSampler(4, 1, lengths=[1, 2, 3])


def test_fills_are_the_tokens_of_bins() -> None:
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in (9, 3, 4, 1, 6, 2)]
    bins = Bins(rows, 10)
    assert bins.fills.tolist() == [sum(len(row["input_ids"]) for row in bins[0, n]) for n in range(len(bins))]
    assert Bins(rows, None).fills.tolist() == [9, 3, 4, 1, 6, 2]
    assert Bins([], None).fills.tolist() == []


def test_a_million_bins_are_dealt_in_about_a_second() -> None:
    lengths = np.random.default_rng(0).integers(1, 2048, 1_000_000)
    began = time.process_time()
    sampler = BinSampler(len(lengths), 4, accumulation=4, world=8, rank=3, seed=1, lengths=lengths)
    assert sum(len(batch) for batch in sampler) == 4 * len(sampler)
    assert time.process_time() - began < 3  # 0.1 s on an idle core


@pytest.mark.parametrize("accumulation, world", [(1, 2), (1, 8), (4, 2), (4, 8)])
@pytest.mark.parametrize("padded", [True, False])
def test_ranks_wait_less_for_each_other(accumulation: int, world: int, padded: bool) -> None:
    """The slowest rank's tokens over the mean rank's, and the time of all micro-batches: rows x longest row where padded."""
    rng = np.random.default_rng(0)
    documents = np.clip(rng.lognormal(5.2, 0.4, 7473), 30, 512).astype(int)  # as long as those of GSM8K
    lengths = documents if padded else Bins([{"input_ids": range(n)} for n in documents], 512).fills

    def waiting(balanced: bool) -> tuple[float, float]:
        dealt = epoch_of((4, accumulation, world), lengths.tolist(), balanced=balanced)[
            :-1
        ]  # the last step is not full
        tokens = lengths[dealt]  # [steps, accumulation, world, batch]
        work = tokens.max(-1) * 4 if padded else tokens.sum(-1)
        sums = tokens.sum(-1)
        return float((sums.max(-1) / sums.mean(-1)).mean()), float(work.max(-1).sum())

    before, after = waiting(False), waiting(True)
    assert after[0] - 1 < (0.3 if padded else 1) * (before[0] - 1)  # packed bins are almost equal: 1.01, 1.015
    assert after[1] <= before[1] * (1 if accumulation == 1 or not padded else 0.9)
