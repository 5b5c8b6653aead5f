"""What a micro-batch needs of memory beside weights and gradients: counted by running layers on tensors without storage.

One layer and two layers of the model run forward and backward under FakeTensorMode, with the attention backend, the precision
and the activation checkpointing of the training; ``counting.LiveBytes`` counts what lives. The difference is a layer's share. The
head is scored once, in its chunks, by the training's own ``HeadScorer``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from hf_sft.arguments import LoraArguments
from hf_sft.attention.backends import backend_named
from hf_sft.attention.layout import Layout
from hf_sft.collators import CausalCollator, WeDLMCollator, WeDLMEvalCollator
from hf_sft.losses import CHUNK_BYTES
from hf_sft.memory.counting import LiveBytes
from hf_sft.memory.states import build, quantised_layers, with_adapter
from hf_sft.models.checkpointing import keep_in_layers
from hf_sft.models.head import HeadScorer, inner_parameters
from hf_sft.models.wrappers import base_model
from hf_sft.noise import MaskRule
from hf_sft.products import fits_onednn

# Without their kernels these layers are run token by token, and keep the same for each.
_BY_TOKEN, _PROBES = frozenset({"mamba", "falcon_mamba"}), (16, 32)


@dataclass(frozen=True)
class MicroBatch:
    """The documents of one forward pass, each ``length`` tokens long and learned from end to end.

    Args:
        rows: ``per_device_train_batch_size``.
        objective: causal; wedlm, with the noisy streams that training draws; dpo, with two documents to a row.
        block_size: of WeDLM.
    """

    rows: int
    length: int
    objective: str = "causal"
    block_size: int = 32

    def layout(self, *, evaluation: bool = False) -> tuple[Layout, int]:
        """Layout of the packed row, and how many of its rows are scored; an evaluation of WeDLM has more noisy streams."""
        ids = [0] * self.length
        row = {"input_ids": ids, "labels": ids}
        if self.objective == "wedlm":
            kind = WeDLMEvalCollator if evaluation else WeDLMCollator
            batch = kind(1, MaskRule(self.block_size))([[row] * self.rows])
        else:
            batch = CausalCollator()([[row] * self.rows * (2 if self.objective == "dpo" else 1)])
        return Layout.from_batch(batch), len(batch["logits_to_keep"])


@dataclass(frozen=True)
class Run:
    """How a model runs.

    Args:
        mode: full, lora or qlora.
        dtype: of the base's weights as the forward meets them.
        autocast: type of the products under autocast; None: there is none.
        uniform: the adapter's weights are of the same type, as under engines.
        partitioned: ZeRO-3 shards each weight: its products keep their inputs also where the weight is frozen, and a head with
            an adapter inside is not scored in chunks.
        checkpointing, policy: ``activation_checkpointing`` and its policy.
        attention: dense, segment, or fused for kernels that keep their output and one number per row and head.
        device: cuda or cpu: the size of a chunk of logits.
    """

    mode: str = "full"
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    uniform: bool = False
    partitioned: bool = False
    lora: LoraArguments = field(default_factory=LoraArguments)
    checkpointing: bool = False
    policy: str = "full"
    attention: str = "fused"
    device: str = "cuda"

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch.

    Args:
        tokens: T of the micro-batch, noisy streams and both sides of pairs counted.
        layer, outside: what one layer keeps for the backward pass; what stands before the first and behind the last.
        layer_copies, outside_copies: weights in autocast's type that live to the end of the forward pass alone.
        forward, backward: what is added while a layer runs, and while its backward pass does (all of it if computed again).
        head: the most while the head's rows are scored; ``head_kept`` stays to the backward pass, which needs ``head_backward``.
        mask: of the dense backend.
    """

    tokens: int
    layer: int
    outside: int
    layer_copies: int
    outside_copies: int
    forward: int
    backward: int
    head: int
    head_kept: int
    head_backward: int
    mask: int = 0

    def kept(self, layers: int) -> int:
        return layers * self.layer + self.outside

    def copies(self, layers: int) -> int:
        return layers * self.layer_copies + self.outside_copies

    def most(self, layers: int) -> int:
        """The highest point of the micro-batch, where gradients stand already."""
        kept, copies = self.kept(layers), self.copies(layers)
        forward = kept + copies + max(self.forward, self.head)
        return max(forward, kept + self.head_backward, kept + self.backward)


class _Trace(NamedTuple):
    end: int
    peak: int
    saved: int
    backward: int
    hidden: torch.dtype
    mask: int


def activations_of(config: Any, run: Run, batch: MicroBatch) -> Activations:
    """Bytes of one micro-batch of ``batch``.

    Raises:
        ValueError: layers that cannot be run without numbers.
    """
    layout, scored = batch.layout()
    tokens = len(layout.doc)
    if config.model_type in _BY_TOKEN:
        one, two = (_extrapolated(config, run, layers, tokens) for layers in (1, 2))
    else:
        one, two = (_trace(config, run, layers, layout) for layers in (1, 2))
    head, head_kept, head_backward = _head(config, run, tokens, scored, one.hidden)
    copies = [trace.end - trace.saved for trace in (one, two)]
    kept = [trace.saved - trace.mask for trace in (one, two)]
    whole = _whole_weight(config) if run.mode == "qlora" else 0
    return Activations(
        tokens=tokens,
        layer=kept[1] - kept[0],
        outside=2 * kept[0] - kept[1],
        layer_copies=copies[1] - copies[0],
        outside_copies=2 * copies[0] - copies[1],
        forward=two.peak - two.end + whole,
        backward=two.backward - two.saved + whole,
        head=head,
        head_kept=head_kept,
        head_backward=head_backward,
        mask=_masks(config, one),
    )


def evaluation_bytes(config: Any, run: Run, batch: MicroBatch, layers: int) -> int:
    """The most that a forward pass without gradients takes."""
    layout, scored = batch.layout(evaluation=True)
    tokens = len(layout.doc)
    if config.model_type in _BY_TOKEN:
        one, two = (_extrapolated(config, run, count, tokens, learns=False) for count in (1, 2))
    else:
        one, two = (_trace(config, run, count, layout, learns=False) for count in (1, 2))
    head = _head(config, run, tokens, scored, one.hidden, learns=False)[0]
    whole = _whole_weight(config) if run.mode == "qlora" else 0
    ends = [trace.end - trace.mask for trace in (one, two)]
    standing = ends[0] + (layers - 1) * (ends[1] - ends[0]) + _masks(config, one)
    return standing + max(two.peak - two.end + whole, head)


def _masks(config: Any, one: _Trace) -> int:
    """Bytes of the dense backend's masks, one for each kind of layer, of which ``one`` layer has one."""
    return one.mask * len(set(getattr(config.get_text_config(), "layer_types", None) or [""]))


def _whole_weight(config: Any) -> int:
    """Bytes of the largest quantised weight in bf16: kernels make one at a time whole."""
    with torch.device("meta"):
        return 2 * max(each.weight.numel() for each in quantised_layers(build(config, torch.bfloat16, layers=1)))


def _extrapolated(config: Any, run: Run, layers: int, tokens: int, *, learns: bool = True) -> _Trace:
    few, more = (_trace(config, run, layers, _causal_layout(count), learns=learns) for count in _PROBES)
    slope = [(b - a) / (_PROBES[1] - _PROBES[0]) for a, b in zip(few[:4], more[:4], strict=True)]
    end, peak, saved, backward = (
        round(value + (tokens - _PROBES[0]) * each) for value, each in zip(few[:4], slope, strict=True)
    )
    return few._replace(end=end, peak=peak, saved=saved, backward=backward)


def _causal_layout(tokens: int) -> Layout:
    return MicroBatch(1, tokens).layout()[0]


# ---- layers ----


def _trace(config: Any, run: Run, layers: int, layout: Layout, *, learns: bool = True) -> _Trace:
    """Bytes at the points of a forward and backward pass through ``layers`` layers, without embeddings and head."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _model(config, run, layers)
    with FakeTensorMode(), warnings.catch_warnings(), _products_of(run):
        warnings.simplefilter("ignore")
        base = _ready(model, run).train(learns)
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        embedding = base.get_input_embeddings()
        known = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        with torch.set_grad_enabled(learns), LiveBytes(known) as live, run.context():
            inputs = _inputs(base, run, layout)
            mask = live.now if run.attention == "dense" else 0
            shape = (1, len(layout.doc), embedding.weight.shape[1])
            leaf = any(p.requires_grad for p in embedding.parameters())
            inputs["inputs_embeds"] = torch.zeros(shape, dtype=embedding.weight.dtype, requires_grad=leaf)
            hidden = base.base_model(**inputs, use_cache=False)[0]
            end, peak = live.now, live.most
        # Leaving autocast frees its copies of weights, as far as nothing has kept them.
        with live:
            saved = live.now
            live.restart()
            if learns:
                hidden.backward(torch.zeros_like(hidden))
    return _Trace(end, peak, saved, live.most, hidden.dtype, mask)


@contextmanager
def _products_of(run: Run) -> Iterator[None]:
    original = nn.functional.linear
    try:
        if run.partitioned and run.mode != "qlora":  # whose products are bitsandbytes'
            nn.functional.linear = lambda input, weight, bias=None: _ProductOfZero3.apply(input, weight, bias)
        yield
    finally:
        nn.functional.linear = original


class _ProductOfZero3(torch.autograd.Function):
    """``linear`` as it keeps its tensors under DeepSpeed's ZeRO-3 (``LinearFunctionForZeroStage3``)."""

    @staticmethod
    def forward(ctx: Any, inputs_BTD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(inputs_BTD, weight_ED)
        product_BTE = inputs_BTD @ weight_ED.t()
        if bias_E is not None:
            product_BTE += bias_E
        return product_BTE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inputs_BTD, weight_ED), gradient_NE = ctx.saved_tensors, gradients[0].flatten(0, -2)
        return (
            gradients[0] @ weight_ED if ctx.needs_input_grad[0] else None,
            gradient_NE.t() @ inputs_BTD.flatten(0, -2) if ctx.needs_input_grad[1] else None,
            gradient_NE.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _model(config: Any, run: Run, layers: int) -> Any:
    with torch.device("meta"):
        model = build(config, run.dtype, layers=layers)
        model = model if run.mode == "full" else with_adapter(model, run.lora)
        return model.to(run.dtype) if run.uniform else model


def _ready(model: Any, run: Run) -> Any:
    """The transformers model, ready to run."""
    base = base_model(model)
    without_storage(model)
    _stand_in_for_experts(model)
    if run.checkpointing and run.policy == "full":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    elif run.checkpointing:
        keep_in_layers(base, run.policy, None)
    model.train()
    return base


def without_storage(model: nn.Module) -> None:
    """Meta tensors become tensors of a CPU, which operations take for real under FakeTensorMode."""
    new: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is not None and id(old) not in new:
                    empty = torch.empty(old.shape, dtype=old.dtype)
                    new[id(old)] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
                held[name] = None if old is None else new[id(old)]  # type: ignore[assignment]
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):  # a constant that is no buffer
                setattr(module, name, torch.empty(value.shape, dtype=value.dtype))


def _inputs(base: Any, run: Run, layout: Layout) -> dict[str, Any]:
    """Keywords of a forward of ``base`` without its tokens, as the backend makes them; its attention is set."""
    doc, pos, block, limit = (
        None if each is None else torch.zeros(each.shape, dtype=each.dtype)
        for each in (layout.doc, layout.pos, layout.block, layout.limit)
    )
    assert doc is not None and pos is not None
    without = Layout(doc, pos, layout.doc_lengths, block, limit, layout.pieces)
    inputs: dict[str, Any] = {}
    if run.attention in ("dense", "segment"):
        backend = backend_named(run.attention)
        backend.install(base)
        inputs = backend.inputs(base, without)
    elif base._supports_attention_backend:
        base.set_attn_implementation("fused_causal")
    inputs["position_ids"] = pos[None]
    known = inspect.signature(base.base_model.forward).parameters
    every = any(each.kind is each.VAR_KEYWORD for each in known.values())
    return {name: value for name, value in inputs.items() if every or name in known}


def fused_causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **rest: Any
) -> Any:
    """Attention of kernels that share keys between query heads: nothing is kept beside the output and a number per row and head.

    For tensors without storage alone: the kernel of CPUs, which stands in for CUDA's, would want as many key heads as queries.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    q, k, v = (each.to(dtype) for each in (query, key, value))
    output = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scaling)[0]
    return output[..., : value.shape[-1]].transpose(1, 2).contiguous(), None


AttentionInterface.register("fused_causal", fused_causal)  # without a mask function: layers get none


def _stand_in_for_experts(model: nn.Module) -> None:
    """Experts multiply the rows that the router deals them, which needs numbers. All together they keep what one would that got
    every row as often as it is dealt."""
    for module in model.modules():
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter) and hasattr(module, "down_proj"):
            module.forward = _Expert(module)  # type: ignore[method-assign]


class _Expert:
    def __init__(self, experts: Any) -> None:
        self.experts = experts

    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        experts, width = self.experts, hidden.shape[-1]
        flat = hidden.reshape(-1, width)
        dealt = flat.repeat_interleave(chosen.shape[-1], dim=0)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else flat.dtype
        first, second = experts.gate_up_proj.to(dtype)[0], experts.down_proj.to(dtype)[0]  # all are cast, one is used
        gate, up = (dealt @ (first if first.shape[0] == width else first.t())).chunk(2, dim=-1)
        inner = getattr(experts, "act_fn", nn.functional.silu)(gate) * up
        rows = (inner @ (second if second.shape[-1] == width else second.t())) * weights.reshape(-1, 1)
        return rows.reshape(*chosen.shape, width).sum(-2).to(hidden.dtype).reshape(hidden.shape)


# ---- the head ----


def _head(
    config: Any, run: Run, tokens: int, scored: int, dtype: torch.dtype, *, learns: bool = True
) -> tuple[int, int, int]:
    """Bytes while ``scored`` of ``tokens`` rows are scored, of what stays, and while their backward pass runs.

    Args:
        dtype: of the hidden states.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _model(config, run, 1)
    with FakeTensorMode(), _chunks_of(run.device):
        without_storage(model)
        base = base_model(model).train(learns)
        scorer, head = HeadScorer(base), base.get_output_embeddings()
        scorer.chunked = not (run.partitioned and any(True for _ in inner_parameters(head)))
        trained = [p for p in head.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        hidden = torch.zeros(1, tokens, config.get_text_config().hidden_size, dtype=dtype, requires_grad=True)
        rows, shares = torch.zeros(scored, dtype=torch.int64), torch.zeros(scored)
        known = [*head.parameters(), *(p.grad for p in trained if p.grad is not None), hidden, rows, shares]
        with torch.set_grad_enabled(learns), _HeadBytes(known) as live, run.context():
            with scorer.scoring(rows, rows, shares) as request:
                logits = head(hidden)
                scores = scorer.scores(request, logits)
            del logits, request
            most = live.most + (live.in_place if run.device == "cuda" else 0)
        kept = live.now
        if learns and not scorer.chunked:
            with live:
                live.restart()
                scores.loss.backward()
            return most, kept, live.most
        del scores
    cast = sum(p.nbytes for p in trained if p.itemsize < 4)
    return most + (_second_sum(head, run, scored) if learns else 0), kept, kept + cast + hidden.nbytes


def _second_sum(head: Any, run: Run, scored: int) -> int:
    """Bytes of the sum that stands beside the gradient of the head's weight where oneDNN, which adds to nothing, makes both."""
    weight = getattr(head, "weight", None)
    if run.device != "cpu" or run.autocast is not None or weight is None or not weight.requires_grad:
        return 0
    return weight.nbytes if fits_onednn(scored, *weight.shape) and weight.dtype == torch.float32 else 0


class _HeadBytes(LiveBytes):
    """Notes the largest result of ``log_softmax`` that stands where its input did, which on CUDA has memory of its own."""

    in_place = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "log_softmax" in str(function) and isinstance(out := (kwargs or {}).get("out"), torch.Tensor):
            self.in_place = max(self.in_place, out.nbytes)
        return super().__torch_dispatch__(function, types, args, kwargs)


@contextmanager
def _chunks_of(device: str) -> Iterator[None]:
    """Chunks of logits as large as those of ``device``, for tensors without storage, which are a CPU's."""
    before = CHUNK_BYTES["cpu"]
    CHUNK_BYTES["cpu"] = CHUNK_BYTES.get(device, before)
    try:
        yield
    finally:
        CHUNK_BYTES["cpu"] = before
