"""What activation checkpointing keeps of a layer, and what it computes again.

| policy    | kept                                             | computed again in the backward pass              |
|-----------|--------------------------------------------------|--------------------------------------------------|
| full      | the layer's input                                | everything                                       |
| attention | and the outputs of attention kernels             | matrix products, norms, activations, rotations   |
| products  | and the outputs of matrix products               | norms, activations, rotations                    |

Operations are told by the names under which torch dispatches them (selective checkpointing, ``torch.utils.checkpoint``).
Scores that attention writes out, [heads, queries, keys], are products as well; they are larger than what they are made of, and
are computed again under every policy. So are the products of experts that add their biases in place (gpt-oss).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_ATTENTION = frozenset(
    [f"aten::_scaled_dot_product_{kind}" for kind in (
        "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
        "fused_attention_overrideable",
    )]
    + ["aten::_flash_attention_forward", "aten::_efficient_attention_forward", "aten::_cudnn_attention_forward"]
    + ["torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward"]
    + ["flex_attention", "inductor_compiled_code"]  # the second is how compiled FlexAttention shows itself
)  # fmt: skip
_BATCHED = frozenset(["aten::bmm", "aten::baddbmm"])
_GROUPED = frozenset(["aten::_grouped_mm", "aten::_scaled_grouped_mm", "transformers::grouped_mm_fallback"])
_PRODUCTS = (
    frozenset(f"aten::{name}" for name in ("mm", "addmm", "linear", "_int_mm", "_scaled_mm")) | _BATCHED | _GROUPED
)
_KEPT = {"attention": _ATTENTION, "products": _ATTENTION | _PRODUCTS}


def keep_in_layers(model: Any, policy: str, settings: dict[str, Any] | None) -> None:
    """Switch activation checkpointing on with a policy; to be called where ``Trainer`` has switched it on without.

    Args:
        model: bare or with PEFT, before an engine wraps it.
        policy: ``attention`` or ``products``.
        settings: ``activation_checkpointing_kwargs`` of the training arguments; they are not changed.
    """
    kept = _KEPT[policy]
    if any(getattr(module, "has_bias", False) for module in model.modules()):
        kept -= _BATCHED | _GROUPED  # what is kept must not be changed in place
    settings = dict(settings or {})
    layers = {name: settings.pop(name) for name in ("every_n_layers", "offload") if name in settings}
    settings |= {"use_reentrant": False, "context_fn": functools.partial(_contexts, kept)}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings, **layers)


def show_compiled_kernels() -> None:
    """Let policies see what is compiled, as FlexAttention is on CUDA, where this release of torch can."""
    from torch._inductor import config

    if hasattr(config, "wrap_inductor_compiled_regions"):
        config.wrap_inductor_compiled_regions = True


def _contexts(kept: frozenset[str]) -> Any:
    return create_selective_checkpoint_contexts(functools.partial(_decide, kept))


def _decide(kept: frozenset[str], context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = _name(operation)
    if name not in kept or (name in _BATCHED and _grows(context.op_output, args)):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


@functools.cache
def _name(operation: Any) -> str:
    """``aten::mm``; its overload that writes into a tensor it is given, as compiled code calls it, is ``aten::mm.out``."""
    return str(operation.name())


def _grows(product: Tensor, factors: tuple[Any, ...]) -> bool:
    return product.numel() > sum(factor.numel() for factor in factors[-2:] if isinstance(factor, torch.Tensor))
