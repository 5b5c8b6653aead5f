"""The measure of what engines take: bytes of PyTorch's allocator in a step, and what the record says of the estimates."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch

from hf_sft.memory.counting import allocated

sys.path.insert(0, str(runs.ROOT / "benchmarks"))
import memory_engines
import records

SMALL = {**memory_engines.MODEL, "num_hidden_layers": 3, "hidden_size": 128, "head_dim": 16, "vocab_size": 2048}
MB = 2**20


def test_the_highest_point_is_that_of_the_allocator_within_the_step():
    """What was higher before and after does not count; memory that grows in place is seen."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = torch.empty(10 * MB, dtype=torch.uint8)
        del (higher := {"before": torch.empty(50 * MB, dtype=torch.uint8)})["before"]
        with record_function(memory_engines.WATCHED):
            passing = torch.empty(5 * MB, dtype=torch.uint8)
            del passing
            grown = torch.empty(0, dtype=torch.uint8)
            grown.untyped_storage().resize_(7 * MB)
            grown.untyped_storage().resize_(0)
        after = torch.empty(50 * MB, dtype=torch.uint8)
    assert 7 * MB <= memory_engines.growth(seen) < 7.1 * MB
    assert kept.nbytes + after.nbytes == 60 * MB and not higher


def test_a_block_whose_address_is_handed_out_again_has_gone():
    """Threads that are not profiled give back unseen; what was there before the step and is given back within it counts."""

    def event(name: str, begin: int, end: int = 0, **fields: int) -> Any:
        return SimpleNamespace(
            name=name, start_time_ns=begin, end_time_ns=end, children=[], extra_fields=SimpleNamespace(**fields)
        )

    sizes = [(1, 7, 50), (3, 1, 10), (4, 1, 20), (5, 7, -50), (6, 2, 45), (7, 1, -20), (9, 3, 99)]
    events = [event("[memory]", when, ptr=address, alloc_size=size) for when, address, size in sizes]
    events.append(event(memory_engines.WATCHED, 2, 8))
    results = SimpleNamespace(experimental_event_tree=lambda: events)
    seen = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    assert memory_engines.growth(seen) == 20  # 10, 20, -30, 15, -5


def test_what_stands_is_counted_once_and_without_what_has_no_storage():
    before = allocated(memory_engines.standing_tensors())
    kept = torch.empty(10 * MB, dtype=torch.uint8)
    view, empty = kept[5:], torch.empty(10 * MB, dtype=torch.uint8, device="meta")
    assert allocated(memory_engines.standing_tensors()) - before == 10 * MB
    assert len(view) < len(empty)


def test_a_step_that_was_not_watched_is_an_error():
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        torch.empty(10)
    with pytest.raises(AssertionError, match="not watched"):
        memory_engines.growth(seen)


def test_without_an_engine_it_agrees_with_the_estimate(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_engines, "MODEL", SMALL)
    monkeypatch.setattr(memory_engines, "LENGTH", 256)
    (case,) = (case for case in memory_engines.CASES if case.processes == 1)

    def here(script: str, words: list[str], processes: int) -> None:
        (tmp_path / "peak-0").write_text(str(memory_engines.work(case, tmp_path)))

    monkeypatch.setattr(memory_engines, "launched", here)
    found = memory_engines.measure(case, tmp_path)
    assert found["error"] == pytest.approx(0, abs=0.03)


def test_a_case_that_fails_says_why(monkeypatch, tmp_path):
    class Done:
        stderr = "no room"

    monkeypatch.setattr(memory_engines, "MODEL", SMALL)
    monkeypatch.setattr(memory_engines, "launched", lambda *_: Done)
    with pytest.raises(RuntimeError, match="DDP: no room"):
        memory_engines.measure(memory_engines.Case("DDP"), tmp_path)
    assert not (tmp_path / "out").exists()


def test_docs_say_what_the_record_says():
    record = json.loads((records.FOLDER / "memory_engines.json").read_text(encoding="utf-8"))["results"]
    assert [row["case"] for row in record["cases"]] == [case.name for case in memory_engines.CASES]
    assert max(abs(row["error"]) for row in record["cases"]) < 0.1
    page = (runs.ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert memory_engines.markdown(record) in page
