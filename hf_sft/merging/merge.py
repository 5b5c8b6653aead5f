"""Merging an adapter into its base: one model folder that needs no PEFT."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import custom_object_save

from hf_sft.arguments import ModelArguments
from hf_sft.checkpoints import verify_weights
from hf_sft.merging.folders import new_folder
from hf_sft.merging.plan import Unsuited, heads_trained_apart, plan_merge
from hf_sft.merging.quantised import Quantisation, RoundTrip, training_quantisation
from hf_sft.models.adapters import read_adapter_config
from hf_sft.models.inference import DTYPES, adapter_tokenizer, base_arguments, own_dtype, put_adapter
from hf_sft.models.loading import load_config, load_model
from hf_sft.tensor_files import size_in_bytes, split_by_size, write_shards

logger = logging.getLogger(__name__)

ONTO = ("original", "dequantized")


def merge_adapter(
    adapter: str,
    output_dir: str,
    *,
    base: str | None = None,
    dtype: str | None = None,
    onto: str = "original",
    max_shard_size: int | str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    double_quantization: bool | None = None,
    compute_dtype: str | None = None,
    averaged: bool = True,
) -> str:
    """Write W + scale * B A for every adapted weight of the base, with the adapter's tokenizer, to ``output_dir``; returns it.

    The base is read and written a few rows at a time: what is in memory is the adapter and some 20 MB (and, onto dequantised
    weights, one tensor of the base). A base without safetensors files, or one that stores its weights in another form than it
    uses them in (fused experts), is merged in memory, and a warning says so.

    Args:
        adapter: folder or hub name of a LoRA adapter (DoRA, rsLoRA, biases, saved modules and trained token rows included).
        base: folder or hub name of the base, where it is not what the adapter names.
        dtype: type of the written weights; default: the one in which the base stores each, or the type of training's products
            onto dequantised weights. Sums are made in float32 and rounded to it once.
        onto: which weights of the base the update is added to: "original", or "dequantized", those that a qlora run computed
            with (quantised and read back).
        max_shard_size: bytes, or a size such as "5GB"; default: the files hold what the base's files hold.
        quantization: nf4 or int8: how the base was held in training, where no args.json beside the adapter says it; so are
            ``double_quantization`` and ``compute_dtype`` (float32, bfloat16, float16). What is given comes before the file.
        averaged: take the average of the adapter's weights where one lies beside them (ema.safetensors).

    Raises:
        ValueError: no adapter, no base, an adapter of another base, "dequantized" for a run that was none of qlora, or an
            output folder that holds something.
    """
    with new_folder(output_dir, "a merged model") as written:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; choose float32, bfloat16 or float16.")
        if onto not in ONTO:
            raise ValueError(f"onto is {onto!r}; choose one of {', '.join(ONTO)}.")
        largest = None if max_shard_size is None else size_in_bytes(max_shard_size)
        named = base_arguments(adapter, base, trust_remote_code=trust_remote_code)
        quantised = training_quantisation(adapter, quantization, double_quantization, compute_dtype)
        if onto == "original":
            quantised = None
        elif quantised is None:
            raise ValueError(
                f"onto is 'dequantized', and nothing says that {adapter!r} was trained by qlora: there is no args.json of such a "
                "run beside it. Give --quantization nf4 or int8, or merge onto the original weights."
            )
        tokenizer = adapter_tokenizer(adapter, named)
        _write(written, adapter, named, len(tokenizer), dtype, quantised, largest, averaged)
        tokenizer.save_pretrained(written)
        _verify(written, trust_remote_code)
    logger.info("Merged %s into %s: %s", adapter, named.model_name_or_path, output_dir)
    return str(Path(output_dir))


def load_merged(
    adapter: str,
    base: ModelArguments,
    *,
    dtype: str | None = None,
    quantised: Quantisation | None = None,
    averaged: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The base with the adapter in its weights, in memory, and the adapter's tokenizer, every token of which has a row.

    Args:
        base: as ``models.inference.base_arguments`` gives it.
        dtype: type of the weights; default: the one that the base's config states.
        quantised: take the base's weights after this, as :func:`merge_adapter` does onto dequantised ones.
        averaged: as of :func:`merge_adapter`.

    Raises:
        ValueError: as :func:`merge_adapter`; or the adapter gives embedding and head, which the base ties, two updates.
    """
    own = own_dtype(base)
    # DoRA divides by a norm of the sum, so its sums are formed in float32; plain LoRA adds in float32 by itself.
    summed: Any = "float32" if quantised is not None or read_adapter_config(adapter).use_dora else own
    model = cast(PreTrainedModel, load_model(replace(base, dtype=summed)))
    if quantised is not None:
        through = RoundTrip(model.config, quantised, base.trust_remote_code)
        for name, parameter in model.named_parameters():
            parameter.data = through(name, parameter.data).float()
        own = str(quantised.dtype).removeprefix("torch.")
    tokenizer = adapter_tokenizer(adapter, base)
    adapted = put_adapter(model, adapter, len(tokenizer), averaged=averaged)
    if heads_trained_apart(adapted):
        raise ValueError(
            f"{adapter!r} gives the embedding and the head of {base.model_name_or_path!r} two updates, and there they share one "
            "weight. Merge it by hf-sft merge onto a base in safetensors files, which writes them apart."
        )
    merged = adapted.merge_and_unload(safe_merge=True)  # safe: a NaN is an error
    merged.tie_weights()
    for parameter in merged.parameters():  # not the buffers: rotary frequencies are float32 in models of every type
        parameter.data = parameter.data.to(getattr(torch, dtype or own))
    return merged, tokenizer


def _write(
    folder: Path,
    adapter: str,
    base: ModelArguments,
    tokens: int,
    dtype: str | None,
    quantised: Quantisation | None,
    largest: int | None,
    averaged: bool,
) -> None:
    """The merged weights, config and generation config."""
    through = None
    if quantised is not None:
        config = load_config(str(base.model_name_or_path), base)
        through = RoundTrip(config, quantised, base.trust_remote_code)
    chosen = getattr(torch, dtype) if dtype is not None else quantised.dtype if quantised is not None else None
    try:
        plan = plan_merge(adapter, base, tokens, dtype=chosen, round_trip=through, averaged=averaged)
    except Unsuited as reason:
        logger.warning("%s is merged in memory, with its whole base: %s.", adapter, reason)
        merged: Any = load_merged(adapter, base, dtype=dtype, quantised=quantised, averaged=averaged)[0]
        merged.save_pretrained(folder, **({} if largest is None else {"max_shard_size": largest}))
        return
    shards = plan.shards
    if largest is not None:
        shards = split_by_size({name: tensor for part in shards for name, tensor in part.items()}, largest)
    write_shards(folder, shards)
    write_configs(folder, plan.model, chosen)


def write_configs(folder: Path, model: Any, dtype: torch.dtype | None = None) -> None:
    """Config, generation config and code of its own, as ``save_pretrained`` writes them.

    Args:
        dtype: of the weights, where it is not what the config states.
    """
    model.config.architectures = [type(model).__name__]
    if dtype is not None:
        model.config.dtype = str(dtype).removeprefix("torch.")
    if model.is_remote_code():
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _verify(folder: Path, trust_remote_code: bool) -> None:
    """The folder's config builds a model that has exactly the folder's tensors."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    verify_weights(folder, empty)
