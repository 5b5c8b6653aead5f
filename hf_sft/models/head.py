"""Scoring at the output head: the logits of a step never stand in memory at once.

The wrapped model is called whole, so that every hook of DDP, FSDP, ZeRO, PEFT and checkpointing fires. A forward pre-hook on the
head takes the hidden states of the scored rows, computes the loss from them in chunks, and lets no row pass; what the model
returns are zero rows of logits that keep the head in the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sft.losses import LogitTransform, ReplacedRows, RowScores, score_logits, score_rows, score_through
from hf_sft.models.sharded import is_partitioned
from hf_sft.models.wrappers import evaluating

logger = logging.getLogger(__name__)

_LARGER, _LARGEST = 100.0, 1e3  # of hidden states, when scores are compared

# [R] the weights of the scored rows, or what makes them of the rows' nll [R]: for losses that are no weighted sum of nlls,
# d loss / d nll_i is the weight with which row i enters the gradient.
RowWeight = Tensor | Callable[[Tensor], Tensor]


@dataclass
class _Request:
    rows: Tensor
    target: Tensor
    weight: RowWeight
    scores: RowScores | None = None


class HeadScorer:
    """Scores chosen rows of a causal LM.

    Every head is scored in chunks: a plain linear one by its weight, also where an adapter trains some of its rows, any other
    (an adapter on it, quantised weights) by calls of its own forward. Where that is not right, the head runs on the scored
    rows and the loss is taken from its logits, whole: a model whose logits are not what its config says (``verify``), and a
    head whose parts ZeRO-3 gathers one by one (``after_engine``).

    Args:
        model: a causal LM, bare or with PEFT. The hook stays on its head and does nothing outside ``scoring``.

    Attributes:
        chunked: whether chunks are right for this model.
        why_whole: why not, where they are not.

    Raises:
        ValueError: if the model has no output head.
    """

    def __init__(self, model: Any) -> None:
        head = active_head(model.get_output_embeddings())
        if head is None:
            raise ValueError(
                f"{type(model).__name__} has no output embeddings: only causal language models can be trained"
            )
        self.chunked, self.why_whole = True, ""
        self.transform = logit_transform(model.config)
        self._request: _Request | None = None
        self._row_ids: Tensor | None = None
        self._head = head
        self._hook = head.register_forward_pre_hook(self._before_head)

    def after_engine(self) -> None:
        """To be called once an engine has put its own hooks on the model: those that gather the head's weight come first then.

        ZeRO-3 gathers the weights of one module at a time: those of an adapter, modules inside the head, are not there yet when
        the head's turn comes, and are gone again after each call. Such a head runs as it is, on the scored rows only.
        """
        self._hook.remove()
        self._hook = self._head.register_forward_pre_hook(self._before_head)
        if self.chunked and any(map(is_partitioned, inner_parameters(self._head))):
            self._stop_chunking("ZeRO-3 gathers the parts of the head one by one")

    @contextmanager
    def scoring(self, rows_R: Tensor, target_R: Tensor, weight: RowWeight) -> Iterator[_Request]:
        """Within this context one forward of the model scores rows ``rows_R`` [R] of its flattened hidden states."""
        self._request = _Request(rows_R, target_R, weight)
        try:
            yield self._request
        finally:
            self._request = None

    def scores(self, request: _Request, logits: Tensor) -> RowScores:
        """The scores of a forward inside ``scoring``; ``logits`` is what the model returned."""
        if request.scores is None:
            logits, weight = logits.flatten(0, -2), request.weight
            if callable(weight):
                with torch.no_grad():
                    weight = weight(score_logits(logits, request.target, logits.new_ones(len(logits))).nll)
            return score_logits(logits, request.target, weight)
        # Zero times nothing: keeps every part of the forward in the graph, which DDP and ZeRO wait for.
        loss = request.scores.loss + 0.0 * logits.sum()
        return RowScores(loss, request.scores.nll, request.scores.correct)

    @torch.no_grad()
    def verify(self, model: nn.Module, input_ids: Tensor) -> bool:
        """Do the chunked scores of ``input_ids`` [1, L] equal those of the model's full logits? If not, stop chunking.

        Asked of the hidden states as they are, and made large: the logits of new weights are too small to meet a cap.
        """
        for hidden in (nullcontext(), _amplified(self._head)):
            with evaluating(model), hidden:  # dropout would draw two different answers
                same = self._same_scores(model, input_ids)
            if not same:
                self._stop_chunking(
                    "the model's logits are not what its head, with the caps and scales that are read from its config, says"
                )
                break
        return self.chunked

    def _same_scores(self, model: nn.Module, input_ids: Tensor) -> bool:
        rows = torch.arange(input_ids.shape[1], device=input_ids.device)
        weight = torch.ones(len(rows), device=input_ids.device)
        with self.scoring(rows, input_ids[0], weight) as request:
            model(input_ids=input_ids, use_cache=False)
        full = score_logits(model(input_ids=input_ids, use_cache=False).logits[0], input_ids[0], weight)
        tolerance = 1e-4 if full.nll.dtype == torch.float64 or next(model.parameters()).dtype == torch.float32 else 5e-2
        assert request.scores is not None, "the head was not called"
        off = (request.scores.nll - full.nll.to(request.scores.nll)).abs()
        return bool((off <= tolerance * full.nll.abs().max().clamp_min(1)).all())

    def _stop_chunking(self, why: str) -> None:
        self.chunked, self.why_whole = False, why
        logger.warning("%s: the logits of the scored rows are computed whole, which takes more memory than chunks", why)

    def _before_head(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        request = self._request
        if request is None:
            return None
        hidden = args[0]
        flat = hidden.reshape(-1, hidden.shape[-1]).index_select(0, request.rows)
        if not self.chunked:
            return (flat[None], *args[1:])
        score = self._scoring_of(head, flat, request.target, args[1:])
        weight = request.weight
        if callable(weight):
            with torch.no_grad(), _same_draws(head, flat.device):
                first = score(torch.ones(len(flat), device=flat.device))
                weight = weight(first.nll)
            if not torch.is_grad_enabled():
                request.scores = RowScores(torch.dot(first.nll, weight.to(first.nll)), first.nll, first.correct)
                return (flat[None, :0], *args[1:])
        request.scores = score(weight)
        return (flat[None, :0], *args[1:])

    def _scoring_of(
        self, head: nn.Module, flat: Tensor, target: Tensor, others: tuple[Any, ...]
    ) -> Callable[[Tensor], RowScores]:
        """What scores ``flat`` [R, H] under given weights: by the head's weight if that is all it has, else by its forward."""
        inner: Any = linear_of(head)
        if not _is_plain_linear(inner):
            # Its forward, not the module: the hooks around it (ours, the engine's) have run.
            return lambda weight: score_through(
                lambda rows: head.forward(rows[None], *others)[0], flat, target, weight, self.transform
            )
        own = self._trained_rows(head)
        bias = inner.bias if own is None else None  # PEFT's layer computes x W^T alone
        return lambda weight: score_rows(flat, inner.weight, bias, target, weight, self.transform, replaced=own)

    def _trained_rows(self, head: nn.Module) -> ReplacedRows | None:
        """The rows that an adapter trains in the head (of new tokens, or of a tied embedding), where it is switched on."""
        rows: Any = getattr(head, "token_adapter", None)
        if rows is None or rows.disable_adapters or rows.merged or not rows.active_adapters:
            return None
        (name,) = rows.active_adapters
        trained = rows.trainable_tokens_delta[name]
        if self._row_ids is None or self._row_ids.device != trained.device:  # a copy from the host waits for the device
            self._row_ids = torch.tensor(rows.token_indices[name], device=trained.device)
        return ReplacedRows(self._row_ids, trained)


@contextmanager
def _amplified(head: nn.Module) -> Iterator[None]:
    """Within this context ``head`` gets hidden states times 100, or less where numbers would come near float16's largest."""

    def larger(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden * min(_LARGER, _LARGEST / max(hidden.abs().max().item(), 1e-6)), *args[1:])

    hook = head.register_forward_pre_hook(larger, prepend=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _same_draws(head: nn.Module, device: torch.device) -> Iterator[None]:
    """What the head's dropout draws within is drawn once more afterwards: the rows are scored twice."""
    drops = any(isinstance(part, nn.Dropout) and part.training and part.p for part in head.modules())
    devices = [device] if drops and device.type != "cpu" else []
    with torch.random.fork_rng(devices, enabled=drops, device_type=device.type if devices else "cuda"):
        yield


def logit_transform(config: Any) -> LogitTransform:
    """What the model does to its head's output, read from the config.

    Gemma 2 and 3: ``final_logit_softcapping``, RecurrentGemma ``logits_soft_cap``, xLSTM ``output_logit_soft_cap``; Cohere
    multiplies by ``logit_scale``, Falcon-H1 by ``lm_head_multiplier``; Granite divides by ``logits_scaling``.
    """
    config = config.get_text_config()

    def said(*names: str) -> float | None:
        return next((value for name in names if (value := getattr(config, name, None))), None)

    scale = (said("logit_scale", "lm_head_multiplier") or 1.0) / (said("logits_scaling") or 1.0)
    return LogitTransform(float(scale), said("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))


def active_head(head: nn.Module | None) -> nn.Module | None:
    """The module whose forward runs: under PEFT's ``modules_to_save`` that is the trained copy."""
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    return copies[head.active_adapter if isinstance(head.active_adapter, str) else head.active_adapter[0]]  # type: ignore


def inner_parameters(head: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of modules inside the head, those of an adapter, which ZeRO-3 gathers one by one."""
    return (own for part in head.modules() if part is not head for own in part.parameters(recurse=False))


def linear_of(head: nn.Module) -> nn.Module:
    """The layer inside PEFT's wrapper for trained token rows, or the head itself."""
    rows: Any = getattr(head, "token_adapter", None)
    return head if rows is None else rows.base_layer


def _is_plain_linear(head: nn.Module) -> bool:
    return type(head).forward is nn.Linear.forward and head.weight.is_floating_point()  # type: ignore[operator]
