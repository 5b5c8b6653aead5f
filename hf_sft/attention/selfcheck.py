"""Which architectures honour a packed layout is measured, not looked up.

Two short documents, packed on a backend, must give the logits that they give apart on the model's own attention; and changing the
first must not change the second. Recurrent layers, dropped keywords and ignored masks all fail one of the two.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sft.attention.backends import BACKENDS, Backend, restore_attention
from hf_sft.attention.layout import Layout
from hf_sft.models.wrappers import base_model, evaluating

logger = logging.getLogger(__name__)

PADDED = "padded"
# Lengths of the two documents: unequal, and longer than a small sliding window.
_LENGTHS = [24, 17]
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


def choose_layout(model: nn.Module, requested: str = "auto", packing: bool | None = None) -> Choice:
    """Measure the backends in turn, install the first that is right, and say which.

    Args:
        model: the model to train, bare or with PEFT, on the device where it is to run.
        requested: ``auto`` or the name of a backend.
        packing: True: packed or an error; False: padded batches; None: packed if the model can be.

    Raises:
        ValueError: if what was asked for by name is unknown or fails.
    """
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(
            f"attention_backend {requested!r} is not available; choose auto or one of {', '.join(BACKENDS)}"
        )
    base = base_model(model)
    restore_attention(base)
    if base.config._attn_implementation == "sdpa" and getattr(
        base.config.get_text_config(), "attn_logit_softcapping", None
    ):
        base.set_attn_implementation("eager")  # transformers before 5.21 drops the soft cap under sdpa without a word
    if packing is False:
        if requested != "auto":
            raise ValueError(
                f"attention_backend {requested!r} packs documents, and packing is false: leave out one of the two"
            )
        return Choice(None, "packing is false")
    verdicts: list[Verdict] = []
    for name in ("segment", "dense") if requested == "auto" else (requested,):
        verdict = check_backend(model, BACKENDS[name])
        if verdict.passed:
            return Choice(BACKENDS[name], "; ".join([*(f"{v.backend}: {v.reason}" for v in verdicts), verdict.reason]))
        verdicts.append(verdict)
    reasons = "; ".join(f"{v.backend}: {v.reason}" for v in verdicts)
    if requested != "auto" or packing:
        what = f"attention_backend {requested!r}" if requested != "auto" else "packing"
        raise ValueError(
            f"{what} was asked for, and {type(base).__name__} cannot be packed with it ({reasons}); "
            "leave packing and attention_backend out to train on padded batches"
        )
    logger.warning("%s cannot be packed (%s): training on padded batches", type(base).__name__, reasons)
    return Choice(None, reasons)


def check_backend(model: nn.Module, backend: Backend) -> Verdict:
    """Measure one backend on ``model``; on success it stays installed, else the model's own attention is put back."""
    base = base_model(model)
    own = restore_attention(base)
    verdict = _measure(model, base, backend)
    if not verdict.passed:
        base.set_attn_implementation(own)
    return verdict


@torch.no_grad()
def _measure(model: nn.Module, base: PreTrainedModel, backend: Backend) -> Verdict:
    embedding = cast(nn.Embedding, base.get_input_embeddings()).weight
    device, vocabulary = embedding.device, embedding.shape[0]
    generator = torch.Generator().manual_seed(0)
    first, other, second = (
        torch.randint(vocabulary, (length,), generator=generator).to(device) for length in (_LENGTHS[0], *_LENGTHS)
    )
    with evaluating(model):
        apart = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in (first, second)])
        try:
            backend.install(base)
            packed = _packed_logits(model, backend, [first, second])
            changed = _packed_logits(model, backend, [other, second])
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            return Verdict(backend.name, False, f"the forward fails ({error})")
    spread = (apart.max() - apart.min()).item()
    same = _SAME.get(base.dtype, _SAME_LOW_PRECISION)
    leak_limit = _LEAK.get(base.dtype, _LEAK_LOW_PRECISION)
    difference = (packed - apart).abs().max().item() / spread
    leak = (packed - changed)[_LENGTHS[0] :].abs().max().item() / spread
    measured = f"packed and apart differ by {difference:.1e} of the logits' spread (limit {same:.0e})"
    if not leak <= leak_limit:  # also true for NaN
        return Verdict(
            backend.name, False, f"documents see each other: {leak:.1e} of the spread (limit {leak_limit:.0e})"
        )
    return Verdict(backend.name, difference <= same, measured)


def _packed_logits(model: nn.Module, backend: Backend, documents: list[Tensor]) -> Tensor:
    lengths = [len(document) for document in documents]
    device = documents[0].device
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    pos = torch.cat([torch.arange(length) for length in lengths]).to(device)
    inputs = backend.inputs(base_model(model), Layout(doc, pos, lengths))
    packed = torch.cat(documents)[None]
    return model(input_ids=packed, position_ids=pos[None], use_cache=False, **inputs).logits[0]
