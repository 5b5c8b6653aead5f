"""The adapter's update of one tensor, rows at a time.

LoRA: W + s B A (arXiv 2106.09685; s = alpha / r, rsLoRA alpha / sqrt(r), arXiv 2312.03732). DoRA: m (W + s B A) / |W + s B A|,
the norm over the inputs of each output (arXiv 2402.09353). W [out, in], A [r, in], B [out, r], m [out]; the weight of a Conv1D
layer is [in, out], that of an embedding [V, H], both the transpose of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import Embedding
from torch import Tensor

from hf_sft.tensor_files import StreamedTensor


def grown(tensor: StreamedTensor, rows: int) -> StreamedTensor:
    """``tensor`` with rows appended up to ``rows``, each the mean of those that are there."""
    old = tensor.count
    total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    for a, b in tensor.pieces():
        total += tensor.rows(a, b).sum(dim=0, dtype=torch.float64)
    mean = (total / old).to(tensor.dtype)

    def longer(a: int, b: int) -> Tensor:
        stored = tensor.rows(min(a, old), min(b, old))
        return torch.cat([stored, mean.expand(max(b, old) - max(a, old), *mean.shape)])

    return replace(tensor, shape=(rows, *tensor.shape[1:]), rows=longer)


def with_rows(tensor: StreamedTensor, ids: Sequence[int], values: Tensor) -> StreamedTensor:
    """``tensor`` with the rows ``ids`` (V) replaced by ``values`` [len(ids), H]."""
    index = torch.tensor(list(ids))
    new = values.detach()

    def replaced(a: int, b: int) -> Tensor:
        inside = (index >= a) & (index < b)
        rows = _wide(tensor.rows(a, b))
        rows[index[inside] - a] = new[inside].to(rows.dtype)
        return _finite(rows)

    return replace(tensor, rows=replaced)


def with_bias(tensor: StreamedTensor, layer: Any, adapter: str) -> StreamedTensor:
    """The bias of ``layer`` with that of B, where B has one (``lora_bias`` of PEFT)."""
    added = layer.lora_B[adapter].bias.detach().float() * layer.scaling[adapter]
    return replace(tensor, rows=lambda a, b: _finite(_wide(tensor.rows(a, b)).add_(added[a:b])))


def with_lora(tensor: StreamedTensor, layer: Any, adapter: str) -> StreamedTensor:
    """``tensor``, the weight under the LoRA ``layer`` of PEFT (a linear layer, Conv1D or an embedding), with its update."""
    scale = layer.scaling[adapter]
    if isinstance(layer, Embedding):
        first, second = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    lora_a, lora_b = first.detach().float(), second.detach().float()
    transposed = isinstance(layer, Embedding) or bool(layer.fan_in_fan_out)

    def updated(a: int, b: int) -> Tensor:
        delta = (lora_b @ lora_a[:, a:b]).T if transposed else lora_b[a:b] @ lora_a
        return _wide(tensor.rows(a, b)).add_(delta.mul_(scale) if delta.is_contiguous() else delta * scale)

    if adapter not in layer.lora_magnitude_vector:
        return replace(tensor, rows=lambda a, b: _finite(updated(a, b)))
    magnitude = layer.lora_magnitude_vector[adapter].weight.detach().float()

    def by_row(a: int, b: int) -> Tensor:  # an output is a row
        rows = updated(a, b)
        return _finite(rows.mul_((magnitude[a:b] / torch.linalg.norm(rows, dim=1))[:, None]))

    if not transposed:
        return replace(tensor, rows=by_row)
    squares = torch.zeros(tensor.shape[1], dtype=torch.float64)
    for a, b in tensor.pieces():
        squares += updated(a, b).double().square_().sum(dim=0)
    factor = (magnitude / squares.sqrt()).float()
    return replace(tensor, rows=lambda a, b: _finite(updated(a, b).mul_(factor)))


def _wide(rows: Tensor) -> Tensor:
    """In float32 at least, and free to be written to."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _finite(rows: Tensor) -> Tensor:
    if not torch.isfinite(rows).all():
        raise ValueError("The merged weights are not finite: the adapter, or its base, holds NaN or infinite numbers.")
    return rows
