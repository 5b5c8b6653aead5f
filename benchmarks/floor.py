"""The matrix-multiplication floor of a machine: what the products of a training step take by themselves, measured."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn


def products_seconds(model: nn.Module, tokens: int, rows: int, repeats: int = 5) -> float:
    """Seconds that one step's products with weights take: forward, gradient of the input, gradient of the weight.

    Args:
        model: its linear layers work on ``tokens`` tokens, its head on ``rows``. Attention's products are left out.
        repeats: the median of so many runs of each product, after one that warms up.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    shapes: dict[tuple[int, int, int], int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shape = (rows if module is head else tokens, *module.weight.shape)
            shapes[shape] = shapes.get(shape, 0) + 1
    device, dtype = head.weight.device, head.weight.dtype
    return sum(count * _three_products(*shape, repeats, device, dtype) for shape, count in shapes.items())


def _three_products(
    rows: int, outputs: int, inputs: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> float:
    made = dict(device=device, dtype=dtype)
    x, weight, grad = (
        torch.randn(rows, inputs, **made),
        torch.randn(outputs, inputs, **made),
        torch.randn(rows, outputs, **made),
    )
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        torch.mm(x, weight.t())
        torch.mm(grad, weight)
        torch.mm(grad.t(), x)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
