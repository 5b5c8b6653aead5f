"""A stand-in for MagiAttention: its kernel's definition in plain torch, under the signatures of two releases."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def pairs(length: int, queries: Any, keys: Any, kinds: Any) -> Tensor:
    """[T, T] how often each pair is named, by the kernel's definition: causal ranges are aligned at the bottom right."""
    named = torch.zeros(length, length, dtype=torch.int64)
    for (q0, q1), (k0, k1), kind in zip(queries.tolist(), keys.tolist(), kinds.tolist(), strict=True):
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.int64)
        named[q0:q1, k0:k1] += seen if kind == 0 else seen.tril(k1 - k0 - (q1 - q0))
    return named


def from_ranges(q: Tensor, k: Tensor, v: Tensor, q_ranges: Tensor, k_ranges: Tensor, kinds: Tensor, scale, softcap):
    """The attention that ranges mean, [T, H, d]."""
    assert q_ranges.dtype == k_ranges.dtype == kinds.dtype == torch.int32
    assert all(x.is_contiguous() for x in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    allowed = pairs(len(q), q_ranges, k_ranges, kinds) > 0
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


def first_release(
    q, k, v, q_ranges, k_ranges, max_seqlen_q: int, max_seqlen_k: int, attn_type_map=None, softmax_scale=None, softcap=0.0
):  # fmt: skip
    assert (
        max_seqlen_q == (q_ranges[:, 1] - q_ranges[:, 0]).max()
        and max_seqlen_k == (k_ranges[:, 1] - k_ranges[:, 0]).max()
    )
    return from_ranges(q, k, v, q_ranges, k_ranges, attn_type_map, softmax_scale, softcap), torch.zeros(0)


def later_release(
    q, k, v, q_ranges=None, k_ranges=None, attn_type_map=None, *, sink=None, softmax_scale=None, softcap=0.0, sm_margin=0
):  # fmt: skip
    assert sink is None
    out = from_ranges(q, k, v, q_ranges, k_ranges, attn_type_map, softmax_scale, softcap)
    return out, types.SimpleNamespace(lse=None)


def fake_module(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Any] = later_release) -> None:
    """Put a MagiAttention with this kernel in the place of the real one."""
    api = types.ModuleType("magi_attention.api")
    api.flex_flash_attn_func = kernel
    package = types.ModuleType("magi_attention")
    package.api = api
    monkeypatch.setitem(sys.modules, "magi_attention", package)
    monkeypatch.setitem(sys.modules, "magi_attention.api", api)
