"""Several ways to do the same work, each in a process of its own, step by step in turn, in an order that is drawn for each step.

A slow moment of the machine hits all ways alike, none warms the caches of another, and each process has a peak of memory of its
own. While one makes its step the others wait for a message and compute nothing.
"""

from __future__ import annotations

import multiprocessing
import random
import re
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WARM_UP = 2  # steps of each way that do not count
# Takes turns with ``Turn`` and returns the loss of every step (none: an empty list). A function of a module, which a new process
# can import, and values that can be sent there.
Way = tuple[Callable[..., list[float]], dict[str, Any]]


@dataclass(frozen=True)
class Course:
    """What one way did.

    Attributes:
        seconds: of each step, after those that warm up.
        losses: of every step.
        before, peak: resident memory before the first step and at the highest point, MB (10^6 bytes); where there is a CUDA
            device, what PyTorch has allocated there.
    """

    seconds: list[float]
    losses: list[float]
    before: float
    peak: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Turn:
    """In the process of one way: ``begin`` waits until it is this one's turn, ``end`` hands it on."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._started = False

    def begin(self) -> None:
        if not self._started:
            self._started = True
            self._connection.send(("ready", memory()))
        self._connection.recv()
        _wait_for_device()
        self._start = time.perf_counter()

    def end(self) -> None:
        _wait_for_device()
        self._connection.send(("step", time.perf_counter() - self._start))

    def of_trainer(self, steps: int) -> Any:
        """A callback for Trainers: a step goes from the end of the last one to its own, with fetching, collating and logging."""
        from transformers import TrainerCallback

        turn = self

        class TakesTurns(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                turn.begin()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                turn.end()
                if state.global_step < steps:
                    turn.begin()

        return TakesTurns()


def memory() -> float:
    """The peak so far in MB (10^6 bytes), of this process or of its CUDA device."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    (found,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found) * 1024 / 1e6


def alternate(ways: Mapping[str, Way], steps: int, *, together: bool = True) -> dict[str, Course]:
    """``steps`` steps of each way after those that warm up.

    Args:
        together: in turn; else one way after the other, where not all fit into the memory of one device.

    Raises:
        RuntimeError: a way failed; with its traceback.
    """
    groups = [dict(ways)] if together else [{name: way} for name, way in ways.items()]
    courses: dict[str, Course] = {}
    for group in groups:
        courses |= _alternate(group, steps + WARM_UP)
    return courses


def figures(found: Mapping[str, Course], ours: str) -> dict[str, Any]:
    """What records of such steps have in common: each way by itself, and ``ours`` beside every other one."""
    own, others = found[ours], {name: course for name, course in found.items() if name != ours}
    return {
        "seconds": {name: course.median for name, course in found.items()},
        "peak_mb": {name: course.peak for name, course in found.items()},
        "faster_than": {name: course.median / own.median for name, course in others.items()},
        "share_of_peak": {name: own.peak / course.peak for name, course in others.items()},
        "all_seconds": {name: course.seconds for name, course in found.items()},
    }


def beside(figures: Mapping[str, Any], name: str) -> list[str]:
    """Two cells of a table: how much faster ours is than ``name``, and its share of that one's memory; ours has none."""
    if name not in figures["faster_than"]:
        return ["", ""]
    return [f"{figures['faster_than'][name]:.2f} times", f"{figures['share_of_peak'][name]:.0%}"]


def largest_difference(found: Mapping[str, Course], ours: str) -> float:
    """Between the losses of ``ours`` and those of any other way, over all steps, relative."""
    own = found[ours].losses
    return max(abs(a / b - 1) for course in found.values() for a, b in zip(course.losses, own, strict=True))


def _alternate(ways: Mapping[str, Way], steps: int) -> dict[str, Course]:
    context = multiprocessing.get_context("spawn")
    processes, connections = {}, {}
    for name, (function, values) in ways.items():
        connections[name], theirs = context.Pipe()
        processes[name] = context.Process(target=_work, args=(function, values, steps, theirs), daemon=True)
        processes[name].start()
        theirs.close()

    def hear(name: str, kind: str) -> Any:
        try:
            told, value = connections[name].recv()
        except EOFError:
            raise RuntimeError(f"{name} ended without a word (exit code {processes[name].exitcode})") from None
        if told != kind:
            raise RuntimeError(f"{name} {told}:\n{value}")
        return value

    try:
        before = {name: hear(name, "ready") for name in ways}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        draw, order = random.Random(0), list(ways)
        for _ in range(steps):
            draw.shuffle(order)  # none is always the one that follows the slowest
            for name in order:
                connections[name].send("go")
                seconds[name].append(hear(name, "step"))
        ends = {name: hear(name, "done") for name in ways}
    finally:
        for process in processes.values():
            process.kill()  # a Trainer takes SIGTERM for a wish to end after its step
            process.join()
    return {name: Course(seconds[name][WARM_UP:], ends[name][0], before[name], ends[name][1]) for name in ways}


def _work(function: Callable[..., list[float]], values: dict[str, Any], steps: int, connection: Connection) -> None:
    try:
        losses = function(Turn(connection), steps=steps, **values)
        connection.send(("done", (losses, memory())))
    except BaseException:
        connection.send(("failed", traceback.format_exc()))


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
