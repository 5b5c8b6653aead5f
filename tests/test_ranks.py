"""Several real processes: the result of one on any data; and one that fails ends all, with its message, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_processes
import runs
import tiny

from hf_sft.arguments import ModelArguments
from hf_sft.data.cache import wait_for_folder
from hf_sft.locks import announced, is_announced
from hf_sft.models.quantization import quantized_device

slow = pytest.mark.slow  # those that train
ENOUGH = 20  # seconds from a failure to the end of all


@pytest.fixture(scope="module")
def forks() -> Iterator[rank_processes.Forks]:
    parent = rank_processes.Forks()
    yield parent
    parent.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    runs.arguments(folder)
    return folder


# ---- one result ----


def uneven(count: int, seed: int) -> list[Any]:
    """Conversations from one word to half a page."""
    rng = np.random.default_rng(seed)
    return [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab" * int(n)}]
        for n in rng.geometric(0.03, count).clip(1, 110)
    ]


@slow
@pytest.mark.parametrize(
    "rows, evaluation, changes",
    [
        (uneven(21, 0), uneven(7, 1), {}),
        (uneven(21, 0), uneven(7, 1), {"packing": False, "gradient_accumulation_steps": 2}),
        (uneven(2, 2), uneven(2, 3), {"gradient_accumulation_steps": 2}),
        (uneven(1, 4), uneven(1, 5), {}),
    ],
    ids=["unequal", "padded", "fewer than ranks", "one row"],
)
def test_three_processes_end_where_one_does(forks, base, tmp_path, rows, evaluation, changes) -> None:
    files = {
        "train_file": runs.write_jsonl(tmp_path / "train.jsonl", rows),
        "eval_file": runs.write_jsonl(tmp_path / "eval.jsonl", evaluation),
    }
    values = runs.arguments(base, **files, learning_rate=1e-3, max_steps=5, per_device_eval_batch_size=1, **changes)
    outs = []
    for processes, batch in ((1, 3), (3, 1)):
        out = tmp_path / str(processes)
        ended = forks.run(
            tmp_path, {**values, "output_dir": str(out), "per_device_train_batch_size": batch}, processes=processes
        )
        assert ended.codes == [0] * processes, ended.output
        assert not any("c10d" in output for output in ended.output)  # the store outlives its readers
        outs.append(out)
    for key in ("loss", "grad_norm"):
        one, three = (runs.history(out, key) for out in outs)
        assert len(one) == len(three) == 5
        np.testing.assert_allclose(three, one, rtol=1e-6 if key == "loss" else 1e-5)
    weights = [runs.weights(out) for out in outs]
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).norm() <= 1e-5 * weight.norm(), name
    metrics = [json.loads((out / "eval_results.json").read_text()) for out in outs]
    assert metrics[0]["eval_supervised_tokens"] == metrics[1]["eval_supervised_tokens"]
    np.testing.assert_allclose(metrics[1]["eval_loss"], metrics[0]["eval_loss"], rtol=1e-6)


# ---- one failure ----


def left_behind(folder: Path) -> list[str]:
    """What a failed run must not leave: weights, checkpoints, and the beginnings of tokenised data."""
    patterns = ("out/**/*.safetensors", "out/checkpoint*", "cache/.*")
    return [str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern)]


@slow
@pytest.mark.parametrize(
    "where, what, rank",
    [
        ("collator", "boom", 1),
        ("compute_loss", "boom", 0),
        ("loading", "sentence", 1),
        ("loading", "boom", 0),
        ("tokenising", "sentence", 0),
        ("saving", "boom", 0),
    ],
)
def test_one_that_fails_ends_all(forks, base, tmp_path, where, what, rank) -> None:
    """Without a launcher."""
    note, calls = tmp_path / "note", 3 if where in ("collator", "compute_loss") else 1
    values = runs.arguments(base, output_dir=str(tmp_path / "out"), per_device_train_batch_size=1)
    fault = {"where": where, "what": what, "ranks": [rank], "calls": calls, "note": str(note)}
    ended = forks.run(tmp_path, values, fault=fault)
    assert max(ended.times) - float(note.read_text()) < ENOUGH
    message = {"boom": "RuntimeError: boom, said the test", "sentence": "error: a sentence for the user"}[what]
    assert ended.codes[rank] == {"boom": 1, "sentence": 2}[what] and message in ended.output[rank]
    assert left_behind(tmp_path) == []
    other = ended.output[1 - rank]
    assert ended.codes[1 - rank] != 0 and "Traceback" not in other
    assert f"another process has failed (rank {rank}: {message.removeprefix('error: ')})" in other


@slow
def test_all_that_fail_at_once_say_why(forks, base, tmp_path) -> None:
    """What one of them says to the others takes nothing from its time to end, however long it needs to leave the group."""
    values = runs.arguments(base, output_dir=str(tmp_path / "out"), per_device_train_batch_size=1)
    fault = {"where": "compute_loss", "what": "sentence", "ranks": [0, 1], "calls": 3, "slow_to_leave": 6}
    ended = forks.run(tmp_path, values, fault={**fault, "note": str(tmp_path / "note")})
    assert ended.codes == [2, 2], ended.output
    assert all("error: a sentence for the user" in output for output in ended.output)
    assert max(ended.times) - float((tmp_path / "note").read_text()) < ENOUGH


@slow
@pytest.mark.parametrize("where", ["compute_loss", "tokenising"])
def test_one_that_is_killed_ends_the_others(forks, base, tmp_path, where) -> None:
    """Without a launcher, and without a word from it. Processes that tokenise for it end too."""
    note = tmp_path / "note"
    values = runs.arguments(base, output_dir=str(tmp_path / "out"), per_device_train_batch_size=1)
    values["preprocessing_num_workers"] = 2
    what = "die while tokenising" if where == "tokenising" else "die"
    ended = forks.run(tmp_path, values, fault={"where": where, "what": what, "ranks": [0], "note": str(note)})
    assert ended.codes[0] == -signal.SIGKILL and ended.codes[1] != 0
    assert max(ended.times) - float(note.read_text()) < ENOUGH
    said = "has ended while it tokenised" if where == "tokenising" else "another process has failed"
    assert said in ended.output[1] and "Traceback" not in ended.output[1]
    assert not list((tmp_path / "cache").glob("[!.]*/rows.arrow")) or where != "tokenising"
    workers = [int(line) for line in (tmp_path / "workers").read_text().split()] if where == "tokenising" else []
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "processes that tokenise are left"
        time.sleep(0.1)


@slow
@pytest.mark.parametrize("where, what, rank", [("compute_loss", "boom", 1), ("tokenising", "sentence", 0)])
def test_one_that_fails_ends_all_under_torchrun(base, tmp_path, where, what, rank) -> None:
    note, calls = tmp_path / "note", 3 if where == "compute_loss" else 1
    values = runs.arguments(base, output_dir=str(tmp_path / "out"), per_device_train_batch_size=1)
    fault = {"where": where, "what": what, "ranks": [rank], "calls": calls, "note": str(note)}
    job = json.dumps({"values": values, "fault": fault})
    process = runs.launch([rank_processes.__file__, job], 2, HF_SFT_CACHE=str(tmp_path / "cache"))
    assert time.time() - float(note.read_text()) < ENOUGH
    assert process.returncode != 0
    assert {"boom": "RuntimeError: boom, said the test", "sentence": "error: a sentence for the user"}[
        what
    ] in process.stderr
    assert left_behind(tmp_path) == []


# ---- nobody waits in a collective for one that tokenises ----


@slow
def test_tokenising_may_take_longer_than_a_collective(forks, base, tmp_path) -> None:
    """Prepared data; live data, whose evaluation part is prepared; and two processes that both tokenise, as the first ones of
    two machines do, the one far longer than the other."""
    alone = {"env": {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "own_cache": True}
    kinds: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
        "prepared": (0, {}, {}),
        "live": (0, {"streaming": True, "shuffle_buffer": 20}, {}),
        "machines": (1, {}, alone),
    }
    jobs = []
    for name, (rank, changes, job) in kinds.items():
        folder = tmp_path / name
        folder.mkdir()
        values = runs.arguments(base, output_dir=str(folder / "out"), ddp_timeout=4, max_steps=2, **changes)
        values["eval_file"] = str(base / "eval.jsonl")
        fault = {"where": "tokenising", "what": "sleep", "ranks": [rank], "note": str(folder / "note")}
        jobs.append({"folder": folder, "values": values, "fault": fault, **job})
    for job, ended in zip(jobs, forks.run_all(jobs), strict=True):
        assert ended.codes == [0, 0], ended.output
        assert (job["folder"] / "note").exists() and (job["folder"] / "out" / "eval_results.json").exists()


def test_who_waits_for_data_gives_up_when_nobody_makes_them(tmp_path) -> None:
    script = "import sys, time\nfrom pathlib import Path\nfrom hf_sft.locks import announced\n"
    script += "with announced(Path(sys.argv[1])):\n    print('at work', flush=True)\n    time.sleep(60)\n"
    lock = tmp_path / ".key.lock"
    process = subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE, cwd=runs.ROOT)
    assert process.stdout is not None and process.stdout.readline() and is_announced(lock)
    with pytest.raises(TimeoutError, match="LOCAL_RANK 0"):
        wait_for_folder(tmp_path / "key", patience=0.3, silence=0.1)
    process.kill()
    process.wait()
    assert lock.exists() and not is_announced(lock)  # the file alone says nothing
    with pytest.raises(TimeoutError, match="LOCAL_RANK 0"):
        wait_for_folder(tmp_path / "key", silence=0.1)
    with announced(lock):
        pass
    assert not lock.exists()


# ---- loading in turns ----


def test_processes_take_turns(tmp_path) -> None:
    """Five processes, two slots; one of them is killed in its turn."""
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom hf_sft.locks import one_of\nfolder = Path(sys.argv[1])\n"
    )
    script += "with one_of(2, folder):\n    began = time.time()\n    (folder / f'in-{os.getpid()}').touch()\n"
    script += "    time.sleep(60 if sys.argv[2] == 'killed' else 0.4)\n    print(began, time.time())\n"

    def start(what: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, str(tmp_path), what]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=runs.ROOT)

    holder = start("killed")
    while not (tmp_path / f"in-{holder.pid}").exists():
        time.sleep(0.01)
    others = [start("") for _ in range(4)]
    spans = [tuple(map(float, process.communicate(timeout=60)[0].split())) for process in others[:2]]
    holder.kill()
    holder.wait()
    spans += [tuple(map(float, process.communicate(timeout=60)[0].split())) for process in others[2:]]
    for began, _ in spans:
        assert sum(first <= began < last for first, last in spans) <= 2
    assert max(last for _, last in spans) - min(first for first, _ in spans) < 30  # nobody waits for the killed one


@slow
def test_models_are_loaded_in_turns(forks, base, tmp_path) -> None:
    values = runs.arguments(base, max_steps=1, per_device_train_batch_size=1)
    for limit in (1, None):
        spans = tmp_path / f"spans-{limit}"
        fault = {"where": "loading", "what": "slow", "ranks": [0, 1], "note": str(spans)}
        turns: dict[str, Any] = {"output_dir": str(tmp_path / f"out-{limit}")}
        turns |= {} if limit is None else {"max_loading_processes": limit}
        ended = forks.run(tmp_path, {**values, **turns}, fault=fault, env={"TMPDIR": str(tmp_path)})
        assert ended.codes == [0, 0], ended.output
        times = sorted(tuple(map(float, line.split())) for line in spans.read_text().splitlines())
        together = max(sum(first <= began < last for first, last in times) for began, _ in times)
        assert len(times) == 2 and together == (1 if limit else 2)


def test_zero_3_loads_together(tmp_path, monkeypatch) -> None:
    from hf_sft.models import loading

    monkeypatch.setattr(loading, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="max_loading_processes is 1, and under ZeRO-3 all processes load together"):
        loading.load_model(ModelArguments(model_name_or_path=tiny.save_tiny(tmp_path), max_loading_processes=1))


def test_a_quantised_base_goes_to_the_device_of_its_local_rank(monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert quantized_device() == "cuda:3"
    monkeypatch.delenv("LOCAL_RANK")
    assert quantized_device() == "cuda:0"
    assert os.environ["RANK"] == "11"
