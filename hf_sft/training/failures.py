"""When one process of a run fails, all end within seconds, and its message is the one that is read.

Backends tell of a lost process late or never, and launchers end only the processes of their own machine. So a process that
fails says why in the store of the process group, which has no part in collectives, and the others look there every second.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hf_sft.data.cache import WriterGone

_FAILED, _HEARD = "hf_sft/failed", "hf_sft/heard"  # why, and how many others know
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 12 * 3600.0
_GRACE_SECONDS = 3.0  # for a process to end by itself when another has failed
_OWN_SECONDS = 10.0  # and for one that has failed: it tells the others, leaves the group and prints its message
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket closed",
    "remote process exited",
    "ncclremoteerror",
    "ncclsystemerror",
    "communicator was aborted",
)
_meetings = itertools.count()


class OtherProcessFailed(ValueError):
    """The connection to another process is lost: nothing for a traceback, which would hide that process's own message."""


@contextmanager
def ending_together() -> Iterator[None]:
    """Run the block, a whole training, in one process of several: it ends soon after another has failed, and the others after it.

    The process group is left at the end.

    Raises:
        OtherProcessFailed: instead of a backend's error about a lost connection.
    """
    watch = _Watch() if _world() > 1 else None
    try:
        yield
        if watch is not None:
            watch.leave()
    except SystemExit:  # an end in order, of all
        if watch is not None:
            with suppress(Exception):
                watch.leave(patience=60.0)
        raise
    except (Exception, KeyboardInterrupt) as error:
        if watch is not None:
            watch.fail(error)
            if isinstance(error, WriterGone):
                raise OtherProcessFailed(watch.cause(str(error))) from error
            if lost_connection(error):
                raise OtherProcessFailed(watch.cause()) from error
        raise
    finally:
        if watch is not None and not watch.failed.is_set():
            watch.over.set()
        _leave_process_group(failed=watch is not None and watch.failed.is_set())


def meet(patience: float = _PATIENCE_SECONDS) -> None:
    """Wait until all processes have come here, for longer than a collective would.

    Raises:
        OtherProcessFailed: one of them has failed.
        TimeoutError: they have not come in ``patience`` seconds.
    """
    if _world() == 1:
        return
    store, place = _store(), f"hf_sft/meeting/{next(_meetings)}"
    if store.add(f"{place}/count", 1) == _world():
        store.set(f"{place}/all", "yes")
    deadline = time.monotonic() + patience
    while not store.check([f"{place}/all"]):
        if store.check([_FAILED]):
            raise OtherProcessFailed(store.get(_FAILED).decode())
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all {_world()} processes have come so far in {patience:.0f} s: see their logs")
        time.sleep(0.2)


def lost_connection(error: BaseException | None) -> bool:
    """Whether this is a backend's word for: another process has gone."""
    import torch.distributed as dist

    while error is not None:
        if isinstance(error, (OtherProcessFailed, WriterGone, dist.DistNetworkError, dist.DistStoreError)):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Watch:
    """A thread that looks whether another process has failed; if this one does not end by itself then, it is ended."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank = dist.get_rank()
        self.store = _store()
        self.told: str | None = None  # what another process has said
        self.own = ""  # what this one says
        self.failed = threading.Event()  # this one has
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True, name="hf_sft watch")
        self.thread.start()

    def leave(self, patience: float = _PATIENCE_SECONDS) -> None:
        """End with all the others: whoever is done early would miss a failure. The first may keep the store, so it goes last.

        Raises:
            As :func:`meet`.
        """
        meet(patience)
        self.over.set()
        self.thread.join()
        place, deadline = f"hf_sft/left/{next(_meetings)}", time.monotonic() + 3 * _POLL_SECONDS
        left = self.store.add(place, 1)
        while self.rank == 0 and left < _world() and time.monotonic() < deadline:
            time.sleep(0.05)
            left = self.store.add(place, 0)

    def fail(self, error: BaseException) -> None:
        """This process ends; if it is the first, say to all why."""
        self.failed.set()
        if lost_connection(error):
            return
        text = " ".join(f"{'' if isinstance(error, ValueError) else type(error).__name__ + ': '}{error}".split())
        self.own = f"rank {self.rank}: {text[:500]}"
        with suppress(Exception):  # the store may have gone with another process
            if self.store.compare_set(_FAILED, "", self.own).decode(errors="replace") != self.own:
                self._read()
                return
            deadline = time.monotonic() + 3 * _POLL_SECONDS  # the store may be this process's own, and go with it
            while self.store.add(_HEARD, 0) < _world() - 1 and time.monotonic() < deadline:
                time.sleep(0.05)

    def cause(self, known: str = "its own message, or the launcher's, says why") -> str:
        """Why another process has gone: in its words, or what is known here."""
        with suppress(Exception):
            deadline = time.monotonic() + 2 * _POLL_SECONDS
            while self.told is None and time.monotonic() < deadline:
                self._read()
                time.sleep(0.1)
        return f"rank {self.rank} ends because another process has failed ({self.told or known})"

    def _read(self) -> None:
        if self.told is None and self.store.check([_FAILED]):
            self.told = self.store.get(_FAILED).decode(errors="replace")
            self.store.add(_HEARD, 1)

    def _look(self) -> None:
        while not self.over.wait(_POLL_SECONDS) and not self.failed.is_set() and self.told is None:
            try:
                self._read()
            except Exception:  # the store has gone, and with it the process that keeps it
                self.told = self.told or "rank 0, or its launcher, has gone"
        if self.over.wait(_GRACE_SECONDS) or (self.failed.is_set() and self.over.wait(_OWN_SECONDS)):
            return
        print(f"error: {self.own or self.cause()}", file=sys.stderr, flush=True)
        os._exit(1)  # what hangs, such as a collective, cannot be left otherwise


def _world() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _store() -> Any:
    """A connection of one's own to the store of the process group, so that nobody waits for another's request."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store().clone()  # type: ignore[attr-defined]  # every store has it since torch 2.8


def _leave_process_group(*, failed: bool) -> None:
    """gloo may abort a process that ends as a member; others may wait for collectives that never end."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and (not failed or dist.get_backend() == "gloo"):
        dist.destroy_process_group()
