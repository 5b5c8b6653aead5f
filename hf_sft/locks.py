"""Locks between the processes of one machine. The system releases them when their holder ends, however it ends.

Record locks of POSIX: unlike those of ``flock``, a forked child does not inherit them, so that worker processes that outlive a
killed parent hold nothing. They belong to the whole process, and end with any file object of it on the same path.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1


@contextlib.contextmanager
def announced(path: Path) -> Iterator[None]:
    """Show to :func:`is_announced` that this process is at work, until the block or the process ends.

    Several processes may do so at once.

    Args:
        path: of the lock file, in a folder that exists; it goes again.
    """
    if fcntl is None:
        yield
        return
    with path.open("a+") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(file, fcntl.LOCK_SH)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_announced(path: Path) -> bool:
    """Whether another process is at work; where there are no locks, whether it has left its file."""
    if fcntl is None:
        return True
    try:
        with path.open("r+") as file:
            return not _try_lock(file)
    except FileNotFoundError:
        return False
    except OSError:
        return True


@contextlib.contextmanager
def one_of(slots: int, folder: Path | None = None) -> Iterator[None]:
    """Run the block in at most ``slots`` processes at the same time; the others wait.

    Args:
        slots: at least 1.
        folder: of the lock files; by default that of the launch.

    Raises:
        ValueError: the system has no such locks.
    """
    if fcntl is None:
        raise ValueError("processes cannot take turns: this system has no locks between them (fcntl)")
    folder = launch_folder() if folder is None else folder
    with contextlib.ExitStack() as files:
        held = _take_slot([files.enter_context((folder / f"slot-{n}").open("a+")) for n in range(slots)])
        try:
            yield
        finally:
            fcntl.lockf(held, fcntl.LOCK_UN)


def _take_slot(files: list[IO[str]]) -> IO[str]:
    waited = False
    while True:
        for file in files:
            if _try_lock(file):
                return file
        if not waited:
            logger.info("waiting until one of %d processes is done", len(files))
        waited = True
        time.sleep(_POLL_SECONDS)


def _try_lock(file: IO[str]) -> bool:
    """Lock for this process alone, without waiting."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def launch_folder() -> Path:
    """A folder of this machine's temporary one that all processes of a launch share, and no others.

    Raises:
        ValueError: it belongs to another user.
    """
    environment = os.environ
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    launch = [environment.get(name, "") for name in names] if "MASTER_PORT" in environment else [str(os.getppid())]
    key = hashlib.sha256("\0".join(launch).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"hf_sft-{os.getuid()}" / key
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.parent.stat().st_uid != os.getuid():
        raise ValueError(f"{folder.parent} belongs to another user: set TMPDIR to a folder of your own")
    return folder
