"""``segment``: the row cut at the document borders, so that the cost is near the area of the rule and SDPA's fast kernels apply.

Shapes: T tokens of the packed row, H query heads, K key-value heads (H divisible by K), E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hf_sft.attention.layout import Group, Layout, causal_mask
from hf_sft.attention.protocol import LAYOUT_KEY, Routed


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each document of a packed row.

    Args:
        query: [1, H, T, E]; key, value: [1, K, T, E].
        attention_mask: used only without a layout: bool, True where a key may be seen.
        scaling: factor on the scores; ``1 / sqrt(E)`` by default.
        sliding_window: the layer's own window in tokens.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        s_aux: [H] attention sinks: one more score per head that takes probability and adds no value (gpt-oss).

    Returns:
        [1, T, H, E] and None.
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    rules: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "s_aux": s_aux}
    layout: Layout | None = kwargs.get(LAYOUT_KEY)
    if layout is None:
        causal = attention_mask is None and query.shape[2] > 1
        return _attend(query, key, value, attention_mask, causal, **rules).transpose(1, 2).contiguous(), None
    # split, not slices: its backward is one concatenation instead of a full-length gradient per document.
    documents = zip(*(stream.split(layout.doc_lengths, dim=2) for stream in (query, key, value)), strict=True)
    outputs = []
    if layout.pieces is None:
        for q, k, v in documents:
            outputs.append(_attend_causal(q, k, v, sliding_window, rules))
    else:
        start = 0
        for (q, k, v), (length, groups) in zip(documents, layout.pieces, strict=True):
            outputs += _attend_dual(q, k, v, length, groups, layout, start, sliding_window, rules)
            start += q.shape[2]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _attend_causal(q: Tensor, k: Tensor, v: Tensor, window: int | None, rules: dict[str, Any]) -> Tensor:
    """One clean stream; the mask is written out only where a sliding window ends before the document does."""
    beyond = window is not None and q.shape[2] > window
    mask = causal_mask(q.shape[2], window, q.device) if beyond else None
    return _attend(q, k, v, mask, mask is None, **rules)


def _attend_dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clean: int,
    groups: list[Group],
    layout: Layout,
    start: int,
    window: int | None,
    rules: dict[str, Any],
) -> list[Tensor]:
    """A document's clean stream, and its noisy stream group by group: each sees the clean tokens up to its largest anchor and
    itself, so that the cost is near the area of the rule. ``start`` is the document's first row."""
    sizes = [clean, *(group.length for group in groups)]
    (q0, *q_groups), (k0, *k_groups), (v0, *v_groups) = (stream.split(sizes, dim=2) for stream in (q, k, v))
    outputs = [_attend_causal(q0, k0, v0, window, rules)]
    row = start + clean
    for group, q_n, k_n, v_n in zip(groups, q_groups, k_groups, v_groups, strict=True):
        mask = layout.group_mask(start, row, group, window)
        keys, values = (
            torch.cat([k0[:, :, : group.clean], k_n], dim=2),
            torch.cat([v0[:, :, : group.clean], v_n], dim=2),
        )
        outputs.append(_attend(q_n, keys, values, mask, False, **rules))
        row += group.length
    return outputs


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    *,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """One block of attention; [B, H, Q, E]. Soft caps and sinks are beyond the fused kernels and are written out."""
    if softcap is None and s_aux is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling)
    scores = torch.matmul(q, k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = causal_mask(q.shape[2], None, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, sinks], dim=-1)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    if s_aux is not None:
        probabilities = probabilities[..., :-1]
    return torch.matmul(nn.functional.dropout(probabilities, p=dropout), v)


class Segment(Routed):
    """Scaled dot-product attention per document, and per group of blocks in noisy streams."""

    name = "segment"
    function = staticmethod(segment_attention)
