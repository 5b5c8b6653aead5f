"""How far a merged model is from the adapter on the base that it was trained on, measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from hf_sft.merging.quantised import load_quantised, training_quantisation
from hf_sft.models.inference import adapter_tokenizer, base_arguments, load_for_inference, put_adapter

PROBE_TOKENS = 48
_SHARE = 0.5  # of the free memory that one model may take


@dataclass(frozen=True)
class Difference:
    """Logits of the merged model against those of the adapter on its base.

    Attributes:
        largest: of all absolute differences.
        spread: the largest logit less the smallest one.
        base: how the base was held.
    """

    largest: float
    spread: float
    base: str

    def __str__(self) -> str:
        share = self.largest / self.spread if self.spread else float("nan")
        return (
            f"largest difference of the logits to the adapter on its base ({self.base}): {self.largest:.3g}, {share:.2g} of "
            f"their spread ({PROBE_TOKENS} random tokens)"
        )


def too_large_to_check(merged: str) -> str | None:
    """Why the merged model is not loaded for a comparison: it does not fit into half of the free memory; None if it does."""
    size = sum(path.stat().st_size for path in Path(merged).glob("*.safetensors"))
    on_gpu = torch.cuda.is_available()  # where models are loaded to decode with them
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    if size <= _SHARE * free:
        return None
    return f"the model has {size / 1e9:.1f} GB, more than half of the {free / 1e9:.1f} GB of free memory"


@torch.inference_mode()
def measure_difference(
    adapter: str,
    merged: str,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    double_quantization: bool | None = None,
    compute_dtype: str | None = None,
    averaged: bool = True,
) -> Difference:
    """Run 48 random tokens through the adapter on its base, held as in training, and through ``merged``.

    The two models are in memory one after the other. The arguments are those of :func:`merge.merge_adapter`.
    """
    named = base_arguments(adapter, base, trust_remote_code=trust_remote_code)
    quantised = training_quantisation(adapter, quantization, double_quantization, compute_dtype)
    model: Any
    if quantised is None:
        model, tokenizer = load_for_inference(
            adapter, base=base, trust_remote_code=trust_remote_code, averaged=averaged
        )
        held = str(model.dtype).removeprefix("torch.")
    else:
        tokenizer = adapter_tokenizer(adapter, named)
        model = put_adapter(load_quantised(named, quantised), adapter, len(tokenizer), averaged=averaged).eval()
        held = str(quantised)
    ids = torch.randint(len(tokenizer), (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    expected = _logits(model, ids)
    del model
    whole, _ = load_for_inference(merged, trust_remote_code=trust_remote_code)
    found = _logits(whole, ids)
    spread = (expected.max() - expected.min()).item()
    return Difference((found - expected).abs().max().item(), spread, held)


def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
