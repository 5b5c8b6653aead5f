"""Ways of the benchmarks take turns in processes of their own. (New processes import this module: it imports little.)"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import turns


def two_steps(turn: turns.Turn, steps: int, pause: float) -> list[float]:
    for _ in range(steps):
        turn.begin()
        time.sleep(pause)
        turn.end()
    return [pause] * steps


def breaks(turn: turns.Turn, steps: int) -> list[float]:
    turn.begin()
    raise ValueError("no more")


def test_processes_take_turns_and_a_failure_has_its_traceback():
    found = turns.alternate({"short": (two_steps, {"pause": 0.01}), "long": (two_steps, {"pause": 0.05})}, 2)
    assert [len(course.seconds) for course in found.values()] == [2, 2]
    assert found["short"].losses == [0.01] * 4
    assert 0.01 <= found["short"].median < 0.05 <= found["long"].median < 0.2
    assert 0 < found["short"].before <= found["short"].peak
    with pytest.raises(RuntimeError, match=r"(?s)bad failed:.*ValueError: no more"):
        turns.alternate({"bad": (breaks, {})}, 1)


def test_the_median_is_of_the_steps_that_count():
    assert turns.Course([3.0, 1.0, 2.0, 10.0], [], 0.0, 0.0).median == 2.5


def test_figures_stand_beside_one_another():
    one, two = turns.Course([2.0], [1.0, 4.0], 0.0, 10.0), turns.Course([3.0, 5.0], [1.0, 5.0], 0.0, 40.0)
    assert turns.figures({"one": one, "two": two}, "one") == {
        "seconds": {"one": 2.0, "two": 4.0}, "peak_mb": {"one": 10.0, "two": 40.0}, "faster_than": {"two": 2.0},
        "share_of_peak": {"two": 0.25}, "all_seconds": {"one": [2.0], "two": [3.0, 5.0]},
    }  # fmt: skip
    assert turns.largest_difference({"one": one, "two": two}, "one") == 0.25
