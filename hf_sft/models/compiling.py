"""``torch_compile``: the regions of a decoder layer that consist of many small passes over memory, compiled in place.

Norms and feed-forward networks are such regions: a compiler makes one or two passes of their five to ten. Attention is not
compiled here: ``flex`` compiles itself, and the other backends run fused kernels over segments whose lengths differ from batch
to batch, which a compiler would specialise on. Nor is the head, whose logits are scored in chunks (``hf_sft.losses``).

A region lies within what activation checkpointing computes again, holds no module that hooks of an engine divide, and is called
alike in training, evaluation and decoding. Modules keep their classes and names, so checkpoints do not change. Equal regions
share what was compiled, and lengths are symbols: a run compiles each kind of region a few times, not once per length of a row.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_sft.models.wrappers import base_model

logger = logging.getLogger(__name__)

_ENDINGS = ("Norm", "MLP")
# Kinds of regions (norms of two widths, feed-forward) times modes (gradients or not, of the input or not, autocast or not).
_MOST_COMPILATIONS = 64


def regions(model: Any) -> dict[str, nn.Module]:
    """Norms and feed-forward networks inside decoder layers, by name; none within another."""
    found: dict[str, nn.Module] = {}
    base = base_model(model)
    for name, layer in base.named_modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        for inner, module in layer.named_modules(prefix=name):
            inside = any(inner.startswith(f"{outer}.") for outer in found)
            if type(module).__name__.endswith(_ENDINGS) and not inside:
                found[inner] = module
    return found


def compile_regions(model: Any, backend: str, mode: str | None) -> int:
    """Compile the regions of ``model`` in place, each at its first call; returns how many there are.

    Args:
        model: a causal LM, bare or with PEFT, before an engine wraps it.
        backend: of torch.compile: ``inductor``, or ``aot_eager`` and ``eager`` to look for errors.
        mode: of ``inductor``: None, ``default`` or ``max-autotune-no-cudagraphs``.

    Raises:
        ValueError: without a compiler, under ZeRO-3, for a model without such regions, for a mode without inductor.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "torch_compile is true under ZeRO-3, which gathers and frees the weights inside each region as it runs: use ZeRO-2 "
            "or FSDP, or leave torch_compile out"
        )
    if mode is not None and backend != "inductor":
        raise ValueError(
            f"torch_compile_mode is {mode!r} and torch_compile_backend {backend!r}: modes are inductor's; leave one out"
        )
    if backend == "inductor":
        check_compiler(next(base_model(model).parameters()).device.type)
    found = regions(model)
    if not found:
        raise ValueError(
            f"torch_compile is true, and {type(base_model(model)).__name__} has no norms and feed-forward networks in decoder "
            "layers that are known here: leave it out"
        )
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, _MOST_COMPILATIONS)
    for module in found.values():
        module.compile(backend=backend, mode=mode, dynamic=True)
    logger.info("%d norms and feed-forward networks are compiled by %s at their first call", len(found), backend)
    return len(found)


def check_compiler(device: str) -> None:
    """Raises ValueError where inductor cannot make machine code for ``device``."""
    if device == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError("torch_compile needs Triton for this GPU: pip install triton, or leave torch_compile out")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "torch_compile needs a C++ compiler on a CPU, and none is found: install g++ (apt-get install g++), or leave "
            "torch_compile out"
        ) from error
