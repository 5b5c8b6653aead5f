"""Imports without garbage collection: a third of the time that torch and transformers take to load, and a second at the exit."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_own_process = False


def take_process() -> None:
    """The process runs one command and nothing else: how it collects garbage is ours to say."""
    global _own_process
    _own_process = True


@contextmanager
def importing() -> Iterator[None]:
    """Around imports: modules live as long as the process, and looking through them for garbage, again and again, finds none.

    Behind the block garbage is collected as before, but not in what is there by then (``gc.freeze``). Does nothing in a process
    that is not ours: a notebook, a test, a user's own script.
    """
    if not _own_process or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
