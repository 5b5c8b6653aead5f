"""Quantised bases for QLoRA (arXiv 2305.14314): NF4 and 8-bit through bitsandbytes, on CPU and CUDA."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from hf_sft.models.families import STATE_SPACE_BARE_LAYERS, STATE_SPACE_TYPES, use_plain_linear_layers

logger = logging.getLogger(__name__)


def quantization_config(kind: str, dtype: torch.dtype, config: PretrainedConfig, *, double: bool) -> BitsAndBytesConfig:
    """How the linear layers are held; ``dtype`` is that of the products and of all that is not quantised, such as the head.

    Raises:
        ValueError: bitsandbytes is not installed, ``kind`` is neither nf4 nor int8, or int8 for latent attention (DeepSeek).
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("train_mode qlora needs bitsandbytes, which is not installed: pip install bitsandbytes")
    use_plain_linear_layers(config)
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
        if getattr(config.get_text_config(), "kv_lora_rank", None):
            raise ValueError(
                f"quantization is int8, and the latent attention of a {config.model_type} model hands its layers tensors of four "
                "dimensions, where bitsandbytes (0.50) takes up to three: use nf4."
            )
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


def tell_unquantized(model: PreTrainedModel, kind: str) -> None:
    """Say which matrices of a model that was loaded as ``kind`` are held as they are, apart from embeddings, head and norms.

    Raises:
        ValueError: no layer is quantised at all.
    """
    packed = {name for name, parameter in model.named_parameters() if parameter.dtype in (torch.uint8, torch.int8)}
    if not packed:
        raise ValueError(
            f"train_mode is qlora, and {kind} reaches no layer of {type(model).__name__}: the base would be held whole. Use "
            "train_mode lora."
        )
    vocabulary = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    vocabulary |= set() if head is None else {id(head.weight)}
    whole = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name not in packed and id(parameter) not in vocabulary
    }
    if not whole:
        return
    held = sum(parameter.nbytes for parameter in whole.values())
    share = held / sum(parameter.nbytes for parameter in model.parameters())
    logger.warning(
        "%s leaves matrices as they are, %.0f %% of the model's memory: %s.",
        kind, 100 * share, ", ".join(sorted({".".join(_stem(name).split(".")[-2:]) for name in whole})),
    )  # fmt: skip


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def keep_trainable_on_cpu(model: PreTrainedModel) -> None:
    """Keep bitsandbytes (0.50) from repacking 4-bit weights for AVX512-BF16 inference.

    The first forward in eval mode would repack them for good: no gradient passes such a layer afterwards, without a word, and
    widths that are no multiple of 32 raise. To be removed once bitsandbytes undoes the packing in training mode.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
