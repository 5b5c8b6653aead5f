"""Supervised fine-tuning of causal language models with the Hugging Face Trainer.

Names are imported when they are first used: ``import hf_sft`` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# bitsandbytes (0.50) warns at import about a CPU kernel that is not installed; models/quantization.py switches it off anyway.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_EXPORTS = {
    "CausalCollator": "hf_sft.collators",
    "DPOArguments": "hf_sft.arguments",
    "DPOTrainer": "hf_sft.training.dpo",
    "DataArguments": "hf_sft.arguments",
    "EMAArguments": "hf_sft.arguments",
    "EvaluationArguments": "hf_sft.arguments",
    "LoraArguments": "hf_sft.arguments",
    "ModelArguments": "hf_sft.arguments",
    "MonitoringArguments": "hf_sft.arguments",
    "SFTTrainer": "hf_sft.training.trainer",
    "TrainingArguments": "hf_sft.training_arguments",
    "WeDLMArguments": "hf_sft.arguments",
    "WeDLMCollator": "hf_sft.collators",
    "WeDLMConfig": "hf_sft.models.wedlm",
    "WeDLMForCausalLM": "hf_sft.models.wedlm",
    "encode_conversation": "hf_sft.data.chat",
    "generate_wedlm": "hf_sft.generation",
    "load_model": "hf_sft.models.loading",
    "load_tokenizer": "hf_sft.models.loading",
    "merge_adapter": "hf_sft.merging",
    "pack_documents": "hf_sft.data.packing",
    "parse_args": "hf_sft.parsing",
}

if TYPE_CHECKING:
    from hf_sft.arguments import (
        DataArguments,
        DPOArguments,
        EMAArguments,
        EvaluationArguments,
        LoraArguments,
        ModelArguments,
        MonitoringArguments,
        WeDLMArguments,
    )
    from hf_sft.collators import CausalCollator, WeDLMCollator
    from hf_sft.data.chat import encode_conversation
    from hf_sft.data.packing import pack_documents
    from hf_sft.generation import generate_wedlm
    from hf_sft.merging import merge_adapter
    from hf_sft.models.loading import load_model, load_tokenizer
    from hf_sft.models.wedlm import WeDLMConfig, WeDLMForCausalLM
    from hf_sft.parsing import parse_args
    from hf_sft.training.dpo import DPOTrainer
    from hf_sft.training.trainer import SFTTrainer
    from hf_sft.training_arguments import TrainingArguments

__all__ = [
    "CausalCollator",
    "DPOArguments",
    "DPOTrainer",
    "DataArguments",
    "EMAArguments",
    "EvaluationArguments",
    "LoraArguments",
    "ModelArguments",
    "MonitoringArguments",
    "SFTTrainer",
    "TrainingArguments",
    "WeDLMArguments",
    "WeDLMCollator",
    "WeDLMConfig",
    "WeDLMForCausalLM",
    "__version__",
    "encode_conversation",
    "generate_wedlm",
    "load_model",
    "load_tokenizer",
    "merge_adapter",
    "pack_documents",
    "parse_args",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
