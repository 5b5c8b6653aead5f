"""The peak of a training: what stands in memory and what a micro-batch adds, at each moment of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from hf_sft.arguments import LoraArguments
from hf_sft.memory.activations import Activations, MicroBatch, Run, activations_of, evaluation_bytes
from hf_sft.memory.states import Shards, State, build, optimizer_bytes, state_of, step_bytes

GIB = 2**30
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GiB of usual GPUs
_RESERVE = 2 * GIB  # for what is not counted, and a tenth of the sum


@dataclass(frozen=True)
class Plan:
    """A training as far as its memory goes.

    Args:
        config: of the model.
        train_mode, lora, quantization, double_quantization, dtype, freeze: as the arguments of these names.
        precision: bf16, fp16, or None for float32.
        engine: none, ddp, zero1, zero2, zero3 or fsdp, over ``devices`` processes.
        reshard: False under FSDP2's shard_grad_op.
        offload_optimizer, offload_param: in the memory of the host.
        bucket: numbers of a bucket of DeepSpeed; default: its own. 0: the square of the width, as for ``auto``.
        overlap: ``overlap_comm``: ZeRO-1 and 2 have two such buckets.
        sub_group: numbers that ZeRO-3 steps at a time.
        engine_file: DeepSpeed's settings are from a file.
        optim, optim_args: as in TrainingArguments; decays: ``weight_decay`` is not 0.
        average: of the weights (``ema_decay``): "device", "host" or None.
        reference: a second model in memory (dpo).
        batch, accumulation: the micro-batch, and how many make a step.
        sync_each_batch: FSDP2 sends the gradients of every micro-batch, and keeps only its part of their sum
            (``gradient_accumulation_kwargs`` of ``accelerator_config``).
        eval_rows: ``per_device_eval_batch_size`` where there is an evaluation, else 0.
        checkpointing, policy: ``activation_checkpointing`` and its policy.
        checkpointing_of_fsdp: ``fsdp_config`` asks for it, and not ``activation_checkpointing``.
        backend: ``attention_backend``.
        device: cuda or cpu.
    """

    config: Any
    train_mode: str = "full"
    lora: LoraArguments = field(default_factory=LoraArguments)
    quantization: str = "nf4"
    double_quantization: bool = True
    dtype: torch.dtype | None = None
    freeze: tuple[str, ...] = ()
    precision: str | None = "bf16"
    engine: str = "none"
    devices: int = 1
    reshard: bool = True
    offload_optimizer: bool = False
    offload_param: bool = False
    bucket: int = 500_000_000
    overlap: bool = False
    sub_group: int = 10**9
    engine_file: bool = False
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    decays: bool = False
    average: str | None = None
    reference: bool = False
    batch: MicroBatch = field(default_factory=lambda: MicroBatch(1, 2048))
    accumulation: int = 1
    sync_each_batch: bool = False
    eval_rows: int = 0
    checkpointing: bool = False
    policy: str = "full"
    checkpointing_of_fsdp: bool = False
    backend: str = "auto"
    device: str = "cuda"

    @property
    def chosen_backend(self) -> str:
        """``backend``, or what auto takes where nothing speaks against it."""
        if self.backend != "auto":
            return self.backend
        if self.device != "cuda":
            return "segment"
        if self.batch.objective == "wedlm":
            return "flex"
        text, half = self.config.get_text_config(), self.precision is not None or self.run_dtype != torch.float32
        beyond = getattr(text, "attn_logit_softcapping", None) or text.model_type == "gpt_oss"
        return "flash" if half and not beyond else "segment"

    @property
    def attention(self) -> str:
        """What the backend is counted as: the kernels of flash, flex and magi keep the same."""
        return self.chosen_backend if self.chosen_backend in ("dense", "segment") else "fused"

    @property
    def run_dtype(self) -> torch.dtype:
        """Of the base's weights as they are stored."""
        return self.dtype or (torch.float32 if self.train_mode == "full" else torch.bfloat16)

    @property
    def sends_late(self) -> bool:
        """Whether gradients stand whole until the last of several micro-batches, as FSDP2 sends none before (``no_sync``)."""
        return self.engine == "fsdp" and self.accumulation > 1 and not self.sync_each_batch

    @property
    def layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers

    @property
    def run(self) -> Run:
        """As the forward meets the weights: under autocast as they are stored, under engines in the type of the products."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[self.precision]
        casts = self.engine.startswith("zero") or (self.engine == "fsdp" and half is not None)
        return Run(
            mode=self.train_mode,
            dtype=(half or torch.float32) if casts else self.run_dtype,
            autocast=None if casts else half,
            uniform=casts and not (self.engine == "zero3" and self.train_mode != "full"),  # it casts no sharded weights
            partitioned=self.engine == "zero3",
            lora=self.lora,
            checkpointing=self.checkpointing,
            policy=self.policy,
            attention=self.attention,
            device=self.device,
        )

    @cached_property
    def state(self) -> State:
        rows = (0,) if self.batch.objective == "wedlm" and self.train_mode != "full" else ()
        return state_of(
            self.config,
            self.train_mode,
            self.lora,
            dtype=self.dtype,
            quantization=self.quantization,
            double=self.double_quantization,
            optim=self.optim,
            optim_args=self.optim_args,
            frozen=self.freeze,
            input_rows=rows,
        )

    @cached_property
    def activations(self) -> Activations:
        key = f"{self.config.to_json_string()} {self.run} {self.batch}"
        return _counted(_Request(key, (self.config, self.run, self.batch)))


@dataclass(frozen=True)
class _Request:
    key: str
    arguments: tuple[Any, Run, MicroBatch] = field(compare=False)


@lru_cache(maxsize=64)  # changes of engines and devices ask for the same again
def _counted(request: _Request) -> Activations:
    return activations_of(*request.arguments)


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device.

    Args:
        moments: moment of a step -> part -> bytes.
        host: what offloading keeps in the memory of the host, for each device.
    """

    moments: dict[str, dict[str, int]]
    host: int = 0

    @property
    def moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """What stands in memory at the peak."""
        found = self.moments[self.moment]
        return {name: found[name] for name in sorted(found, key=_order) if found[name]}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def card(self) -> int | None:
        """GiB of the smallest usual GPU that this fits on, with room for what is not counted."""
        return next((size for size in CARDS if fits(self.total, size)), None)


def _order(part: str) -> int:
    first = ("weights", "gradients", "optimizer")
    return first.index(part) if part in first else len(first)


def fits(total: int, memory: float) -> bool:
    """Whether ``total`` bytes and what is not counted (a tenth and 2 GiB) are below ``memory`` GiB."""
    return 1.1 * total + _RESERVE < memory * GIB


def estimate(plan: Plan) -> Estimate:
    """The parts at each moment of an optimizer step, in bytes of one device.

    Raises:
        ValueError: a model that cannot be built, or an engine or policy that does not exist.
    """
    found, layers, state = plan.activations, plan.layers, plan.state
    shards = state.per_device(
        plan.engine,
        plan.devices,
        half=plan.precision is not None,
        reshard=plan.reshard,
        adapter=plan.train_mode != "full",
    )
    shards, host = _offloaded(plan, shards)
    average = 4 * state.trained if plan.average else 0
    always = {
        "weights": round(shards.weights),
        "optimizer": round(shards.optimizer),
        "average of the weights": average if plan.average == "device" else 0,
        "reference model": _reference_bytes(plan),
    }
    buffers = {name: round(shards.buffers) + size for name, size in buffers_of(plan)._asdict().items()}
    gradients = round(shards.gradients)
    # Between two steps there are none, but in ZeRO-3's buffer.
    standing = gradients if plan.accumulation > 1 or plan.engine == "zero3" else 0
    if plan.sends_late:
        standing = 4 * state.trained
    of_head = min(gradients, _head_gradient(plan))
    batch = {"attention mask": found.mask, "activations": found.kept(layers)}
    passing = batch | {"weights in autocast's type": found.copies(layers)}
    low = {"attention mask": found.mask, "activations": found.outside + found.layer}
    standing_buffers = {"engine's buffers": buffers["forward"] if plan.engine in ("ddp", "zero3") else 0}
    held = {name: {"engine's buffers": size} for name, size in buffers.items()}
    moments = {
        "forward pass": {"gradients": standing, **passing, "a layer's temporaries": found.forward, **held["forward"]},
        "scoring of the head": {"gradients": standing, **passing, "head": found.head, **held["head"]},
        "backward pass of the head": {"gradients": standing, **batch, "head": found.head_backward, **held["last"]},
        "backward pass, last layer": {
            "gradients": max(standing, of_head),
            **batch,
            "a layer's backward pass": found.backward,
            **held["last"],
        },
        "backward pass, first layer": {
            "gradients": max(standing, gradients),
            **low,
            "a layer's backward pass": found.backward,
            **held["first"],
        },
        "end of the backward pass": {
            "gradients": max(standing, gradients),
            "attention mask": found.mask,
            **held["end"],
        },
        "optimizer step": {"gradients": gradients, "temporaries": _step_bytes(plan), **standing_buffers},
    }
    if plan.eval_rows:
        between = gradients if plan.engine == "zero3" else 0
        evaluated = {"batch of the evaluation": _evaluation(plan), "weights put aside": average}
        moments["evaluation"] = {"gradients": between, **evaluated, **held["forward"]}
    return Estimate({name: {**always, **parts} for name, parts in moments.items()}, round(host))


def _offloaded(plan: Plan, shards: Shards) -> tuple[Shards, float]:
    """What is left on the device, and the bytes that the host holds instead."""
    weights, gradients, optimizer = shards.weights, shards.gradients, shards.optimizer
    if plan.offload_optimizer:
        optimizer = 0
        gradients = gradients if plan.engine == "zero1" else 0  # the others' go to the host as they are made
    if plan.offload_param:
        weights = 0
    rest = Shards(weights, gradients, optimizer, shards.buffers)
    return rest, shards.total - rest.total


class Buffers(NamedTuple):
    """What an engine holds beside the state, in bytes: in the forward pass, while the head is scored, in the backward pass of the
    head and of the last layer, in that of the first layer, and at its end, when embeddings and head are reduced."""

    forward: int
    head: int
    last: int
    first: int
    end: int


def buffers_of(plan: Plan) -> Buffers:
    """ZeRO-1 and 2 have their buckets in the backward pass, ZeRO-3 has one all the time, and weights of up to 10^9 numbers whole;
    all copy what is in a bucket when it is reduced. FSDP2 has two layers whole with one layer's float32 gradient, and from the
    forward to the backward pass embeddings and head, which stay whole; without resharding everything is whole anyway.

    Read in DeepSpeed 0.19 (``setup_buckets`` of stage_1_and_2.py, ``_setup_for_real_optimizer`` of stage3.py) and measured by
    ``benchmarks/memory_engines.py``.
    """
    if plan.engine in ("none", "ddp"):
        return Buffers(0, 0, 0, 0, 0)
    wide = 2 if plan.precision else 4
    if plan.engine == "fsdp":
        return _buffers_of_fsdp(plan, wide)
    numbers = plan.bucket or plan.config.get_text_config().hidden_size ** 2
    if plan.engine == "zero3":
        always = wide * numbers + wide * min(10**9, plan.state.trained + plan.state.frozen)
        reducing = always + wide * min(numbers, plan.state.trained)
        return Buffers(always, always, reducing, reducing, reducing)
    buckets = wide * numbers * (2 if plan.overlap else 1)
    copied = wide * min(numbers, plan.state.trained)
    flushed = buckets + copied
    return Buffers(0, 0, flushed if numbers < plan.state.trained else buckets, flushed, flushed)


def _buffers_of_fsdp(plan: Plan, wide: int) -> Buffers:
    with torch.device("meta"):
        model = build(plan.config, torch.bfloat16)
    embedding, head = (m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    outside = embedding.numel() + (head.numel() if head is not embedding else 0)
    whole = sum(p.numel() for p in model.parameters())
    layer, gradient = (whole - outside) // plan.layers, 4 if plan.train_mode == "full" else 0
    gathered = 2 * wide * layer if plan.reshard else 0
    root = wide * outside if plan.reshard else 0
    return Buffers(
        forward=gathered + root,
        head=root,
        last=gathered + gradient * layer + root,
        first=gathered
        + gradient * layer
        + root
        + (gradient * outside if head is embedding else 0),  # else it has been sent
        end=root + gradient * embedding.numel(),
    )


def _reference_bytes(plan: Plan) -> int:
    """A second model is loaded as the first: whole, without what is trained."""
    if not plan.reference:
        return 0
    state = plan.state
    return round(state.frozen_weights + (state.trained_weights if plan.train_mode == "full" else 0))


def _head_gradient(plan: Plan) -> int:
    """Bytes of the gradient that the head's scoring leaves behind."""
    text = plan.config.get_text_config()
    return 4 * text.vocab_size * text.hidden_size if plan.train_mode == "full" else 0


def _step_bytes(plan: Plan) -> int:
    """Temporaries of the optimizer's step on a device: the most of its groups, which come one after the other. The Trainer puts
    what decays (matrices) apart from what does not (norms, biases)."""
    if plan.offload_optimizer:
        return 0
    state, engine = plan.state, plan.engine not in ("none", "ddp")
    itemsize = 4 if engine else state.trained_weights // max(1, state.trained)
    most = 0
    for matrices in (True, False):
        shapes = _own_shapes(plan, [shape for shape in state.shapes if (len(shape) > 1) is matrices])
        made = step_bytes(plan.optim, shapes, plan.device, decays=plan.decays and matrices, itemsize=itemsize)
        if plan.engine.startswith("zero"):
            # The flat gradient becomes a float32 one, and is given back before the optimizer's turn.
            numbers = sum(math.prod(shape) for shape in shapes)
            made = max(4 * numbers, (2 if plan.precision else 0) * numbers + made)
        most = max(most, made)
    return most


def _own_shapes(plan: Plan, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Of a group's parameters as the optimizer of one device sees them: FSDP2 divides the first dimension, ZeRO all numbers in a
    row, of which ZeRO-3 takes a sub-group at a time."""
    if plan.engine in ("none", "ddp"):
        return list(shapes)
    if plan.engine == "fsdp":
        return [(-(-shape[0] // plan.devices), *shape[1:]) for shape in shapes]
    numbers = -(-sum(map(math.prod, shapes)) // plan.devices)
    return [(min(numbers, plan.sub_group) if plan.engine == "zero3" else numbers,)]


def _evaluation(plan: Plan) -> int:
    rows = replace(plan.batch, rows=plan.eval_rows)
    return evaluation_bytes(plan.config, plan.run, rows, plan.layers)


def is_counted(optim: str) -> bool:
    """Whether the states of this optimizer are counted; others are taken for AdamW's."""
    return optimizer_bytes(optim)[1]
