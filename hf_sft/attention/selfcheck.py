"""Which architectures honour a packed layout is measured, not looked up.

Two short documents, packed on a backend, must give the logits that they give apart on the model's own attention; and changing the
first must not change the second. Recurrent layers, dropped keywords and ignored masks all fail one of the two. For WeDLM the mask
slots of the packed noisy streams must also have the logits of one causal pass over [prefix; observed; masks], block by block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sft.attention.backends import BACKENDS, Backend, backend_named, layer_windows, restore_attention
from hf_sft.attention.layout import Layout
from hf_sft.models.families import uses_alibi
from hf_sft.models.wrappers import base_model, evaluating
from hf_sft.streams import NoisyStream, group_blocks, noisy_stream

logger = logging.getLogger(__name__)

PADDED = "padded"
# Lengths of the two documents: unequal, and longer than a small sliding window.
_LENGTHS = [24, 17]
_NOT_ON_CPU = {
    "flash": "where flash kernels do not run",
    "flex": "where FlexAttention has no backward pass",
}
_BLOCK = 5  # tokens per block of the noisy streams that WeDLM's check packs
# Largest difference as a share of the logits' spread (max - min). Between layouts bf16 alone makes about 1.2e-2.
_SAME = {torch.float32: 1e-4, torch.float64: 1e-4}
_SAME_LOW_PRECISION = 5e-2
# Between two packed runs only document 1 differs: what reaches document 2 is a leak, not rounding.
_LEAK = {torch.float32: 1e-6, torch.float64: 1e-6}
_LEAK_LOW_PRECISION = 5e-3


@dataclass(frozen=True)
class Verdict:
    """What was measured for one backend, as shares of the logits' spread."""

    backend: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class Choice:
    """How documents are laid out: ``backend`` is None for padded batches."""

    backend: Backend | None
    reason: str

    @property
    def name(self) -> str:
        """Name of the backend, or ``padded``."""
        return PADDED if self.backend is None else self.backend.name


def choose_layout(
    model: nn.Module,
    requested: str = "auto",
    packing: bool | None = None,
    mask_token_id: int | None = None,
    *,
    autocast: bool = False,
) -> Choice:
    """Measure the backends in turn, install the first that is right, and say which.

    Args:
        model: the model to train, bare or with PEFT, on the device where it is to run.
        requested: ``auto`` or the name of a backend.
        packing: True: packed or an error; False: padded batches; None: packed if the model can be.
        mask_token_id: of WeDLM, whose two streams are checked as well and which is never padded; None for other objectives.
        autocast: training computes in bfloat16 or float16, whatever the type of the weights.

    Raises:
        ValueError: if what was asked for by name is unknown or fails.
    """
    base = base_model(model)
    wedlm = mask_token_id is not None
    if requested != "auto":
        backend_named(requested, wedlm=wedlm)  # an unknown name, or one that cannot be
    refuse_on_cpu(requested, base.device)
    _own_attention(base)
    if packing is False and wedlm:
        raise ValueError(
            "packing is false and objective is wedlm: its two streams need a packed layout; leave packing out"
        )
    if packing is False:
        if requested != "auto":
            raise ValueError(
                f"attention_backend {requested!r} packs documents, and packing is false: leave out one of the two"
            )
        return Choice(None, "packing is false")
    if wedlm:
        _require_rotary_positions(base)
    if requested not in ("auto", *BACKENDS):
        backend_named(requested, wedlm=wedlm).install(base)  # what it needs and has not is said in its own words
        restore_attention(base)
        if problem := _too_precise(base, backend_named(requested, wedlm=wedlm), autocast):
            raise ValueError(f"attention_backend is {requested}: {problem}")
    verdicts: list[Verdict] = []
    for name in _candidates(base, wedlm) if requested == "auto" else (requested,):
        backend = backend_named(name, wedlm=wedlm)
        problem = _too_precise(base, backend, autocast)
        verdict = Verdict(name, False, problem) if problem else check_backend(model, backend, mask_token_id)
        if verdict.passed:
            reasons = "; ".join([*(f"{v.backend}: {v.reason}" for v in verdicts), verdict.reason])
            return Choice(backend, reasons)
        verdicts.append(verdict)
    reasons = "; ".join(f"{v.backend}: {v.reason}" for v in verdicts)
    if wedlm:
        raise ValueError(
            f"objective is wedlm, and the two streams of a document come out wrong on {type(base).__name__} ({reasons}); "
            "train it with objective causal, or take a model of the Llama or Qwen kind"
        )
    if requested != "auto" or packing:
        what = f"attention_backend {requested!r}" if requested != "auto" else "packing"
        raise ValueError(
            f"{what} was asked for, and {type(base).__name__} cannot be packed with it ({reasons}); "
            "leave packing and attention_backend out to train on padded batches"
        )
    logger.warning("%s cannot be packed (%s): training on padded batches", type(base).__name__, reasons)
    return Choice(None, reasons)


def refuse_on_cpu(requested: str, device: torch.device) -> None:
    """Raise ValueError where the backend ``requested`` does not train on ``device``; can be asked before there is a model."""
    if requested in _NOT_ON_CPU and device.type == "cpu":
        raise ValueError(
            f"attention_backend is {requested} and the training is on a CPU, {_NOT_ON_CPU[requested]}: choose auto, segment or "
            "dense, or train on CUDA"
        )


def install_layout(model: nn.Module, backend: Backend | None) -> None:
    """Put into ``model`` the backend that was chosen on another one of its architecture, or its own attention (None)."""
    base = base_model(model)
    _own_attention(base)
    if backend is not None:
        backend.install(base)


def _own_attention(base: PreTrainedModel) -> None:
    """Without any backend of ours; and as it computes what the model means."""
    restore_attention(base)
    softcap = getattr(base.config.get_text_config(), "attn_logit_softcapping", None)
    if base.config._attn_implementation == "sdpa" and softcap:
        base.set_attn_implementation("eager")  # transformers before 5.21 drops the soft cap under sdpa without a word


def _candidates(base: PreTrainedModel, wedlm: bool) -> tuple[str, ...]:
    """What ``auto`` tries, in this order: on CUDA what has kernels there for whole rows, then what runs everywhere."""
    fused = ("flex" if wedlm else "flash",) if base.device.type == "cuda" else ()
    return *fused, "segment", "dense"


def _too_precise(base: PreTrainedModel, backend: Backend, autocast: bool) -> str | None:
    """Why a backend's kernels cannot take what this model computes with."""
    if not backend.half_only or autocast or base.dtype not in _SAME:
        return None
    return (
        f"its kernels take bfloat16 and float16 alone, and the model computes in {str(base.dtype).removeprefix('torch.')}; set "
        "bf16 to true, or choose segment or dense"
    )


def _require_rotary_positions(base: PreTrainedModel) -> None:
    """Mask slots stand apart from their logical positions: the model must take positions as they are given."""
    if not any("rotary" in type(module).__name__.lower() for module in base.modules()):
        raise ValueError(
            f"objective is wedlm, and {type(base).__name__} has no rotary positions: tokens of the noisy stream keep their "
            "logical positions out of order, which other position codes cannot say; use objective causal, or a model with RoPE"
        )


def check_backend(model: nn.Module, backend: Backend, mask_token_id: int | None = None) -> Verdict:
    """Measure one backend on ``model``; on success it stays installed, else the model's own attention is put back."""
    base = base_model(model)
    own = restore_attention(base)
    with evaluating(model), torch.no_grad():
        verdict = _measure(model, base, backend, mask_token_id)
    if verdict.passed and base.device.type != "cpu":
        verdict = _measure_backward(model, backend, verdict)
    if not verdict.passed:
        base.set_attn_implementation(own)
    return verdict


def _measure(model: nn.Module, base: PreTrainedModel, backend: Backend, mask_token_id: int | None) -> Verdict:
    embedding = cast(nn.Embedding, base.get_input_embeddings()).weight
    device, vocabulary = embedding.device, embedding.shape[0]
    generator = torch.Generator().manual_seed(0)
    first, other, second = (
        torch.randint(vocabulary, (length,), generator=generator).to(device) for length in (_LENGTHS[0], *_LENGTHS)
    )
    apart = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in (first, second)])
    try:
        noisy = (
            [] if mask_token_id is None else [_noisy(ids, mask_token_id, n) for n, ids in enumerate((first, second))]
        )
        slots_apart = [logits for streams in noisy for logits in _slots_one_pass(model, base, streams)]
        try:
            backend.install(base)
        except ValueError as error:
            return Verdict(backend.name, False, str(error))
        with torch.autocast(device.type, torch.bfloat16, enabled=backend.half_only):
            packed = _packed_logits(model, backend, [first, second])
            changed = _packed_logits(model, backend, [other, second])
            slots = _slots_packed(model, backend, noisy) if noisy else packed[:0]
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        alibi = "its ALiBi biases are made from a mask of padding"
        why = alibi if uses_alibi(base.config) else f"{type(error).__name__}: {error}"
        return Verdict(backend.name, False, f"the forward takes no packed row ({why})")
    spread = (apart.max() - apart.min()).item()
    exact = base.dtype in _SAME and not backend.half_only
    same, leak_limit = (_SAME[base.dtype], _LEAK[base.dtype]) if exact else (_SAME_LOW_PRECISION, _LEAK_LOW_PRECISION)
    difference = (packed - apart).abs().max().item() / spread
    leak = (packed - changed)[_LENGTHS[0] :].abs().max().item() / spread
    measured = f"packed and apart differ by {difference:.1e} of the logits' spread (limit {same:.0e})"
    if not leak <= leak_limit:  # also true for NaN
        return Verdict(
            backend.name, False, f"documents see each other: {leak:.1e} of the spread (limit {leak_limit:.0e})"
        )
    if not noisy or not difference <= same:
        return Verdict(backend.name, difference <= same, measured)
    difference = (slots - torch.cat(slots_apart)).abs().max().item() / spread
    return Verdict(
        backend.name, difference <= same, f"{measured}, mask slots packed and in one causal pass by {difference:.1e}"
    )


def _measure_backward(model: nn.Module, backend: Backend, verdict: Verdict) -> Verdict:
    """Kernels that are compiled for a device may have a forward pass there and no backward pass."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.arange(sum(_LENGTHS), device=weights[0].device) if weights else torch.empty(0)
    try:
        if weights:
            with torch.enable_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=backend.half_only):
                total = _packed_logits(model, backend, list(ids.split(_LENGTHS))).float().sum()
            torch.autograd.grad(total, weights, allow_unused=True)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        return Verdict(backend.name, False, f"the backward pass fails ({error})")
    return verdict


def _packed_logits(model: nn.Module, backend: Backend, documents: list[Tensor]) -> Tensor:
    lengths = [len(document) for document in documents]
    device = documents[0].device
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    pos = torch.cat([torch.arange(length) for length in lengths]).to(device)
    return _logits(model, backend, torch.cat(documents), Layout(doc, pos, lengths))


def _logits(model: nn.Module, backend: Backend, ids: Tensor, layout: Layout) -> Tensor:
    inputs = backend.inputs(base_model(model), layout)
    return model(input_ids=ids[None], position_ids=layout.pos[None], use_cache=False, **inputs).logits[0]


# ---- WeDLM: the mask slots of packed noisy streams against one causal pass ----


class _Streams(NamedTuple):
    """A document and its noisy stream: ``clean`` [L] and ``noisy`` [S] token ids, ``stream`` their order."""

    clean: Tensor
    noisy: Tensor
    stream: NoisyStream


def _noisy(clean: Tensor, mask_token_id: int, seed: int) -> _Streams:
    """Half of the tokens masked, the first block left whole: some blocks have observed tokens behind a slot."""
    masked = np.random.default_rng(seed).random(len(clean)) < 0.5
    masked[:_BLOCK], masked[-1] = False, True
    stream = noisy_stream(masked, _BLOCK)
    noisy = clean[torch.from_numpy(stream.pos).to(clean.device)].clone()
    noisy[torch.from_numpy(stream.slot).to(clean.device)] = mask_token_id
    return _Streams(clean, noisy, stream)


def _slots_one_pass(model: nn.Module, base: PreTrainedModel, streams: _Streams) -> list[Tensor]:
    """Logits of the slots of each block: one causal pass over the clean tokens before its anchor and the block, on the model's
    own attention. Windows count logical positions, so a model that has one is given the rule as a mask."""
    found = []
    stream, device = streams.stream, streams.clean.device
    for block in np.unique(stream.block):
        own = stream.block == block
        anchor = int(stream.anchor[own][0])
        rows = torch.from_numpy(own).to(device)
        ids = torch.cat([streams.clean[:anchor], streams.noisy[rows]])
        pos = torch.cat([torch.arange(anchor), torch.from_numpy(stream.pos[own])]).to(device)
        if any(layer_windows(base.config).values()):
            layout = Layout(torch.zeros_like(pos), pos, [len(ids)])
            logits = _logits(model, backend_named("dense"), ids, layout)
        else:
            ones = torch.ones(1, len(ids), dtype=torch.int64, device=device)
            logits = model(input_ids=ids[None], position_ids=pos[None], attention_mask=ones, use_cache=False).logits[0]
        found.append(logits[anchor:][torch.from_numpy(stream.slot[own]).to(device)])
    return found


def _slots_packed(model: nn.Module, backend: Backend, documents: list[_Streams]) -> Tensor:
    """Logits of all slots, both documents and their noisy streams in one row."""
    device = documents[0].clean.device
    columns: dict[str, list[Any]] = {"doc": [], "pos": [], "block": [], "limit": [], "slot": []}
    for number, (clean, _, stream) in enumerate(documents):
        length = len(clean)
        columns["doc"].append(np.full(length + len(stream.pos), number))
        columns["pos"] += [np.arange(length), stream.pos]
        columns["block"] += [np.full(length, -1), stream.block]
        columns["limit"] += [np.arange(length) + 1, stream.anchor]
        columns["slot"] += [np.zeros(length, dtype=bool), stream.slot]
    row = {key: torch.from_numpy(np.concatenate(parts)).to(device) for key, parts in columns.items()}
    pieces = [(len(clean), group_blocks(stream)) for clean, _, stream in documents]
    lengths = [len(clean) + len(noisy) for clean, noisy, _ in documents]
    ids = torch.cat([part for clean, noisy, _ in documents for part in (clean, noisy)])
    layout = Layout(row["doc"], row["pos"], lengths, row["block"], row["limit"], pieces)
    return _logits(model, backend, ids, layout)[row["slot"]]
