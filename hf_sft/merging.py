"""Merging an adapter into its base: one model folder that needs no PEFT."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from hf_sft.arguments import ModelArguments
from hf_sft.checkpoints import verify_weights
from hf_sft.models.adapters import load_adapter, read_adapter_config
from hf_sft.models.loading import load_model, load_tokenizer
from hf_sft.models.vocabulary import grow_embeddings, vocabulary_rows

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def merge_adapter(
    adapter: str,
    output_dir: str,
    *,
    base: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write W + scale * B A for every adapted weight of the base, with the adapter's tokenizer, to ``output_dir``; returns it.

    Args:
        adapter: folder or hub name of a LoRA adapter (DoRA, rsLoRA, biases, saved modules and trained token rows included).
        base: folder or hub name of the base, where it is not what the adapter names. An adapter trained on a quantised base is
            merged into the original weights.
        dtype: type of the written weights; default: the base's own. Sums are rounded to it once.

    Raises:
        ValueError: no adapter, no base, an adapter of another base, or an output folder that holds something.
    """
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output_dir {output_dir!r} is not empty; a merged model is written to a new folder.")
    if dtype is not None and dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; choose float32, bfloat16 or float16.")
    config = read_adapter_config(adapter)
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"Adapter {adapter!r} does not name its base; give it with --base.")
    arguments = ModelArguments(
        model_name_or_path=base,
        model_revision=config.revision if base == config.base_model_name_or_path else None,
        trust_remote_code=trust_remote_code,
    )
    own = _own_dtype(arguments)
    # DoRA divides by a norm of the sum, so its sums are formed in float32; plain LoRA adds in float32 by itself.
    arguments.dtype = "float32" if config.use_dora else own  # type: ignore[assignment]
    model = cast(PreTrainedModel, load_model(arguments))
    tokenizer = load_tokenizer(
        ModelArguments(model_name_or_path=_tokenizer_source(adapter, base), trust_remote_code=trust_remote_code)
    )
    merged = _merge(model, adapter, len(tokenizer)).to(getattr(torch, dtype or own))
    if Path(adapter, "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(adapter)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        written = Path(beside) / "model"
        merged.save_pretrained(written)
        tokenizer.save_pretrained(written)
        _verify(written, trust_remote_code)
        if target.exists():
            target.rmdir()  # empty, as checked; rename wants it gone on some systems
        os.replace(written, target)
    logger.info("Merged %s into %s: %s", adapter, base, target)
    return str(target)


def _merge(model: PreTrainedModel, adapter: str, tokens: int) -> PreTrainedModel:
    """The base with the adapter in its weights; ``tokens`` of the adapter's tokenizer all have rows."""
    if tokens > vocabulary_rows(model):
        grow_embeddings(model, tokens)
    peft_model: PeftModel = load_adapter(model, adapter)
    merged = peft_model.merge_and_unload(safe_merge=True)  # safe: a NaN in the sum is an error
    merged.tie_weights()
    return merged


def _own_dtype(arguments: ModelArguments) -> str:
    """The type that the base's config states; float32 if it states none."""
    from hf_sft.models.loading import load_config

    stated = load_config(str(arguments.model_name_or_path), arguments).dtype
    name = str(stated).removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def _tokenizer_source(adapter: str, base: str) -> str:
    """The adapter's tokenizer, if it has one: training may have added tokens or a template."""
    if Path(adapter).is_dir() and not any(Path(adapter, name).is_file() for name in _TOKENIZER_FILES):
        logger.warning("%s holds no tokenizer; the base's is written.", adapter)
        return base
    return adapter


def _verify(folder: Path, trust_remote_code: bool) -> None:
    """The folder's config builds a model that has exactly the folder's tensors."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    verify_weights(folder, empty)
