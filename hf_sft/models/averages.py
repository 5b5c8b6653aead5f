"""An exponential moving average of weights: average = d * average + (1 - d) * weights, after each optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

AVERAGE_FILE = "ema.safetensors"


def has_average(folder: str | Path) -> bool:
    """Whether an average lies beside the weights in a folder."""
    return Path(folder, AVERAGE_FILE).is_file()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an average is made of: everything that is trained, of an adapter's model the adapter alone."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class WeightAverage:
    """The average of some parameters, in float32 (float64 for such parameters).

    Args:
        parameters: name -> parameter; what they hold now is where the average begins.
        decay: d, in (0, 1).
        device: where the average is kept; None: beside each parameter.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], decay: float, device: torch.device | str | None = None
    ) -> None:
        self.parameters, self.decay, self.device = dict(parameters), decay, device
        self.average = {name: self._held(parameter).clone() for name, parameter in self.parameters.items()}
        self._is_in = False

    def _held(self, parameter: Tensor) -> Tensor:
        """The values of a parameter as the average is kept."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return parameter.detach().to(self.device or parameter.device, dtype)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are."""
        for name, parameter in self.parameters.items():
            self.average[name].mul_(self.decay).add_(self._held(parameter), alpha=1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the average, rounded to their own types; behind, exactly what they held before."""
        if self._is_in:
            yield
            return
        kept = {name: parameter.detach().to(self.device, copy=True) for name, parameter in self.parameters.items()}
        self._write(self.average)
        self._is_in = True
        try:
            yield
        finally:
            self._write(kept)
            self._is_in = False

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save(self, folder: str | Path) -> None:
        """Write ``ema.safetensors``: the average by the names of its parameters."""
        file = Path(folder) / AVERAGE_FILE
        save_file({name: value.contiguous() for name, value in self.average.items()}, file, {"format": "pt"})

    def load(self, folder: str | Path) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            ValueError: it is of other parameters.
        """
        held = read_average(folder, {name: value.shape for name, value in self.average.items()})
        for name, value in self.average.items():
            value.copy_(held[name])


def read_average(folder: str | Path, shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of ``ema.safetensors``.

    Raises:
        ValueError: they are not of parameters of these names and shapes.
    """
    file = Path(folder) / AVERAGE_FILE
    held = load_file(file)
    if different := sorted(
        name for name in {*held, *shapes} if name not in held or held[name].shape != shapes.get(name)
    ):
        raise ValueError(f"{file} is the average of other weights than are trained here: {', '.join(different[:3])}")
    return held
