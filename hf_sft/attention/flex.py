"""``flex``: torch's FlexAttention with a ``BlockMask`` made from tile lists (``hf_sft.attention.tiles``).

Shapes: T tokens of the packed row, padded to n tiles of 128; H query heads, K key-value heads, E head width.

FlexAttention (arXiv 2412.05496) runs one fused kernel over the listed tiles, and evaluates the rule inside the partial ones from
the layout's integers on the device. The lists are made once per micro-batch and kind of layer. Rows are padded to few lengths
(``tiles.padded_length``), because a kernel is compiled for each; padding sees itself and is cut off again. On CUDA the function
is compiled; on a CPU it runs unfused, and forward only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo import config as compiler_config
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad
from transformers import PreTrainedModel

from hf_sft.attention.layout import Layout
from hf_sft.attention.protocol import LAYOUT_KEY, Routed, common_dtype, layer_windows, refuse_dropout
from hf_sft.attention.segment import segment_attention
from hf_sft.attention.tiles import TILE, padded_length, tile_table

# Compilations for which room is asked: four lengths per doubling, with and without window, with and without gradients.
_MOST_COMPILATIONS = 64


def flex_layout_attention(
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
    """Attention over a packed row; arguments and result as for ``segment_attention``.

    Raises:
        ValueError: gradients asked for on a CPU, attention dropout, attention sinks.
    """
    layout: Layout | None = kwargs.get(LAYOUT_KEY)
    if layout is None:
        return segment_attention(
            module, query, key, value, attention_mask, scaling, dropout, sliding_window, softcap, s_aux
        )
    refuse_dropout("flex", dropout)
    if s_aux is not None:
        raise ValueError("the flex backend has no attention sinks: choose attention_backend segment or dense")
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError(
            "FlexAttention has no backward pass on a CPU: train with attention_backend segment or dense there; "
            "flex trains on CUDA"
        )
    length = query.shape[2]
    mask = block_mask(layout, sliding_window)
    rows = (0, 0, 0, mask.shape[-1] - length)
    query, key, value = (pad(x, rows) for x in common_dtype(query, key, value))
    with compiler_config.patch(recompile_limit=_MOST_COMPILATIONS):
        output = _kernel(query.device.type)(
            query,
            key,
            value,
            score_mod=_soft_cap(softcap),
            block_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output[:, :, :length].transpose(1, 2).contiguous(), None


class Flex(Routed):
    """FlexAttention; on a CPU for forward passes only."""

    name = "flex"
    function = staticmethod(flex_layout_attention)

    def install(self, model: PreTrainedModel) -> None:
        refuse_dropout("flex", getattr(model.config.get_text_config(), "attention_dropout", None) or 0.0)
        super().install(model)

    def inputs(self, model: PreTrainedModel, layout: Layout) -> dict[str, Any]:
        for window in set(layer_windows(model.config).values()):
            block_mask(layout, window)  # the lists go to the device before the first layer asks for them
        return super().inputs(model, layout)


def block_mask(layout: Layout, window: int | None = None) -> BlockMask:
    """The mask of one kind of layer, [1, 1, padded, padded]; made once per layout."""
    return layout.kept(("flex", window), lambda: _block_mask(layout, window))


def _block_mask(layout: Layout, window: int | None) -> BlockMask:
    padded = padded_length(sum(layout.doc_lengths))
    table = tile_table(layout, padded, window)
    partial_counts, partial_tiles = _lists(table.partial, layout.doc.device)
    full_counts, full_tiles = _lists(table.full, layout.doc.device)
    # The lists of query tiles per key tile, which the backward pass walks, are transposed from these by torch.
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_tiles,
        full_counts,
        full_tiles,
        BLOCK_SIZE=TILE,
        mask_mod=_mask_mod(layout, padded, window),
        seq_lengths=(padded, padded),
    )


def _lists(tiles: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """[n, n] bool to the number [1, 1, n] of key tiles of each query tile and the key tiles [1, 1, n, n], those first; int32."""
    numbers = tiles.sum(1), np.argsort(~tiles, axis=1, kind="stable")
    counts, order = (torch.from_numpy(part[None, None].astype(np.int32)).to(device) for part in numbers)
    return counts, order


def _mask_mod(layout: Layout, padded: int, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """``Layout.allowed`` for one pair, as FlexAttention asks it: of tensors of the padded length."""
    added = padded - len(layout.doc)
    device = layout.doc.device
    # Every token of padding is a document of its own.
    alone = len(layout.doc_lengths) + torch.arange(added, dtype=torch.int32, device=device)
    doc, pos = torch.cat([layout.doc.int(), alone]), pad(layout.pos.int(), (0, added))
    if layout.block is None or layout.limit is None:

        def clean(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (doc[q] == doc[k]) & (k <= q)

        seen = clean
    else:
        block, limit = pad(layout.block.int(), (0, added), value=-1), pad(layout.limit.int(), (0, added), value=1)

        def dual(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            in_block = (block[q] == block[k]) & (k <= q)
            return (doc[q] == doc[k]) & torch.where(block[k] < 0, pos[k] < limit[q], in_block)

        seen = dual
    if window is None:
        return seen

    def windowed(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen(batch, head, q, k) & (pos[q] - pos[k] < window)

    return windowed


@functools.cache
def _soft_cap(softcap: float | None) -> Callable[..., Tensor] | None:
    if softcap is None:
        return None

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@functools.cache
def _kernel(device: str) -> Callable[..., Any]:
    """FlexAttention, compiled where it has fused kernels. Static lengths; a graph break would be slow without a word."""
    if device == "cpu":
        return flex_attention
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
