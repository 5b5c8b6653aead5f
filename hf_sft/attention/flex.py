"""``flex``: torch's FlexAttention with a ``BlockMask`` made from tile lists (``hf_sft.attention.tiles``).

Shapes: T tokens of the packed row, padded to n tiles of 128; H query heads, K key-value heads, E head width.

FlexAttention (arXiv 2412.05496) runs one fused kernel over the listed tiles, and evaluates the rule inside the partial ones from
the layout's integers on the device. The lists are made once per micro-batch and kind of layer, by the loader's workers where
there are any (``Flex.host_part``), and those that the backward pass walks with them. Rows are padded to few lengths
(``tiles.padded_length``), because a kernel is compiled for each; padding sees itself and is cut off again. On CUDA the function
is compiled; on a CPU it runs unfused, and forward only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as compiler_config
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad
from transformers import PreTrainedModel

from hf_sft.attention.layout import Layout
from hf_sft.attention.protocol import Routed, Rules, common_dtype, layer_windows, refuse_dropout, refuse_sinks, sent_to
from hf_sft.attention.segment import with_layout
from hf_sft.attention.tiles import TILE, TileLists, padded_length, tile_lists

# Compilations for which room is asked: four lengths per doubling, with and without window, with and without gradients.
_MOST_COMPILATIONS = 64


@with_layout
def flex_layout_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rules: Rules) -> Tensor:
    """Attention over a packed row.

    Raises:
        ValueError: gradients asked for on a CPU, attention dropout, attention sinks.
    """
    refuse_dropout("flex", rules.dropout)
    refuse_sinks("flex", rules)
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError(
            "FlexAttention has no backward pass on a CPU: train with attention_backend segment or dense there; "
            "flex trains on CUDA"
        )
    length = query.shape[2]
    mask = block_mask(layout, rules.sliding_window)
    padding = (0, 0, 0, mask.shape[-1] - length)
    query, key, value = (pad(x, padding) for x in common_dtype(query, key, value))
    with compiler_config.patch(recompile_limit=_MOST_COMPILATIONS):
        output = _kernel(query.device.type)(
            query,
            key,
            value,
            score_mod=_soft_cap(rules.softcap),
            block_mask=mask,
            scale=rules.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output[:, :, :length].transpose(1, 2).contiguous()


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

    def host_part(self, model: PreTrainedModel) -> TileLists:
        return TileLists(tuple(dict.fromkeys(layer_windows(model.config).values())))


def block_mask(layout: Layout, window: int | None = None) -> BlockMask:
    """The mask of one kind of layer, [1, 1, padded, padded]; made once per layout."""
    return layout.kept(("flex", window), lambda: _block_mask(layout, window))


def _block_mask(layout: Layout, window: int | None) -> BlockMask:
    padded, device = padded_length(sum(layout.doc_lengths)), layout.doc.device
    made = (layout.tiles or {}).get(window)
    lists = sent_to(tile_lists(layout, window) if made is None else made, device)
    counts, tiles = lists[:, None, None, :, 0], lists[:, None, None, :, 1:]
    partial, full, partial_of_keys, full_of_keys = ((_own(counts[i]), _own(tiles[i])) for i in range(4))
    rule = _mask_mod(layout, padded, window)
    return BlockMask((padded, padded), *partial, *full, *partial_of_keys, *full_of_keys, (TILE, TILE), rule)


def _own(part: Tensor) -> Tensor:
    """A copy in memory of its own, whose beginning is aligned as kernels want it."""
    return part.clone(memory_format=torch.contiguous_format)


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
