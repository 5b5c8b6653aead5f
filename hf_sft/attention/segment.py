"""``segment``: the row cut at the document borders, so that the cost is near the area of the rule and SDPA's fast kernels apply.

Shapes: T tokens of the packed row, H query heads, K key-value heads (H divisible by K), E head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hf_sft.attention.layout import Group, Layout, causal_mask
from hf_sft.attention.protocol import LAYOUT_KEY, Routed, Rules

_LEAST_BLOCK = 128  # queries under a sliding window: smaller blocks cost more calls than they save area
Kernel = Callable[[Tensor, Tensor, Tensor, Layout, Rules], Tensor]


def with_layout(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    """``kernel`` as a function of transformers' ``AttentionInterface``; without a layout it runs like sdpa.

    The function takes ``query`` [1, H, T, E], ``key`` and ``value`` [1, K, T, E], a mask that is used only without a layout
    (bool, True where a key may be seen), and the options of ``Rules``; it returns [1, T, H, E] and None.
    """

    @functools.wraps(kernel)
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        rules = Rules(**{name: options[name] for name in Rules._fields if name in options})
        layout: Layout | None = options.get(LAYOUT_KEY)
        if layout is not None:
            return kernel(query, key, value, layout, rules), None
        key, value = _for_each_query_head(query, key, value)
        causal = attention_mask is None and query.shape[2] > 1
        return _attend(query, key, value, attention_mask, causal, rules).transpose(1, 2).contiguous(), None

    return attention


@with_layout
def segment_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rules: Rules) -> Tensor:
    """Attention within each document of a packed row."""
    key, value = _for_each_query_head(query, key, value)
    # split, not slices: its backward is one concatenation instead of a full-length gradient per document.
    documents = zip(*(stream.split(layout.doc_lengths, dim=2) for stream in (query, key, value)), strict=True)
    outputs = []
    if layout.pieces is None:
        for q, k, v in documents:
            outputs += _attend_causal(q, k, v, layout, rules)
    else:
        start = 0
        for (q, k, v), (length, groups) in zip(documents, layout.pieces, strict=True):
            outputs += _attend_dual(q, k, v, length, groups, layout, start, rules)
            start += q.shape[2]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def _for_each_query_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values once per query head, [1, H, T, E]."""
    shared = query.shape[1] // key.shape[1]
    if shared == 1:
        return key, value
    return key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)


def _attend_causal(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rules: Rules) -> list[Tensor]:
    """One clean stream. Where a sliding window ends before the document does, block by block of queries, each with the keys
    of its own block and those that the window reaches before it: twice the area of the band (from windows of 128 on), and not
    the square of the document."""
    window, length = rules.sliding_window, q.shape[2]
    if window is None or length <= window:
        return [_attend(q, k, v, None, True, rules)]
    size = max(window, _LEAST_BLOCK)
    reach = slice(size - window + 1, None)
    blocks = zip(*(stream.split(size, dim=2) for stream in (q, k, v)), strict=True)
    outputs, before = [], (k[:, :, :0], v[:, :, :0])
    for q_b, k_b, v_b in blocks:
        keys, values = (torch.cat(pair, dim=2) for pair in zip(before, (k_b, v_b), strict=True))
        mask = _band_mask(q_b.shape[2], keys.shape[2], window, layout)
        outputs.append(_attend(q_b, keys, values, mask, False, rules))
        before = (k_b[:, :, reach], v_b[:, :, reach])
    return outputs


def _band_mask(queries: int, keys: int, window: int, layout: Layout) -> Tensor:
    """[queries, keys] bool, the last of ``keys`` rows; kept, since every layer asks for it again."""
    make = lambda: causal_mask(keys, window, layout.doc.device)[-queries:]  # noqa: E731
    return layout.kept(("band", queries, keys, window), make)


def _attend_dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clean: int,
    groups: list[Group],
    layout: Layout,
    start: int,
    rules: Rules,
) -> list[Tensor]:
    """A document's clean stream, and its noisy stream group by group: each sees the clean tokens up to its largest anchor, from
    where a sliding window begins, and itself, so that the cost is near the area of the rule. ``start`` is the first row."""
    sizes = [clean, *(group.length for group in groups)]
    (q0, *q_groups), (k0, *k_groups), (v0, *v_groups) = (stream.split(sizes, dim=2) for stream in (q, k, v))
    outputs = _attend_causal(q0, k0, v0, layout, rules)
    row, window = start + clean, rules.sliding_window
    for group, q_n, k_n, v_n in zip(groups, q_groups, k_groups, v_groups, strict=True):
        seen = slice(group.first(window), group.clean)
        mask = layout.group_mask(start, row, group, window)
        keys, values = (torch.cat([k0[:, :, seen], k_n], dim=2), torch.cat([v0[:, :, seen], v_n], dim=2))
        outputs.append(_attend(q_n, keys, values, mask, False, rules))
        row += group.length
    return outputs


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, rules: Rules) -> Tensor:
    """One block of attention; [B, H, Q, E]. Soft caps and sinks are beyond the fused kernels and are written out."""
    scaling, dropout, _, softcap, s_aux = rules
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
