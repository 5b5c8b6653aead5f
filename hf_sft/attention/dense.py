"""``dense``: the rule written out as a mask. Right wherever a model honours 4-D masks, and the reference for the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sft.attention.layout import Layout
from hf_sft.attention.protocol import layer_windows, no_router_loss


class Dense:
    """The rule as a 4-D mask [1, 1, T, T] per kind of layer, through the model's own attention."""

    name = "dense"
    half_only = False

    def install(self, model: PreTrainedModel) -> None:
        layer_windows(model.config)  # other kinds of layers do not read the mask
        own = model.config._attn_implementation
        if own not in ("sdpa", "eager"):
            raise ValueError(
                f"the dense backend writes masks for the attention implementations sdpa and eager, and the model uses {own!r}; "
                "load it with attn_implementation='sdpa', or choose attention_backend segment"
            )

    def inputs(self, model: PreTrainedModel, layout: Layout) -> dict[str, Any]:
        additive = model.config._attn_implementation == "eager"
        windows = layer_windows(model.config)
        masks = {kind: as_mask(layout.allowed(window), additive, model.dtype) for kind, window in windows.items()}
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return {"attention_mask": mask, **no_router_loss(model)}

    def host_part(self, model: PreTrainedModel) -> None:
        return None


def as_mask(allowed: Tensor, additive: bool, dtype: torch.dtype) -> Tensor:
    """[..., Q, K] bool to a 4-D mask, [1, 1, Q, K] where two dimensions are given, which keys each query sees.

    Bool for SDPA; for eager attention, which adds its mask, 0 or the minimum of ``dtype``.
    """
    allowed = allowed[(None,) * (4 - allowed.ndim)]
    if not additive:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)
