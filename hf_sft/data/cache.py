"""Folders of tokenised data: found by key, written whole or not at all, waited for by the ranks that do not write."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hf_sft.locks import announced, is_announced

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 12 * 3600.0
_SILENCE_SECONDS = 600.0


class WriterGone(ValueError):
    """Who was to write what this process waits for has ended."""


def default_cache_dir() -> Path:
    """$HF_SFT_CACHE, else ~/.cache/hf_sft."""
    return Path(os.environ.get("HF_SFT_CACHE") or Path.home() / ".cache" / "hf_sft")


_digests: dict[tuple[Any, ...], str] = {}  # of files that this process has read, by what changes with them
_SETTLED_SECONDS = 2.0  # a file that was written so recently may change again without a change of its time


def hash_files(paths: Iterable[Path], *, contents: bool = True) -> str:
    """SHA-256 of the files in this order: of their contents, or of their sizes and times where they are too large to read."""
    return cache_key({"files": [_digest(path) if contents else _state(path)[1:] for path in paths]})


def _state(path: Path) -> tuple[str, int, int]:
    """Name, size and time of the last change in ns."""
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns


def _digest(path: Path) -> str:
    state = _state(path)
    if state in _digests:
        return _digests[state]
    digest, began = hashlib.sha256(), time.time()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if began - state[-1] / 1e9 > _SETTLED_SECONDS:
        _digests[state] = digest.hexdigest()
    return digest.hexdigest()


def cache_key(parts: dict[str, Any]) -> str:
    """A folder name from all that the data depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def is_local_main() -> bool:
    """Whether this process prepares data for its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0) == 0


def write_folder(
    folder: Path, write: Callable[[Path], None], *, replace: bool = False, way_out: str = "Set data_cache_dir."
) -> None:
    """Have ``write`` fill a temporary folder beside ``folder`` and rename it; on an error nothing is left.

    Args:
        replace: take the place of a folder that is there; else the one that is there first stays.
        way_out: what to do if the place cannot be written to.

    Raises:
        ValueError: the place cannot be written to.
    """
    temporary, old = (folder.with_name(f".{folder.name}.{name}-{socket.gethostname()}-{os.getpid()}") for name in "no")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"The folder {folder.parent} cannot be written to ({error}). {way_out}") from None
    try:
        with announced(_lock_of(folder)):
            _fill(temporary, write, folder, old, replace)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _fill(temporary: Path, write: Callable[[Path], None], folder: Path, old: Path, replace: bool) -> None:
    """``write_folder`` without cleaning up; ``old`` is where a folder goes that is replaced."""
    write(temporary)
    now = time.time()  # this machine's clock, also where a file server has another
    os.utime(temporary, (now, now))
    while True:
        try:
            temporary.rename(folder)
            return
        except OSError:  # a folder is there: from before, or another process was faster
            if not folder.is_dir():
                raise
        if not replace:
            return
        with contextlib.suppress(FileNotFoundError):
            folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def write_file(path: str | Path, text: str) -> Path:
    """Write the file at once: it is whole, or what it was before."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def wait_for_folder(
    folder: Path, patience: float = _PATIENCE_SECONDS, *, written_since: float = 0.0, silence: float = _SILENCE_SECONDS
) -> None:
    """Wait until another process has finished ``folder``. It appears by a rename, so there are no half-written ones.

    Polling, not a collective: preparing may take longer than a collective's timeout.

    Args:
        patience: seconds to wait for a process that is at work.
        written_since: seconds since the epoch; a folder that is older is about to be replaced.
        silence: seconds to wait for one to begin.

    Raises:
        WriterGone: the process that was at work has ended without a result.
        TimeoutError: nothing came in time.
    """
    lock, began, met = _lock_of(folder), time.monotonic(), False
    while not _is_written(folder, written_since):
        if is_announced(lock):
            met = True
        elif met and not _is_written(folder, written_since):
            raise WriterGone("the process with LOCAL_RANK 0 has ended while it tokenised; its own message says why")
        waited = time.monotonic() - began
        if waited > (patience if met else min(patience, silence)):
            raise TimeoutError(
                f"Waited {waited:.0f} s for the tokenised data at {folder}, which the process with LOCAL_RANK 0 "
                "writes. See that process's log; all ranks of a machine must see the same data_cache_dir."
            )
        time.sleep(_POLL_SECONDS)


def process_start() -> float:
    """When this process began, in seconds since the epoch: the launcher's other processes write nothing before that."""
    import psutil

    return float(psutil.Process().create_time())


def _is_written(folder: Path, since: float) -> bool:
    try:
        return folder.stat().st_mtime >= since
    except FileNotFoundError:
        return False
