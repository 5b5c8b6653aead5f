"""Processes that must not leave each other waiting: what one of them raises, all raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


class ElsewhereError(ValueError):
    """Another process has raised what this message says."""


def gathered(value: Any) -> list[Any]:
    """``value`` of every process, in the order of ranks; all must call this."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def raised_together() -> Iterator[None]:
    """If one process raises inside, all raise at the end; what stands inside must not wait for other processes.

    Raises:
        ElsewhereError: in the processes that did not raise themselves.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    messages = gathered(None if error is None else str(error) or repr(error))
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise ElsewhereError(f"rank {rank}: {message}")
