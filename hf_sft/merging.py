"""Merging an adapter into its base: one model folder that needs no PEFT."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_sft.arguments import ModelArguments
from hf_sft.checkpoints import verify_weights
from hf_sft.models.adapters import read_adapter_config
from hf_sft.models.inference import DTYPES, adapter_tokenizer, base_arguments, own_dtype, put_adapter
from hf_sft.models.loading import load_model

logger = logging.getLogger(__name__)


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
    with new_folder(output_dir, "a merged model") as written:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; choose float32, bfloat16 or float16.")
        named = base_arguments(adapter, base, trust_remote_code=trust_remote_code)
        merged, tokenizer = load_merged(adapter, named, dtype=dtype)
        merged.save_pretrained(written)
        tokenizer.save_pretrained(written)
        _verify(written, trust_remote_code)
    logger.info("Merged %s into %s: %s", adapter, named.model_name_or_path, output_dir)
    return str(Path(output_dir))


@contextmanager
def new_folder(output_dir: str, what: str) -> Iterator[Path]:
    """A folder to write ``what`` to: it stands at ``output_dir`` if nothing fails, and nowhere otherwise.

    Raises:
        ValueError: something is there already.
    """
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output_dir {output_dir!r} is not empty; {what} is written to a new folder.")
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
            written = Path(beside) / "model"
            written.mkdir()
            yield written
            if target.exists():
                target.rmdir()  # empty, as checked; rename wants it gone on some systems
            os.replace(written, target)
    except BaseException:
        for parent in made:
            with suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise


def load_merged(
    adapter: str, base: ModelArguments, *, dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The base with the adapter in its weights, and the adapter's tokenizer, every token of which has a row.

    Args:
        base: as ``models.inference.base_arguments`` gives it.
        dtype: type of the weights; default: the base's own.
    """
    own = own_dtype(base)
    # DoRA divides by a norm of the sum, so its sums are formed in float32; plain LoRA adds in float32 by itself.
    summed: Any = "float32" if read_adapter_config(adapter).use_dora else own
    model = cast(PreTrainedModel, load_model(replace(base, dtype=summed)))
    tokenizer = adapter_tokenizer(adapter, base)
    merged = put_adapter(model, adapter, len(tokenizer)).merge_and_unload(safe_merge=True)  # safe: a NaN is an error
    merged.tie_weights()
    for parameter in merged.parameters():  # not the buffers: rotary frequencies are float32 in models of every type
        parameter.data = parameter.data.to(getattr(torch, dtype or own))
    return merged, tokenizer


def _verify(folder: Path, trust_remote_code: bool) -> None:
    """The folder's config builds a model that has exactly the folder's tensors."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    verify_weights(folder, empty)
