"""What stands in memory between two steps: weights, gradients, optimizer states, counted to the byte on the meta device."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_sft.arguments import LoraArguments
from hf_sft.checks import is_true
from hf_sft.models.adapters import add_adapter
from hf_sft.models.families import STATE_SPACE_BARE_LAYERS, STATE_SPACE_TYPES
from hf_sft.models.freezing import freeze
from hf_sft.models.wrappers import base_model

Held = Callable[[torch.Tensor], int]  # bytes that an optimizer holds for a parameter


@dataclass(frozen=True)
class State:
    """Bytes of one process without an engine; ``frozen`` and ``trained`` count numbers of parameters.

    Args:
        frozen_weights: bytes of what is not trained.
        trained_weights, gradients, optimizer: bytes that belong to what is.
        moments: float32 numbers that the optimizer holds for each trained one, where it takes them one by one (engines).
        shapes: of the trained parameters, in their order.
    """

    frozen: int
    trained: int
    frozen_weights: int
    trained_weights: int
    gradients: int
    optimizer: int
    moments: int = 2
    shapes: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    @property
    def total(self) -> int:
        return self.frozen_weights + self.trained_weights + self.gradients + self.optimizer

    def per_device(
        self, engine: str, devices: int, *, half: bool = True, reshard: bool = True, adapter: bool = False
    ) -> Shards:
        """What each of N devices holds under an engine: the table of docs/distributed.md, frozen weights as they are stored.
        T trained numbers, with m moments each (AdamW 2):

        | engine | weights    | gradients  | optimizer                                |
        |--------|------------|------------|------------------------------------------|
        | ddp    | as they are, and buckets of 4 T                                      |
        | zero1  | 2 T        | 2 T        | (4 + 4 m) T / N: masters and moments     |
        | zero2  | 2 T        | 2 T / N    | (4 + 4 m) T / N                          |
        | zero3  | 2 T / N    | 2 T / N    | (4 + 4 m) T / N, and frozen weights / N  |
        | fsdp   | 4 T / N    | 4 T / N    | 4 m T / N, and frozen weights / N        |

        Args:
            half: bf16 or fp16; in float32 DeepSpeed's weights and gradients have 4 bytes.
            reshard: False: FSDP2 keeps the gathered weights from the forward to the backward pass.
            adapter: what is trained is one; ZeRO-3 leaves its weights in float32, as DeepSpeed casts none that it has sharded.
        """
        trained, wide = float(self.trained), 2 if half else 4
        moments = 4 * self.moments * trained / devices
        if engine in ("none", "ddp"):
            buckets = 4 * trained if engine == "ddp" else 0
            return Shards(self.frozen_weights + self.trained_weights, self.gradients, self.optimizer, buckets)
        if engine in ("zero1", "zero2", "zero3"):
            weights = self.frozen_weights + (4 if adapter and engine == "zero3" else wide) * trained
            weights = weights / devices if engine == "zero3" else weights
            gradients = wide * trained / (1 if engine == "zero1" else devices)
            return Shards(weights, gradients, 4 * trained / devices + moments, 0)
        if engine == "fsdp":
            whole = 0 if reshard else wide * (trained + self.frozen)
            return Shards((self.frozen_weights + 4 * trained) / devices, 4 * trained / devices, moments, whole)
        raise ValueError(f"engine is {engine!r}; choose none, ddp, zero1, zero2, zero3 or fsdp")


@dataclass(frozen=True)
class Shards:
    """Bytes on each device; ``buffers`` are copies that stand beside the rest."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers


# ---- models without storage ----


def build(config: Any, dtype: torch.dtype, *, layers: int | None = None) -> Any:
    """The model of ``config`` on the current device, with its first ``layers`` layers, or more than it has.

    Raises:
        ValueError: sizes that no model can have.
    """
    config = copy.deepcopy(config)
    if (own := config.get_text_config().num_hidden_layers) < 1:
        raise ValueError(f"num_hidden_layers is {own} in the model's config: it must be 1 or more")
    if layers is not None:
        text = config.get_text_config()
        kinds = getattr(text, "layer_types", None)
        text.num_hidden_layers = layers
        if kinds and not isinstance(getattr(type(text), "layer_types", None), property):
            text.layer_types = (list(kinds) * layers)[:layers]
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"no {config.model_type} model can be built from the config ({' '.join(str(error).split())}): correct its sizes"
        ) from error


def with_adapter(model: Any, lora: LoraArguments, input_rows: Sequence[int] = ()) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that take no adapter
        return add_adapter(model, lora, input_token_ids=input_rows)


def nf4_bytes(weight: torch.Tensor, *, double: bool = True) -> int:
    """Bytes of a weight in NF4 (arXiv 2305.14314): half a byte per number, a scale per block of 64, a table of 16 floats.

    Double quantisation: scales of one byte with a table of 256 floats, a float32 for each 256 of them, their mean.
    """
    blocks = -(-weight.numel() // 64)
    scales = blocks + 4 * 256 + 4 * -(-blocks // 256) + 4 if double else 4 * blocks
    return -(-weight.numel() // 2) + scales + 16 * 4


def int8_bytes(weight: torch.Tensor) -> int:
    """Bytes of a weight in 8 bits (arXiv 2208.07339): one per number, and a float32 for each row."""
    return weight.numel() + 4 * weight.shape[0]


def quantised_layers(base: Any) -> Iterator[nn.Linear]:
    """The linear layers that QLoRA quantises: all but the head, and but those whose weights a state-space model reads bare."""
    head, kind = base.get_output_embeddings(), base.config.model_type
    bare = STATE_SPACE_BARE_LAYERS if kind in STATE_SPACE_TYPES else frozenset()
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and module is not head and name.rsplit(".", 1)[-1] not in bare:
            yield module


def state_of(
    config: Any,
    mode: str,
    lora: LoraArguments,
    *,
    dtype: torch.dtype | None = None,
    quantization: str = "nf4",
    double: bool = True,
    optim: str = "adamw_torch_fused",
    optim_args: str | None = None,
    frozen: Sequence[str] = (),
    input_rows: Sequence[int] = (),
) -> State:
    """Bytes of ``config`` in ``train_mode`` full, lora or qlora, as ``load_model`` and the Trainer hold it.

    Args:
        dtype: of the loaded weights; default: float32 in full training, else bfloat16.
        frozen: patterns of ``freeze``.
        input_rows: tokens whose rows of the embedding an adapter trains.
    """
    with torch.device("meta"):
        model = build(config, dtype or (torch.float32 if mode == "full" else torch.bfloat16))
        size: Callable[[torch.Tensor], int] = (
            int8_bytes if quantization == "int8" else lambda w: nf4_bytes(w, double=double)
        )
        stored = {id(each.weight): size(each.weight) for each in quantised_layers(model)} if mode == "qlora" else {}
        model = model if mode == "full" else with_adapter(model, lora, input_rows)
    if frozen:
        freeze(model, frozen)
    held = optimizer_bytes(optim, base_model(model), optim_args)[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in model.parameters() if not p.requires_grad]
    return State(
        frozen=sum(p.numel() for p in rest),
        trained=sum(p.numel() for p in trained),
        frozen_weights=sum(stored.get(id(p), p.nbytes) for p in rest),
        trained_weights=sum(p.nbytes for p in trained),
        gradients=sum(p.nbytes for p in trained),
        optimizer=sum(map(held, trained)),
        moments=_moments(optim, optim_args),
        shapes=tuple(tuple(p.shape) for p in trained),
    )


# ---- optimizers ----


def optimizer_bytes(optim: str, model: nn.Module | None = None, optim_args: str | None = None) -> tuple[Held, bool]:
    """Bytes that ``TrainingArguments.optim`` holds for a parameter, and whether that is counted: others are taken for AdamW.

    Args:
        model: for the embeddings, whose moments the Trainer keeps in 32 bits under optimizers of 8 bits.
        optim_args: of TrainingArguments, such as ``momentum=0.9``.
    """
    embeddings = {id(m.weight) for m in (model.modules() if model is not None else ()) if isinstance(m, nn.Embedding)}
    if optim in _EIGHT_BITS:
        moments = _EIGHT_BITS[optim]

        def held(parameter: torch.Tensor) -> int:
            numbers = parameter.numel()
            if numbers < 4096 or id(parameter) in embeddings:
                return 4 * moments * numbers
            return moments * (numbers + 4 * -(-numbers // 256))

        return held, True
    if optim in _KERNELS:
        return lambda parameter: 4 * _KERNELS[optim] * parameter.numel(), True
    if optim == "adafactor":
        return _factored, True
    moments, step = _moments(optim, optim_args), 0 if optim == "sgd" else 4
    return lambda parameter: moments * parameter.nbytes + step, optim in _TORCH


# optim -> moments, of bitsandbytes and apex, whose kernels make nothing beside them: in float32, or of one byte per number with a
# float32 for each 256, where small weights keep 4 bytes (arXiv 2110.02861).
_KERNELS = {
    **dict.fromkeys(("adamw_apex_fused", "paged_adamw_32bit"), 2),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), 1),
}
_EIGHT_BITS = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), 2),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1),
}
_TORCH = frozenset({"adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"})


def _moments(optim: str, optim_args: str | None) -> int:
    """Numbers that an optimizer of PyTorch holds for each trained one."""
    asked = dict(_name_and_value(part) for part in (optim_args or "").replace(" ", "").split(",") if part)
    momentum = optim in ("sgd", "rmsprop") and float(asked.get("momentum", 0)) != 0
    centered = optim == "rmsprop" and is_true(asked.get("centered"))
    return {"sgd": 0, "adagrad": 1, "rmsprop": 1}.get(optim, 2) + momentum + centered


def _name_and_value(part: str) -> tuple[str, str]:
    name, equals, value = part.partition("=")
    if not equals:
        raise ValueError(f"optim_args has {part!r}: write name=value, with commas between them, such as momentum=0.9")
    return name, value


def _factored(parameter: torch.Tensor) -> int:
    """Adafactor (arXiv 1804.04235): for a matrix one float32 per row and column; and one for the parameter's own size."""
    if parameter.ndim < 2:
        return 4 * parameter.numel() + 4
    return 4 + 4 * (parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2])


def step_bytes(
    optim: str, shapes: Sequence[Sequence[int]], device: str, *, decays: bool = False, itemsize: int = 4
) -> int:
    """Temporaries of the optimizer's step over one group of parameters.

    PyTorch goes over all of a group at once on CUDA (``foreach``), where temporaries are as large as the group, and over one
    after the other elsewhere, where the last one's still stand while the next one's are made. So does Adafactor everywhere, and
    what is not counted is taken for AdamW that does. The fused AdamW, bitsandbytes and apex make none.

    Args:
        shapes: of the parameters as this device holds them.
        decays: the group has weight decay, which all but AdamW add to a copy of the gradient.
        itemsize: bytes of a number.
    """
    if optim == "adamw_torch_fused" or optim in _KERNELS or optim in _EIGHT_BITS:
        return 0
    sizes = [itemsize * math.prod(shape) for shape in shapes]
    if optim in _TORCH and device == "cuda":
        return sum(sizes) * {"adamw_torch": 1, "sgd": int(decays), "adagrad": 2}.get(optim, 1 + decays)
    if optim == "sgd":
        return max(sizes, default=0) * decays
    own = 1 + decays if optim in ("adagrad", "rmsprop") else 2
    return max((before + own * size for before, size in zip([0, *sizes], sizes, strict=False)), default=0)
