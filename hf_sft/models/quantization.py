"""Quantised bases for QLoRA (arXiv 2305.14314): NF4 and 8-bit through bitsandbytes, on CPU and CUDA."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

# Layers of state-space models whose weights the forward reads directly, on its fused path or always: neither an adapter nor a
# quantised weight takes effect there.
STATE_SPACE_TYPES = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
STATE_SPACE_BARE_LAYERS = frozenset({"conv1d", "x_proj", "dt_proj", "out_proj"})


def quantization_config(kind: str, dtype: torch.dtype, config: PretrainedConfig, *, double: bool) -> BitsAndBytesConfig:
    """How the linear layers are held; ``dtype`` is that of the products and of all that is not quantised, such as the head.

    Raises:
        ValueError: bitsandbytes is not installed, or ``kind`` is neither nf4 nor int8.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("train_mode qlora needs bitsandbytes, which is not installed: pip install bitsandbytes")
    # None: transformers finds the head and what is tied to it; a list of one's own replaces that.
    skipped = [*sorted(STATE_SPACE_BARE_LAYERS), "lm_head"] if config.model_type in STATE_SPACE_TYPES else None
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    if kind == "int8":
        logger = logging.getLogger("bitsandbytes.autograd._functions")
        if not any(isinstance(present, _NoCastWarning) for present in logger.filters):
            logger.addFilter(_NoCastWarning())
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    raise ValueError(f"quantization is {kind!r}; choose nf4 or int8.")


class _NoCastWarning(logging.Filter):
    """bitsandbytes (0.50) logs a warning about float16 in every 8-bit layer at every forward; the type is its own choice."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "will be cast from" not in str(record.msg)


def quantized_device(training: Any = None) -> str:
    """Where a quantised base is put while it is read: this process's own GPU, or the CPU."""
    if getattr(training, "use_cpu", False) or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"


def keep_trainable_on_cpu(model: PreTrainedModel) -> None:
    """Keep bitsandbytes (0.50) from repacking 4-bit weights for AVX512-BF16 inference.

    The first forward in eval mode would repack them for good: no gradient passes such a layer afterwards, without a word, and
    widths that are no multiple of 32 raise. To be removed once bitsandbytes undoes the packing in training mode.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
