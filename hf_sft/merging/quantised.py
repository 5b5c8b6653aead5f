"""The base as a QLoRA run (arXiv 2305.14314) saw it: quantised, and read back as floats."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from hf_sft.arguments import LoraArguments, ModelArguments
from hf_sft.checkpoints import ARGUMENTS_FILE
from hf_sft.models.adapters import read_adapter_config
from hf_sft.models.inference import DTYPES
from hf_sft.models.loading import load_config, quantization_kind, resolve_dtype
from hf_sft.models.quantization import keep_trainable_on_cpu, quantization_config, quantized_device

logger = logging.getLogger(__name__)

KINDS = ("nf4", "int8")


@dataclass(frozen=True)
class Quantisation:
    """How a base was held while its adapter was trained.

    Attributes:
        kind: nf4 or int8.
        double: whether the scales of nf4 are quantised as well.
        dtype: type of the products and of all that is not quantised.
    """

    kind: str
    double: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        twice = " twice quantised" if self.double and self.kind == "nf4" else ""
        return f"{self.kind}{twice}, {str(self.dtype).removeprefix('torch.')} products"


def training_quantisation(
    adapter: str, kind: str | None = None, double: bool | None = None, dtype: str | None = None
) -> Quantisation | None:
    """How the base of ``adapter`` was quantised in training: what is given, else what the run's args.json says.

    The args.json is looked for in the adapter's folder and above it (a checkpoint-N). None: the run was none of qlora, or
    nothing is known of it and no ``kind`` is given. ``double`` and ``dtype`` that nobody says are train's own defaults.

    Raises:
        ValueError: a value that does not exist, or an args.json that cannot be read.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"quantization is {kind!r}; choose one of {', '.join(KINDS)}.")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"compute_dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    said = _recorded(adapter)
    if kind is None and said.get("train_mode") != "qlora":
        return None
    named = ModelArguments(
        model_name_or_path="base",
        train_mode="qlora",
        quantization=kind or said.get("quantization"),  # type: ignore[arg-type]  # checked above, or written by train
        double_quantization=bool(said.get("double_quantization", True) if double is None else double),
        dtype=dtype or said.get("dtype"),  # type: ignore[arg-type]
    )
    bias = LoraArguments(lora_bias=read_adapter_config(adapter).bias)
    found = Quantisation(str(quantization_kind(named)), named.double_quantization, resolve_dtype(named, bias))
    logger.info("The base of %s was trained on in %s.", adapter, found)
    return found


def _recorded(adapter: str) -> dict[str, Any]:
    """The fields of ModelArguments that the run's args.json holds; nothing if there is none."""
    for folder in (Path(adapter), Path(adapter).absolute().parent):
        path = folder / ARGUMENTS_FILE
        if not path.is_file():
            continue
        try:
            groups = json.loads(path.read_text(encoding="utf-8"))
            return dict(groups.get("model") or {})
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); give quantization by hand, or mend it.") from error
    return {}


class RoundTrip:
    """Gives a weight of the base as the quantised model computes with it.

    Attributes:
        names: the weights that training quantises. The scales of nf4 are quantised around the mean of all of them, so such a
            weight is needed whole; all others are cast to the type of training.
    """

    def __init__(self, config: PretrainedConfig, quantisation: Quantisation, trust_remote_code: bool = False) -> None:
        settings = quantization_config(quantisation.kind, quantisation.dtype, config, double=quantisation.double)
        import bitsandbytes as bnb  # after the line that says how to install it

        with torch.device("meta"):
            empty: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        quantizer: Any = AutoHfQuantizer.from_config(settings, pre_quantized=False)
        quantizer.preprocess_model(model=empty, device_map={"": "cpu"})
        layers = {
            f"{name}.weight": getattr(module, "source_cls", None)
            for name, module in empty.named_modules()
            if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
        }
        if not layers:
            raise ValueError(f"No layer of a {config.model_type} model is quantised; merge onto the original weights.")
        self.names = frozenset(layers)
        self.quantisation = quantisation
        self._transposed = {
            name for name, layer in layers.items() if layer is Conv1D
        }  # [in, out], quantised as [out, in]

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        if not weight.is_floating_point():
            return weight
        value = weight.to(self.quantisation.dtype)
        if name not in self.names:
            return value
        return self._back_and_forth(value.T).T if name in self._transposed else self._back_and_forth(value)

    def _back_and_forth(self, value: Tensor) -> Tensor:
        import bitsandbytes as bnb

        device, value = quantized_device(), value.contiguous()
        if self.quantisation.kind == "nf4":
            twice = self.quantisation.double
            held: Any = bnb.nn.Params4bit(value, requires_grad=False, quant_type="nf4", compress_statistics=twice)
            held = held.to(device)
            back = bnb.functional.dequantize_4bit(held.data, held.quant_state)
        else:
            held = bnb.nn.Int8Params(value, requires_grad=False)
            held = held.to(device)
            back = bnb.functional.int8_vectorwise_dequant(held.data, held.SCB).to(self.quantisation.dtype)
        return back.to("cpu").view(value.shape)


def load_quantised(base: ModelArguments, quantisation: Quantisation) -> PreTrainedModel:
    """The base as it was in training, without an adapter."""
    config = load_config(str(base.model_name_or_path), base)
    settings = quantization_config(quantisation.kind, quantisation.dtype, config, double=quantisation.double)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(base.model_name_or_path),
        config=config,
        dtype=quantisation.dtype,
        revision=base.model_revision,
        trust_remote_code=base.trust_remote_code,
        quantization_config=settings,
        device_map={"": quantized_device()},
    )
    if quantisation.kind == "nf4":
        keep_trainable_on_cpu(model)
    return model
