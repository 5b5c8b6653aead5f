"""SIGTERM: the step is finished, a checkpoint written, and the process ends; the resumed run ends as the undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import runs
import torch
from transformers import TrainerCallback

from hf_sft import tasks
from hf_sft.checkpoints import incomplete
from hf_sft.training.preemption import EXIT_CODE, Preempted, Preemption


class Signal(TrainerCallback):
    """A signal at the end of a step, as a scheduler sends it: to workers of the loader as well."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for worker in psutil.Process().children(recursive=True):
                worker.send_signal(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # launcher and scheduler


def stopped(values: dict[str, Any], step: int) -> Path:
    """A run that SIGTERM stops at ``step``."""
    build = tasks.build_trainer

    def with_signal(*parts: Any) -> Any:
        trainer = build(*parts)
        trainer.add_callback(Signal(step))
        return trainer

    before = signal.getsignal(signal.SIGTERM)
    with mock.patch.object(tasks, "build_trainer", with_signal), pytest.raises(SystemExit) as end:
        runs.train(values)
    assert (type(end.value), end.value.code, EXIT_CODE) == (Preempted, 143, 143)
    assert signal.getsignal(signal.SIGTERM) == before
    return Path(values["output_dir"])


def plain(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.endswith(("runtime", "per_second", "_time", "_gib"))}


CASES = {  # the step of the signal, and what else is due there
    "between": (3, {"logging_steps": 4}),
    "evaluation": (4, {}),
    "checkpoint": (5, {"save_strategy": "steps", "save_steps": 5}),
    "weights_alone": (5, {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}),
    "answers": (3, {"generation_eval_steps": 3, "generation_eval_samples": 2, "generation_max_new_tokens": 4}),
    "last": (8, {}),
    "workers": (3, {"dataloader_num_workers": 2}),
    "persistent_workers": (3, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
    "jit": (3, {"enable_jit_checkpoint": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_equals_undisturbed(tmp_path, capsys, case: str) -> None:
    step, changes = CASES[case]
    values = runs.arguments(
        tmp_path, train_mode="lora", lora_rank=2, lora_dropout=0.2, eval_file=str(tmp_path / "eval.jsonl"),
        eval_strategy="steps", eval_steps=4, metric_for_best_model="loss", **changes,
    )  # fmt: skip
    undisturbed = runs.train({**values, "output_dir": str(tmp_path / "undisturbed")})
    out = stopped(values, step)
    assert f"stopped by SIGTERM at step {step}; resume with resume_from_checkpoint auto" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [
        "args.json",
        "data_report.json",
        "log.jsonl",
        "report.html",
    ]
    assert os.readlink(out / "last") == f"checkpoint-{step}"
    runs.train({**values, "resume_from_checkpoint": "auto"})
    before, after = runs.weights(undisturbed), runs.weights(out)
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    histories = [
        json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (undisturbed, out)
    ]
    expected, found = ([plain(line) for line in history if "train_runtime" not in line] for history in histories)
    assert found == expected
    logs = [map(json.loads, (folder / "log.jsonl").read_text().splitlines()) for folder in (undisturbed, out)]
    expected, found = ([plain(line) for line in lines if "train_runtime" not in line] for lines in logs)
    assert [{**line, "time": 0} for line in found] == [{**line, "time": 0} for line in expected]
    for file, name in (("eval_results.json", "eval_loss"), ("train_results.json", "train_loss")):
        if (out / file).exists():  # nothing was trained where all steps had been taken
            results = [json.loads((folder / file).read_text())[name] for folder in (undisturbed, out)]
            assert results[0] == results[1]


def test_stopped_at_the_end_of_an_epoch(tmp_path) -> None:
    """The evaluation of the epoch is made by the resumed run."""
    values = runs.arguments(
        tmp_path, packing=False, per_device_train_batch_size=12, num_train_epochs=3, max_steps=-1, train_mode="lora",
        lora_rank=2, lora_dropout=0.2, eval_file=str(tmp_path / "eval.jsonl"), eval_strategy="epoch",
    )  # fmt: skip
    undisturbed = runs.train({**values, "output_dir": str(tmp_path / "undisturbed")})
    for step in (4, 6):
        out = stopped({**values, "output_dir": str(tmp_path / str(step))}, step)
        runs.train({**values, "output_dir": str(out), "resume_from_checkpoint": "auto"})
        assert runs.history(out, "eval_loss") == runs.history(undisturbed, "eval_loss")
        assert runs.history(out) == runs.history(undisturbed)
        assert all(torch.equal(w, runs.weights(out)[name]) for name, w in runs.weights(undisturbed).items())


def test_outside_of_train_the_signal_is_not_ours() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    with Preemption() as preemption:
        assert not preemption.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.agreed()
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before


WAITING = """
import os, signal, subprocess, sys, threading, time
from datetime import timedelta
import psutil, torch.distributed as dist
from hf_sft.training.preemption import Preemption

other = subprocess.Popen(["sleep", "60"])
store = dist.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=60))
with Preemption() as preemption:
    preemption._peers = {1: psutil.Process(other.pid)}
    def signals():
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)
        print("waits while the other lives", flush=True)
        other.kill()
    threading.Thread(target=signals, daemon=True).start()
    store.get("never")  # in C++, as in a collective: no Python handler runs
"""


@pytest.mark.slow
def test_a_process_that_waits_for_a_dead_one_ends() -> None:
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", WAITING], env=environment, capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_CODE and time.monotonic() - began < 40
    assert "waits while the other lives" in done.stdout and "rank 1 has ended" in done.stderr


@pytest.mark.slow
def test_two_processes_stop_at_one_step(tmp_path) -> None:
    """One of them gets the signal; the other hears of it."""
    values = runs.arguments(tmp_path, per_device_train_batch_size=1, max_steps=6)
    process = runs.train_process(
        values, 2, "tests/die_at_step.py", HF_SFT_DIE_AT="3", HF_SFT_SIGNAL="SIGTERM", HF_SFT_DIE_RANK="1"
    )
    assert process.returncode != 0 and "stopped by SIGTERM at step 3" in process.stderr, process.stderr
    out = tmp_path / "out"
    assert os.readlink(out / "last") == "checkpoint-3" and not list(out.glob("*.safetensors"))
    process = runs.train_process({**values, "resume_from_checkpoint": "auto"}, 2)
    assert process.returncode == 0, process.stderr
    undisturbed = runs.train({**values, "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "undisturbed")})
    for name, weight in runs.weights(undisturbed).items():
        assert torch.allclose(weight, runs.weights(out)[name], rtol=0, atol=1e-5), name


@pytest.mark.slow
def test_a_killed_rank_ends_the_other(tmp_path) -> None:
    values = runs.arguments(tmp_path, per_device_train_batch_size=1, save_strategy="steps", save_steps=2, max_steps=6)
    began = time.monotonic()
    process = runs.train_process(values, 2, "tests/die_at_step.py", HF_SFT_DIE_AT="3", HF_SFT_DIE_RANK="1")
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert os.readlink(tmp_path / "out" / "last") == "checkpoint-2"


# ---- several nodes ----


def two_nodes(folder: Path, values: dict[str, Any], *, shared: bool) -> list[tuple[int, str]]:
    """One process each on two nodes, in folders of their own if they share no disk: (exit code, log)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        place = folder / ("shared" if shared else f"node{rank}")
        place.mkdir(exist_ok=True)
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(runs.ROOT), "RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, str(runs.ROOT / "train.py"), *runs.words(values)]
        processes.append(
            subprocess.Popen(
                command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
    return [(process.returncode, log) for process in processes for _, log in [process.communicate(timeout=120)]]


@pytest.mark.slow
def test_nodes_with_disks_of_their_own(tmp_path) -> None:
    values = runs.arguments(
        tmp_path, output_dir="out", per_device_train_batch_size=1, save_strategy="steps", save_steps=2, max_steps=4
    )
    for code, log in two_nodes(tmp_path, values, shared=False):
        assert code == 2 and "rank 1 does not see output_dir 'out' of rank 0" in log, log
    for code, log in two_nodes(tmp_path, {**values, "save_on_each_node": True}, shared=True):
        assert code == 2 and "save_on_each_node is true, and the nodes share output_dir 'out'" in log, log
    each = {**values, "save_on_each_node": True, "resume_from_checkpoint": "auto"}
    for rank, (code, log) in enumerate(two_nodes(tmp_path, each, shared=False)):
        assert code == 0, log
        out = tmp_path / f"node{rank}" / "out"
        assert os.readlink(out / "last") == "checkpoint-4"
        assert incomplete(out / "checkpoint-4") is None and (out / "checkpoint-4" / f"rng_state_{rank}.pth").is_file()
    (tmp_path / "node1" / "out" / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    for rank, (code, log) in enumerate(two_nodes(tmp_path, {**each, "max_steps": 6}, shared=False)):
        assert code == 0, log
        out = tmp_path / f"node{rank}" / "out"
        assert [incomplete(out / f"checkpoint-{step}") for step in (2, 4, 6)] == [None, None, None]
        assert json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())["global_step"] == 6
