"""Forwards that processes make in step: engines that gather weights (ZeRO-3, FSDP2) wait for all processes in each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_sft.decoding.passes import input_device
from hf_sft.models.wrappers import base_model


class Pace:
    """Calls a model; with ``together`` all processes make the same number of calls.

    Args:
        model: called whole, so that an engine's hooks fire.
        together: takes "this process still has work" and returns whether any process has; None: this process is alone.
    """

    def __init__(self, model: Any, together: Callable[[bool], bool] | None = None) -> None:
        self.model, self.together = model, together

    def __call__(self, **inputs: Any) -> Any:
        """One forward pass, announced to the others."""
        if self.together is not None:
            self.together(True)
        return self.model(**inputs)

    def wait(self) -> None:
        """Make forward passes that nobody reads until no process has work."""
        if self.together is None:
            return
        device = input_device(base_model(self.model))
        while self.together(False):
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
