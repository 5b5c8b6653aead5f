"""Bytes of tensors: those that given tensors hold, and those that operations make while they run."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def allocated(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind the tensors, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make inside the block, as long as they live; also those of fake tensors.

    Args:
        known: tensors that are not counted; what else was there before the block is counted once an operation returns it.

    Attributes:
        now: bytes that live.
        most: the largest value of ``now`` since the block began, or since ``restart``.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.now = self.most = 0
        for tensor in known:
            self._follow(tensor.untyped_storage(), 0)

    def restart(self) -> None:
        """Look for the largest value from here on."""
        self.most = self.now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._live:
                self._follow(storage, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return output

    def _follow(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata not in self._live:
            self._live[storage._cdata] = size
            weakref.finalize(storage, self._gone, storage._cdata)  # another may stand at its address afterwards

    def _gone(self, storage: int) -> None:
        self.now -= self._live.pop(storage, 0)
