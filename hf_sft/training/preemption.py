"""SIGTERM ends a training in order: the step is finished, a checkpoint written, and the process ends as one that SIGTERM ended.

The exit code is 143 (128 + SIGTERM), not 0: to a scheduler 0 means that the work is done. A Kubernetes job would not start again,
dependent jobs of Slurm would begin with an unfinished model, and a loop "until it succeeds" would stop.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import threading
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

EXIT_CODE = 128 + signal.SIGTERM
_LOOK_SECONDS = 0.25


class Preempted(SystemExit):
    """Training was stopped by SIGTERM and its checkpoint is written. Ends the process with code 143 unless it is caught, so that
    nothing behind ``train()`` takes the unfinished model for the result."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class Preemption:
    """Inside ``with``, SIGTERM is a request to stop, which :meth:`agreed` tells all processes at the same step.

    Later signals change nothing: a launcher and a scheduler often send one each. If another process of this machine has died,
    nothing can be saved any more, and since the main thread may wait for it in a collective, where no Python handler runs, a
    thread that the signal wakes ends the process.

    Args:
        timeout: seconds that processes wait for each other at most.
    """

    def __init__(self, timeout: float = 1800.0) -> None:
        self._requested, self._over, self._pid = False, threading.Event(), os.getpid()
        self._timeout = timedelta(seconds=timeout)
        self._before: Any = None
        self._peers: dict[int, psutil.Process] = {}

    def __enter__(self) -> Preemption:
        self._group = _host_group(self._timeout)
        self._peers = _peers(self._group)
        self._installed = threading.current_thread() is threading.main_thread()
        if not self._installed:
            logger.info("training runs in a side thread: SIGTERM ends it without a checkpoint")
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._before = signal.signal(signal.SIGTERM, self._on_signal)
        self._watcher = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if not self._installed:
            return
        signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._wakeup_before)
        self._write.send(b"\0")  # wakes the watcher
        self._watcher.join()
        self._read.close()
        self._write.close()

    def agreed(self) -> bool:
        """Whether to stop at this step; every process must ask at every step, and all get the same answer.

        Costs one sum of a number over processes, on the host: a fraction of a millisecond, and no wait for a device.
        """
        if self._group is None:
            return self._requested
        flag = torch.tensor([int(self._requested)])
        dist.all_reduce(flag, group=self._group)
        return bool(flag.item())

    def saved(self) -> None:
        """The checkpoint is written in all processes: from here on they may end at different times."""
        self._over.set()

    def _on_signal(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:  # a process that was forked meanwhile ends as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self._requested:
            logger.warning("SIGTERM: training stops after this step, with a checkpoint")
        self._requested = True

    def _watch(self) -> None:
        """Sleeps until a signal comes, then looks after the other processes of this machine."""
        while not self._over.is_set():
            select.select([self._read], [], [])
            if signal.SIGTERM in self._read.recv(64):
                break
        while not self._over.wait(_LOOK_SECONDS):
            gone = [rank for rank, process in self._peers.items() if not _is_alive(process)]
            if gone and not self._over.is_set():
                print(
                    f"SIGTERM, and rank {gone[0]} has ended: no checkpoint can be written without it, this process ends too",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_CODE)


def _host_group(timeout: timedelta) -> Any:
    """A group of all processes that speaks over the host's network; None for a process alone."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    if "gloo" in str(dist.get_backend_config()):
        return dist.group.WORLD
    return dist.new_group(backend="gloo", timeout=timeout)


def _peers(group: Any) -> dict[int, psutil.Process]:
    """Rank -> process, of the others on this machine."""
    if group is None:
        return {}
    own = (socket.gethostname(), os.getpid(), psutil.Process().create_time())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own, group=group)
    found = {}
    for rank, (host, pid, born) in enumerate(everyone):
        if host != own[0] or pid == own[1]:
            continue
        try:
            process = psutil.Process(pid)
            if process.create_time() == born:  # else a container of its own: not to be seen from here
                found[rank] = process
        except psutil.Error:
            continue
    return found


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False
