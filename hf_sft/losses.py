"""Token losses over chosen rows, without ever holding the logits of a step.

Shapes: R scored rows, H hidden width, V vocabulary, C rows of one chunk.

For row i with hidden state h_i, target t_i and weight w_i, and with the logits z_i = cap * tanh(s * (W h_i + b) / cap)
(s the logit scale, cap the final soft cap; both usually absent):

    nll_i     = log sum_v exp z_iv - z_i,t_i
    loss      = sum_i w_i * nll_i
    d loss / d z_iv = w_i * (softmax(z_i)_v - [v = t_i])

Because the gradient is known as soon as the logits of a chunk are, it is taken in the forward pass and the chunk is thrown
away: memory is C x V instead of R x V, and nothing is computed twice (the idea of fused linear cross entropy,
Hsu et al., Liger Kernel, arXiv 2410.10989).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bytes of one chunk of logits in the accumulation type. Small enough to stay near the caches on a CPU; on a GPU large
# enough that the matrix products are efficient.
_CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output of its head: ``softcap * tanh(scale * x / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply to logits of any shape; changes ``logits`` in place and returns it."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """Derivative of the transformed ``logits`` with respect to the raw ones; None where it is 1 everywhere."""
        if self.softcap is not None:
            return (1 - (logits / self.softcap).square_()).mul_(self.scale)
        return self.scale if self.scale != 1.0 else None


class ReplacedRows(NamedTuple):
    """Rows of a head that are trained while its weight is frozen.

    Attributes:
        ids: [N] int64, each once.
        rows: [N, H], used in the type of the weight.
    """

    ids: Tensor
    rows: Tensor


@dataclass(frozen=True)
class RowScores:
    """Result of scoring R rows.

    Attributes:
        loss: [] accumulation type (float32, float64 for float64 models), differentiable: ``sum_i weight_i * nll_i``.
        nll: [R], negative log-likelihood of each target in nats, detached.
        correct: [R] bool, whether the target has the largest logit.
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor


def score_rows(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    row_weight_R: Tensor,
    transform: LogitTransform = LogitTransform(),
    chunk_rows: int | None = None,
    replaced: ReplacedRows | None = None,
) -> RowScores:
    """Weighted cross entropy of R rows through a linear head, in chunks.

    Args:
        hidden_RH: [R, H] hidden states that enter the head. Any floating type; R may be 0.
        weight_VH: [V, H] weight of the head.
        bias_V: [V] bias of the head, or None.
        target_R: [R] int64 token ids.
        row_weight_R: [R] float32 weight of each row in the loss.
        transform: what the model does to its logits.
        chunk_rows: rows per chunk; chosen from the vocabulary and the device by default.
        replaced: rows that stand in for some of the head's.

    Returns:
        RowScores; gradients flow to ``hidden_RH``, ``weight_VH``, ``bias_V`` and the replaced rows through ``loss`` alone.
    """
    ids, rows = (None, None) if replaced is None else replaced
    loss, nll, correct = _ChunkedCrossEntropy.apply(
        hidden_RH, weight_VH, bias_V, rows, ids, target_R, row_weight_R, transform, chunk_rows
    )
    return RowScores(loss, nll, correct)


def score_logits(logits_RV: Tensor, target_R: Tensor, row_weight_R: Tensor) -> RowScores:
    """The same scores from logits that stand in memory already: the path for heads that are not a plain linear layer."""
    logits_RV = logits_RV.to(_accumulation_dtype(logits_RV.dtype))
    nll = torch.nn.functional.cross_entropy(logits_RV, target_R, reduction="none")
    correct = logits_RV.detach().argmax(-1) == target_R
    return RowScores((row_weight_R * nll).sum(), nll.detach(), correct)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, own_rows, own_ids, target, row_weight, transform, chunk_rows):  # type: ignore[override]
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        compute_dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        needs_hidden, needs_weight, needs_bias, needs_rows = ctx.needs_input_grad[:4]
        needs_grad = any(ctx.needs_input_grad)
        acc_dtype = _accumulation_dtype(compute_dtype)
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        if chunk_rows is None:
            chunk_rows = max(16, _CHUNK_BYTES.get(device, 1 << 28) // (vocabulary * acc_dtype.itemsize))

        with torch.autocast(device, enabled=False):
            weight_c = weight.to(compute_dtype)
            rows_c = None if own_rows is None else own_rows.to(weight.dtype).to(compute_dtype)
            nll = torch.empty(rows, dtype=acc_dtype, device=hidden.device)
            correct = torch.empty(rows, dtype=torch.bool, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=acc_dtype) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=acc_dtype) if needs_bias else None
            grad_rows = torch.zeros_like(own_rows, dtype=acc_dtype) if needs_rows else None
            scale = _power_of_two(row_weight)
            relative = row_weight / scale
            for start in range(0, rows, chunk_rows):
                part = slice(start, start + chunk_rows)
                hidden_c = hidden[part].to(compute_dtype)
                logits = torch.mm(hidden_c, weight_c.t()).to(acc_dtype)
                if rows_c is not None:
                    logits[:, own_ids] = torch.mm(hidden_c, rows_c.t()).to(acc_dtype)
                if bias is not None:
                    logits.add_(bias)
                logits = transform(logits)
                slope = transform.slope(logits) if needs_grad else None  # before the logits are overwritten
                grad = _score_chunk(logits, target[part], relative[part], nll[part], correct[part], needs_grad)
                if grad is None:
                    continue
                if slope is not None:
                    grad.mul_(slope)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad_c = grad.to(compute_dtype)
                if rows_c is not None:
                    own_grad = grad_c[:, own_ids]
                    grad_c[:, own_ids] = 0  # the rows behind them take no part
                if grad_hidden is not None:
                    grad_hidden[part] = torch.mm(grad_c, weight_c)
                    if rows_c is not None:
                        grad_hidden[part] += torch.mm(own_grad, rows_c)
                if grad_rows is not None:
                    grad_rows += torch.mm(own_grad.t(), hidden_c)
                if grad_weight is not None:
                    if grad_weight.dtype == compute_dtype:
                        grad_weight.addmm_(grad_c.t(), hidden_c)
                    else:
                        grad_weight += torch.mm(grad_c.t(), hidden_c)
            loss = torch.dot(nll, row_weight.to(acc_dtype))
        ctx.grads = (grad_hidden, grad_weight, grad_bias, grad_rows)
        ctx.scale, ctx.dtypes = scale, (weight.dtype, None if own_rows is None else own_rows.dtype)
        ctx.mark_non_differentiable(nll, correct)
        return loss, nll, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any):  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError("the gradients of score_rows are freed by the first backward pass; score the rows again")
        factor = grad_loss * ctx.scale
        grads = [None if grad is None else grad.mul_(factor) for grad in ctx.grads]
        ctx.grads = None
        grad_weight, grad_rows = (
            None if grad is None else grad.to(dtype) for grad, dtype in zip(grads[1::2], ctx.dtypes, strict=True)
        )
        return grads[0], grad_weight, grads[2], grad_rows, None, None, None, None, None


def _score_chunk(
    logits: Tensor, target: Tensor, weight: Tensor, nll: Tensor, correct: Tensor, needs_grad: bool
) -> Tensor | None:
    """Fill ``nll`` [C] and ``correct`` [C]; return d loss / d logits [C, V], in the memory of ``logits``."""
    target = target.unsqueeze(1)
    largest = logits.amax(1, keepdim=True)
    chosen = logits.gather(1, target)
    correct.copy_((chosen == largest).squeeze(1))
    exp = logits.sub_(largest).exp_()
    total = exp.sum(1, keepdim=True)
    nll.copy_((total.log() + largest - chosen).squeeze(1))
    if not needs_grad:
        return None
    weight = weight.to(logits.dtype).unsqueeze(1)
    return exp.mul_(weight / total).scatter_add_(1, target, -weight)


def _power_of_two(row_weight: Tensor) -> Tensor:
    """[] a power of two near the largest weight. Gradients are formed with weights of order one and scaled afterwards: with
    1 / N they would underflow in float16. Dividing by a power of two rounds nothing."""
    if not row_weight.numel():
        return row_weight.new_ones(())
    return torch.ldexp(row_weight.new_ones(()), torch.frexp(row_weight.abs().amax()).exponent)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
