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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sft.products import product, suits

# Bytes of one chunk of logits in the accumulation type; while its gradient is taken a second one stands beside it. On a CPU glibc
# maps blocks of 32 MiB and more anew each time, and their pages cost more than the arithmetic on them (mallopt(3)). A chunk of
# few rows costs time where the weight is trained: each reads and writes the gradient [V, H].
CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 1 << 29}
_LEAST_ROWS = 256


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output of its head: ``softcap * tanh(scale * x / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor, dtype: torch.dtype, needs_slope: bool) -> tuple[Tensor, Tensor | float | None]:
        """The transformed logits, of any shape, and the derivative with respect to the raw ones, None where it is 1.

        Computed in ``dtype``, in place where that is the type of ``logits``; without a transform they stay as they are.
        """
        if self.scale == 1.0 and self.softcap is None:
            return logits, None
        logits = logits.to(dtype).mul_(self.scale)
        if self.softcap is None:
            return logits, self.scale
        logits.div_(self.softcap).tanh_()
        slope = (1 - logits.square()).mul_(self.scale) if needs_slope else None
        return logits.mul_(self.softcap), slope


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
        correct: [R] bool, whether no logit is larger than the target's.
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
        torch.is_grad_enabled(), hidden_RH, weight_VH, bias_V, rows, ids, target_R, row_weight_R, transform, chunk_rows
    )
    return RowScores(loss, nll, correct)


def score_through(
    head: Callable[[Tensor], Tensor],
    hidden_RH: Tensor,
    target_R: Tensor,
    row_weight_R: Tensor,
    transform: LogitTransform = LogitTransform(),
    chunk_rows: int | None = None,
) -> RowScores:
    """Weighted cross entropy of R rows through any head, in chunks: adapters, quantised weights, whatever its forward does.

    Args:
        head: [C, H] -> [C, V], row by row; called once per chunk, and once with no rows to see what it trains.
        hidden_RH, target_R, row_weight_R, transform, chunk_rows: as in ``score_rows``.

    Returns:
        RowScores; gradients flow to ``hidden_RH`` and to every leaf that the head's output depends on.
    """
    device, grad_enabled = hidden_RH.device.type, torch.is_grad_enabled()
    # Casts are not kept from chunk to chunk: the graph of each is taken apart with it.
    with torch.autocast(
        device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
    ):
        none = head(hidden_RH.detach()[:0])
        loss, nll, correct = _ChunkedThroughHead.apply(
            grad_enabled, head, none.detach(), hidden_RH, target_R, row_weight_R, transform, chunk_rows, *_leaves(none)
        )
    return RowScores(loss, nll, correct)


def _leaves(output: Tensor) -> list[Tensor]:
    """The tensors that a backward pass from ``output`` would leave gradients in, each once."""
    nodes, seen, leaves = [output.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return leaves


def score_logits(logits_RV: Tensor, target_R: Tensor, row_weight_R: Tensor) -> RowScores:
    """The same scores from logits that stand in memory already."""
    logits_RV = logits_RV.to(_accumulation_dtype(logits_RV.dtype))
    nll = torch.nn.functional.cross_entropy(logits_RV, target_R, reduction="none")
    return RowScores((row_weight_R * nll).sum(), nll.detach(), _is_largest(logits_RV.detach(), target_R.unsqueeze(1)))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad_enabled, hidden, weight, bias, own_rows, own_ids, target, row_weight, transform, chunk_rows
    ):  # type: ignore[override]
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        compute_dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        # Without a graph nobody asks for gradients, whatever the inputs would take.
        needs_hidden, needs_weight, needs_bias, needs_rows = (
            need and grad_enabled for need in ctx.needs_input_grad[1:5]
        )
        needs_grad = needs_hidden or needs_weight or needs_bias or needs_rows
        acc_dtype = _accumulation_dtype(compute_dtype)
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        chunk_rows = chunk_rows or _rows_of_a_chunk(device, vocabulary, acc_dtype, _LEAST_ROWS if needs_weight else 16)

        with torch.autocast(device, enabled=False):
            weight_c = weight.to(compute_dtype)
            rows_c = None if own_rows is None else own_rows.to(weight.dtype).to(compute_dtype)
            nll = torch.empty(rows, dtype=acc_dtype, device=hidden.device)
            correct = torch.empty(rows, dtype=torch.bool, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = _GradientSum(weight, acc_dtype) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=acc_dtype) if needs_bias else None
            grad_rows = torch.zeros_like(own_rows, dtype=acc_dtype) if needs_rows else None
            scale = _gradient_scale(row_weight, compute_dtype)
            relative = row_weight if scale is None else row_weight / scale
            raw: Tensor | None = None
            for start in range(0, rows, chunk_rows):
                part = slice(start, start + chunk_rows)
                hidden_c = hidden[part].to(compute_dtype)
                # Chunks share their memory, or the last one's is given back before the next is made.
                room, raw = (None if suits(hidden_c, weight_c.t()) else raw), None
                logits = slope = grad = grad_c = None
                raw = logits = product(hidden_c, weight_c.t(), room)
                if rows_c is not None:
                    logits[:, own_ids] = product(hidden_c, rows_c.t())
                if bias is not None:
                    logits = logits.to(acc_dtype).add_(bias)
                logits, slope = transform.apply(logits, acc_dtype, needs_grad)
                grad = _score_chunk(logits, target[part], nll[part], correct[part], needs_grad)
                if grad is None:
                    continue
                if slope is not None:
                    grad.mul_(slope)
                relative_c = relative[part].to(acc_dtype)
                if grad_bias is not None:
                    grad_bias.addmv_(grad.t(), relative_c)
                grad_c = torch.mul(grad, relative_c.unsqueeze(1), out=grad if compute_dtype == acc_dtype else raw)
                if rows_c is not None:
                    own_grad = grad_c[:, own_ids]
                    grad_c[:, own_ids] = 0  # the rows behind them take no part
                if grad_hidden is not None:
                    grad_hidden[part] = product(grad_c, weight_c)
                    if rows_c is not None:
                        grad_hidden[part] += product(own_grad, rows_c)
                if grad_rows is not None:
                    grad_rows += _summed(own_grad.t(), hidden_c, acc_dtype)
                if grad_weight is not None:
                    grad_weight.add_product(grad_c.t(), hidden_c)
            loss = torch.dot(nll, row_weight.to(acc_dtype))
        ctx.grads = (grad_hidden, grad_weight and grad_weight.total(), grad_bias, grad_rows)
        ctx.scale, ctx.dtypes = scale, (weight.dtype, None if own_rows is None else own_rows.dtype)
        ctx.mark_non_differentiable(nll, correct)
        return loss, nll, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any):  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias, grad_rows = _scaled(ctx, grad_loss)
        weight_dtype, rows_dtype = ctx.dtypes
        grad_weight = None if grad_weight is None else grad_weight.to(weight_dtype)
        grad_rows = None if grad_rows is None else grad_rows.to(rows_dtype)
        return None, grad_hidden, grad_weight, grad_bias, grad_rows, None, None, None, None, None


class _ChunkedThroughHead(torch.autograd.Function):
    """As above, through a head that only its own forward knows; its trained parameters are inputs of this function."""

    @staticmethod
    def forward(ctx: Any, grad_enabled, head, like, hidden, target, row_weight, transform, chunk_rows, *parameters):  # type: ignore[override]
        inputs = [need and grad_enabled for need in (ctx.needs_input_grad[3], *ctx.needs_input_grad[8:])]
        acc_dtype, twice = _accumulation_dtype(like.dtype), 2 * like.shape[-1]  # the head's logits and our copy
        chunk_rows = chunk_rows or _rows_of_a_chunk(hidden.device.type, twice, acc_dtype)
        nll = torch.empty(len(hidden), dtype=acc_dtype, device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if inputs[0] else None
        trained = [parameter for parameter, need in zip(parameters, inputs[1:], strict=True) if need]
        sums = [torch.zeros_like(parameter, dtype=_accumulation_dtype(parameter.dtype)) for parameter in trained]
        scale = _gradient_scale(row_weight, like.dtype)
        relative = row_weight if scale is None else row_weight / scale
        for start in range(0, len(hidden), chunk_rows):
            part = slice(start, start + chunk_rows)
            rows = hidden[part].detach().requires_grad_(inputs[0])
            with torch.set_grad_enabled(any(inputs)):
                raw = head(rows)
            logits = raw.detach().to(acc_dtype, copy=True)  # the graph may have kept the head's own
            logits, slope = transform.apply(logits, acc_dtype, any(inputs))
            grad = _score_chunk(logits, target[part], nll[part], correct[part], any(inputs))
            if grad is None:
                continue
            if slope is not None:
                grad.mul_(slope)
            grad.mul_(relative[part].to(acc_dtype).unsqueeze(1))
            wanted = ([rows] if inputs[0] else []) + trained
            found = list(torch.autograd.grad(raw, wanted, grad.to(raw.dtype), allow_unused=True))
            del raw, logits, slope, grad  # else they would stand beside the next chunk's
            if grad_hidden is not None and (of_rows := found.pop(0)) is not None:
                grad_hidden[part] = of_rows
            for total, gradient in zip(sums, found, strict=True):
                total += 0 if gradient is None else gradient
        ctx.grads = (grad_hidden, *sums)
        ctx.scale, ctx.inputs, ctx.dtypes = scale, inputs[1:], [parameter.dtype for parameter in trained]
        ctx.mark_non_differentiable(nll, correct)
        return torch.dot(nll, row_weight.to(acc_dtype)), nll, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any):  # type: ignore[override]
        grad_hidden, *sums = _scaled(ctx, grad_loss)
        cast = (total.to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True))
        of_parameters = [next(cast) if need else None for need in ctx.inputs]
        return None, None, None, grad_hidden, None, None, None, None, *of_parameters


def _summed(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` over the rows of a chunk, of float16 in ``dtype``: the sum may pass 65,504, and no scale of the loss
    helps, since gradients are taken before it is known."""
    if left.dtype != torch.float16 or dtype == left.dtype:
        return product(left, right)
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=dtype)
    return product(left.to(dtype), right.to(dtype))


class _GradientSum:
    """The gradient [V, H] of a weight over the chunks; the first product is the sum, so that nothing is filled with zeros."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._weight, self._dtype = weight, dtype
        self._sum: Tensor | None = None
        self._transposed: Tensor | None = None

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right``, [V, C] x [C, H]."""
        # oneDNN takes the gradient of the logits as it stands for the transposed product alone, and adds to nothing: for the
        # moment of a product two sums stand in memory. Blocks of the vocabulary would be copied, which costs twice the time.
        if suits(left, right):
            added = product(right.t(), left.t())
            self._transposed = added if self._transposed is None else self._transposed.add_(added)
        elif self._sum is None:
            self._sum = _summed(left, right, self._dtype).to(self._dtype)
        elif self._sum.dtype == left.dtype:
            self._sum.addmm_(left, right)
        else:
            self._sum += _summed(left, right, self._dtype)

    def total(self) -> Tensor:
        """The sum, zero without chunks."""
        if self._transposed is not None:  # a last chunk of few rows may stand in the other
            total = self._transposed.t().contiguous()
            return total if self._sum is None else total.add_(self._sum)
        return torch.zeros_like(self._weight, dtype=self._dtype) if self._sum is None else self._sum


def _rows_of_a_chunk(device: str, vocabulary: int, dtype: torch.dtype, least: int = 16) -> int:
    return max(least, CHUNK_BYTES.get(device, 1 << 28) // (vocabulary * dtype.itemsize))


def _scaled(ctx: Any, grad_loss: Tensor) -> list[Any]:
    """The gradients that the forward pass left, times that of the loss; they are given away once."""
    if ctx.grads is None:
        raise RuntimeError("the gradients of score_rows are freed by the first backward pass; score the rows again")
    factor = grad_loss if ctx.scale is None else grad_loss * ctx.scale
    grads, ctx.grads = ctx.grads, None
    if _is_one(factor):
        return list(grads)
    return [None if grad is None else grad.mul_(factor) for grad in grads]


def _score_chunk(logits: Tensor, target: Tensor, nll: Tensor, correct: Tensor, needs_grad: bool) -> Tensor | None:
    """Fill ``nll`` [C] and ``correct`` [C]; return d nll / d logits [C, V] in the type of ``nll``.

    ``logits`` may be of any type and are overwritten where they are of that one.
    """
    target = target.unsqueeze(1)
    correct.copy_(_is_largest(logits, target))
    # One kernel that reads a row, sums in float32 and writes it; on the CPU it has read a row before it writes there.
    in_place = logits.device.type == "cpu" and logits.dtype == nll.dtype
    log_probability = torch.log_softmax(logits, 1, nll.dtype, out=logits if in_place else None)
    nll.copy_(log_probability.gather(1, target).squeeze(1).neg_())
    if not needs_grad:
        return None
    return log_probability.exp_().scatter_add_(1, target, nll.new_full((1, 1), -1.0).expand_as(target))


def _is_largest(logits: Tensor, target: Tensor) -> Tensor:
    """[R] bool of ``logits`` [R, V] and ``target`` [R, 1]; a maximum costs a third of what finding its place does."""
    return (logits.gather(1, target) == logits.amax(1, keepdim=True)).squeeze(1)


def _is_one(factor: Tensor) -> bool:
    """Whether there is nothing to multiply; away from the CPU nobody looks, for that would be to wait for the device."""
    return factor.device.type == "cpu" and factor.item() == 1


def _gradient_scale(row_weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """[] a power of two near the largest weight, or None where nothing can underflow. In float16 gradients are formed with
    weights of order one and scaled afterwards: with 1 / N they would be lost. Dividing by a power of two rounds nothing."""
    if dtype != torch.float16 or not row_weight.numel():
        return None
    return torch.ldexp(row_weight.new_ones(()), torch.frexp(row_weight.abs().amax()).exponent)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
