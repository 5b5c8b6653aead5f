"""Runs of train.py that are killed without warning, each in a fork of one process that has imported everything.

``python tests/kill_cases.py FOLDER`` prints one JSON line per case. An undisturbed run tells which points there are: ends of
steps, and whatever is opened for writing, linked, renamed or removed below output_dir; a kill comes before it, or in the middle.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import runs
import safetensors.torch
import torch
from peft import peft_model
from tqdm import tqdm
from transformers import TrainerCallback, modeling_utils

import hf_sft.tasks
from hf_sft.checkpoints import checkpoints_in, incomplete
from hf_sft.training.trainer import SFTTrainer

SEED = 5
MODES = {
    "lora": {"train_mode": "lora", "lora_rank": 4, "lora_dropout": 0.1, "dtype": "float32"},
    "full": {"ema_decay": 0.8, "ema_start_step": 3},
}
# How many of the named points are drawn from each kind.
DRAWN = {"step": 2, "write": 5, "open": 3, "rename": 2, "renamed": 2, "remove": 2, "link": 1, "result": 3}
RANDOM_MOMENTS = 10
LIMIT = 120  # seconds of one run, of which it needs two: one that hangs says where


def arguments(folder: Path, mode: str) -> dict[str, Any]:
    return runs.arguments(
        folder, max_steps=8, save_strategy="steps", save_steps=2, save_total_limit=2, eval_strategy="steps", eval_steps=4,
        eval_file=str(folder / "eval.jsonl"), metric_for_best_model="loss", per_device_train_batch_size=4, logging_steps=3,
        generation_eval_steps=2, generation_eval_samples=2, generation_max_new_tokens=4, stop_check_samples=2, **MODES[mode],
    )  # fmt: skip


# ---- in the fork that is killed ----


def watch(out: Path, visit: Callable[[str], None]) -> None:
    """Call ``visit`` with the name of every point below ``out``, before it happens."""

    rewriting = False

    def named(path: Any) -> str | None:
        text = os.fspath(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        text = text.decode() if isinstance(text, bytes) else text
        text = text.removesuffix(f".{os.getpid()}")  # what is written beside has the process's number
        return os.path.relpath(text, out) if text.startswith(f"{out}/") else None

    def hook(event: str, parts: tuple[Any, ...]) -> None:
        if rewriting:
            return
        if event == "open" and isinstance(parts[1], str) and set(parts[1]) & set("wax") and named(parts[0]):
            visit(f"open {named(parts[0])}")
        elif event == "os.rename" and named(parts[1]):
            visit(f"rename {named(parts[1])}")
        elif event == "os.remove" and (named(parts[0]) or parts[1] != -1):  # inside rmtree names are relative
            visit(f"remove {os.path.basename(os.fspath(parts[0])).removesuffix(f'.{os.getpid()}')}")
        elif event == "os.symlink":
            visit(f"symlink {named(parts[1])}")

    def in_the_middle(write: Callable[..., Any], place: int) -> Callable[..., Any]:
        """A file of C++ or Rust is cut in half before the point comes, and written again if nobody is killed there."""

        def writing(*parts: Any, **keywords: Any) -> Any:
            path = parts[place] if len(parts) > place else keywords["filename"]
            if not named(path):
                return write(*parts, **keywords)
            write(*parts, **keywords)
            whole = Path(path).read_bytes()
            os.truncate(path, len(whole) // 2)
            visit(f"write {named(path)}")
            nonlocal rewriting
            rewriting = True
            Path(path).write_bytes(whole)
            rewriting = False
            return None

        return writing

    def renaming(source: Any, target: Any, **keywords: Any) -> None:
        replace(source, target, **keywords)
        if named(target):
            visit(f"renamed {named(target)}")

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            visit(f"step {state.global_step}")

    sys.addaudithook(hook)
    replace, os.replace = os.replace, renaming
    torch.save = in_the_middle(torch.save, 1)
    writers = [(safetensors.torch, "save_file"), (modeling_utils, "safe_save_file"), (peft_model, "safe_save_file")]
    for module, name in writers:
        setattr(module, name, in_the_middle(getattr(module, name), 1))
    build = hf_sft.tasks.build_trainer

    def with_steps(*parts: Any) -> SFTTrainer:
        trainer = build(*parts)
        trainer.add_callback(Steps())
        return trainer

    hf_sft.tasks.build_trainer = with_steps


# ---- in the process that forks ----


def forked(log: Path, function: Callable[..., None], *arguments: Any) -> int:
    """Call ``function`` in a fork, its output in ``log``; returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
            faulthandler.dump_traceback_later(LIMIT, exit=True, file=file)
            try:
                function(*arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(values: dict[str, Any]) -> None:
    runs.train(values)


def record(values: dict[str, Any], points: Path) -> None:
    """The points of a run, and the seconds between its first step and its end."""
    lines: list[tuple[str, float]] = []
    watch(Path(values["output_dir"]), lambda name: lines.append((name, time.monotonic())))
    train(values)
    names = [name for name, _ in lines]
    points.write_text(json.dumps([names, lines[-1][1] - lines[names.index("step 1")][1]]))


def killed_at(values: dict[str, Any], point: str, occurrence: int) -> None:
    count: Counter[str] = Counter()

    def visit(name: str) -> None:
        count[name] += 1
        if name == point and count[name] == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(Path(values["output_dir"]), visit)
    train(values)


def announce(values: dict[str, Any], handle: int) -> None:
    watch(Path(values["output_dir"]), lambda name: os.write(handle, b"1") and None if name == "step 1" else None)
    train(values)


# ---- what must be equal ----


def plain(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the log without times."""
    measured = ("runtime", "per_second", "time", "memory_gib")
    return {key: value for key, value in line.items() if not key.endswith(measured)}


def outcome(out: Path) -> dict[str, Any]:
    """Everything that a run leaves, without times."""
    state = json.loads((out / "trainer_state.json").read_text())
    newest = next(iter(checkpoints_in(out).values()))
    (weights,) = out.glob("*.safetensors")
    averages = newest / "ema.safetensors"
    archives = {
        name: torch.load(newest / name, weights_only=False)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    }
    bytes_of = {}
    for name, value in archives.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        bytes_of[name] = buffer.getvalue()
    return {
        "weights": weights.read_bytes(),
        "checkpoint": next(newest.glob("*model.safetensors")).read_bytes(),
        "average": averages.read_bytes() if averages.is_file() else None,
        "answers": [(out / name).read_text() for name in ("predictions.jsonl", "stop_check.json")],
        "log": [plain(line) for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())],
        **bytes_of,
        "history": [plain(line) for line in state["log_history"] if "train_runtime" not in line],
        "eval": plain(json.loads((out / "eval_results.json").read_text())),
        "folders": sorted(path.name for path in out.iterdir() if path.is_dir()),
        "links": {name: os.readlink(out / name) for name in ("best", "last")},
        "newest": newest.name,
        "best": Path(json.loads((newest / "trainer_state.json").read_text())["best_model_checkpoint"]).name,
    }


def check(values: dict[str, Any], log: Path, undisturbed: dict[str, Any]) -> dict[str, Any]:
    """Resume a killed run, and say what is not as it should be."""
    out = Path(values["output_dir"])
    wrong = [f"{path.name}: {why}" for path in checkpoints_in(out).values() if (why := incomplete(path))]
    newest = next(iter(checkpoints_in(out).values()), None)
    log.write_text("")
    code = ended(forked(log, train, {**values, "resume_from_checkpoint": "auto"}))
    text = log.read_text()
    if code != 0:
        return {"wrong": [*wrong, f"the resumed run ended with {code}: {text[-2000:]}"]}
    if newest is not None and f"Resuming from {newest}." not in text:
        wrong.append(f"it was not resumed from {newest.name}: {text[:500]}")
    if newest is None and "starting anew" not in text:
        wrong.append("it did not start anew")
    found = outcome(out)
    wrong += [
        f"{key} differs: {str(value)[:300]} instead of {str(undisturbed[key])[:300]}"
        for key, value in found.items()
        if value != undisturbed[key]
    ]
    return {"from": None if newest is None else newest.name, "wrong": wrong}


def kind(point: str) -> str:
    verb, where = point.split(" ", 1)
    if verb == "symlink" or where in ("best", "last"):
        return "link"
    of_result = (
        verb in ("open", "rename", "renamed", "write") and "checkpoint-" not in where and "args.json" not in where
    )
    return "result" if of_result else verb


def chosen(points: list[str], rng: random.Random) -> Iterator[tuple[str, int]]:
    """Points after the first step by their kinds, as (name, which of that name)."""
    numbered, count = [], Counter[str]()
    for place, point in enumerate(points):
        count[point] += 1
        if place > points.index("step 1"):
            numbered.append((point, count[point]))
    for name, number in DRAWN.items():
        yield from rng.sample([entry for entry in numbered if kind(entry[0]) == name], number)


def unshare_progress_bars() -> None:
    """By default tqdm locks with a semaphore that forks share: one killed while it draws would hold it for ever, for all."""
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # no thread that could hold it in the moment of a fork


def main(folder: Path) -> None:
    unshare_progress_bars()
    rng = random.Random(SEED)
    log = folder / "log"
    undisturbed, points, seconds = {}, {}, {}
    values = {}
    for mode in MODES:
        values[mode] = arguments(folder, mode)
        place = {**values[mode], "output_dir": str(folder / f"undisturbed-{mode}")}
        assert ended(forked(log, train, place)) == 0, log.read_text()
        undisturbed[mode] = outcome(folder / f"undisturbed-{mode}")
        place = {**values[mode], "output_dir": str(folder / "recorded")}
        assert ended(forked(log, record, place, folder / "points")) == 0, log.read_text()
        points[mode], seconds[mode] = json.loads((folder / "points").read_text())
        shutil.rmtree(folder / "recorded")
    print(json.dumps({"seconds": seconds, "kinds": Counter(map(kind, points["full"]))}), flush=True)

    named = [(mode, entry) for mode in MODES for entry in chosen(points[mode], rng)]
    half = [entry for number, entry in enumerate(named[: len(named) // 2]) if number % 2 == 0]
    half += [entry for number, entry in enumerate(named[len(named) // 2 :]) if number % 2 == 1]
    for number, (mode, (point, occurrence)) in enumerate(half):
        place = {**values[mode], "output_dir": str(folder / f"killed-{number}")}
        code = ended(forked(log, killed_at, place, point, occurrence))
        result = {"mode": mode, "point": f"{point} ({occurrence})", "killed": code == -signal.SIGKILL}
        print(json.dumps({**result, **check(place, log, undisturbed[mode])}), flush=True)
        shutil.rmtree(folder / f"killed-{number}")
    number = killed = 0
    while killed < RANDOM_MOMENTS and number < 3 * RANDOM_MOMENTS:
        mode, number = list(MODES)[number % 2], number + 1
        place = {**values[mode], "output_dir": str(folder / f"moment-{number}")}
        read, write = os.pipe()
        pid = forked(log, announce, place, write)
        os.close(write)
        assert os.read(read, 1), log.read_text()  # nothing, where it ended before its first step
        os.close(read)
        delay = rng.uniform(0, seconds[mode])
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        if ended(pid) != -signal.SIGKILL:  # it came after the end
            seconds[mode] = delay
            continue
        killed += 1
        result = {"mode": mode, "point": f"{delay:.3f} s after the first step", "killed": True}
        print(json.dumps({**result, **check(place, log, undisturbed[mode])}), flush=True)
        shutil.rmtree(folder / f"moment-{number}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
