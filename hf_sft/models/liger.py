"""``use_liger_kernel``: Liger's Triton kernels for the layers (Hsu et al., arXiv 2410.10989); the loss stays ours.

Liger's norms, rotary positions and gated feed-forward networks take the places of the model's own. Its two losses do not:
``fused_linear_cross_entropy`` would replace the model's forward and the scoring of chosen rows under weights
(``hf_sft.models.head``), ``cross_entropy`` a function that this project does not call.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from hf_sft.models.wrappers import base_model

logger = logging.getLogger(__name__)

_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")


def apply_liger(model: Any, config: Mapping[str, bool] | None) -> dict[str, bool]:
    """Put Liger's kernels into the layers of ``model``, in place, before anything is measured on it.

    Args:
        model: a causal LM, bare or with PEFT.
        config: the user's ``liger_kernel_config``: which kernels, all by default.

    Returns:
        The config for Trainer, which applies it once more and changes nothing by that.

    Raises:
        ValueError: without Liger, for a model or a kernel that it has not.
    """
    kernels = {**(config or {}), **dict.fromkeys(_LOSSES, False)}
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise ValueError(f"use_liger_kernel is true ({error}): pip install liger-kernel, or leave it out") from error
    base = base_model(model)
    known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    kind = base.config.model_type
    if kind not in known:
        raise ValueError(f"use_liger_kernel is true, and Liger has no kernels for models of type {kind}: leave it out")
    allowed = inspect.signature(known[kind]).parameters.keys() - {"model", *_LOSSES}
    if unknown := sorted(set(kernels) - allowed - set(_LOSSES)):
        raise ValueError(
            f"liger_kernel_config names {', '.join(unknown)}: for models of type {kind} Liger has {', '.join(sorted(allowed))}"
        )
    monkey_patch._apply_liger_kernel_to_instance(model=base, **kernels)
    used = sorted(name for name in allowed if kernels.get(name, True))
    logger.info("Liger's kernels run in the layers: %s; the head and its loss are this project's own", ", ".join(used))
    return kernels
