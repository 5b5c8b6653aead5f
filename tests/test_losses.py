"""Chunked cross entropy against the plain one: values, gradients, odd shapes, every dtype."""

from __future__ import annotations

import pytest
import torch

from hf_sft import losses
from hf_sft.losses import LogitTransform, ReplacedRows, score_logits, score_rows

TRANSFORMS = {
    "plain": LogitTransform(),
    "softcap": LogitTransform(softcap=3.0),
    "scale": LogitTransform(scale=0.25),
    "both": LogitTransform(scale=0.5, softcap=2.0),
}


def make(rows: int, dtype: torch.dtype = torch.float64, hidden: int = 16, vocabulary: int = 33):
    generator = torch.Generator().manual_seed(rows)
    h = torch.randn(rows, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    b = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(vocabulary, (rows,), generator=generator)
    weight = torch.rand(rows, generator=generator)
    return h, w, b, target, weight


def plain(h, w, b, target, weight, transform: LogitTransform):
    """The formula of the module's head, written out."""
    z = (h @ w.t() + (0 if b is None else b)).to(torch.float64 if h.dtype == torch.float64 else torch.float32)
    z = transform.scale * z
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    nll = torch.logsumexp(z, -1) - z[torch.arange(len(target)), target]
    return (weight * nll).sum(), nll


def grads(loss, *tensors):
    return torch.autograd.grad(loss, [t for t in tensors if t is not None])


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 50])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_plain_formula_in_float64(name: str, rows: int, bias: bool) -> None:
    h, w, b, target, weight = make(rows)
    b = b if bias else None
    scores = score_rows(h, w, b, target, weight, TRANSFORMS[name], chunk_rows=16)
    expected, nll = plain(h, w, b, target, weight, TRANSFORMS[name])
    torch.testing.assert_close(scores.loss, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(scores.nll, nll, rtol=1e-13, atol=1e-13)
    for got, want in zip(grads(3 * scores.loss, h, w, b), grads(3 * expected, h, w, b), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_low_precision_stays_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    # bf16 has 8 bits: its products round at 2**-8 = 4e-3 of their size, and 33 of them are summed.
    h, w, b, target, weight = make(40, dtype)
    scores = score_rows(h, w, b, target, weight, chunk_rows=16)
    exact = [t.detach().double().requires_grad_() for t in (h, w, b)]
    expected, _ = plain(*exact, target, weight, LogitTransform())
    assert scores.loss.dtype == torch.float32
    assert abs(scores.loss.item() - expected.item()) <= tolerance * abs(expected.item())
    for got, want in zip(grads(scores.loss, h, w, b), grads(expected, *exact), strict=True):
        assert (got.double() - want).norm() <= tolerance * want.norm()


def test_tiny_weights_do_not_underflow_in_float16() -> None:
    h, w, _b, target, weight = make(40, torch.float16)
    small = score_rows(h, w, None, target, weight * 1e-6)
    large = score_rows(h, w, None, target, weight)
    # Loss scaling multiplies before the gradient is cast down, as GradScaler does.
    for got, want in zip(grads(small.loss * 1e6, h, w), grads(large.loss, h, w), strict=True):
        assert (got.float() - want.float()).norm() <= 2e-3 * want.float().norm()


@pytest.mark.parametrize("replaced", [False, True])
def test_many_rows_of_one_target_do_not_overflow_in_float16(replaced: bool) -> None:
    """The sum over a chunk passes 65,504 where the gradient, its mean, is 30; no scale of the loss can tell."""
    count = 4000
    h = (torch.randn(count, 16, generator=torch.Generator().manual_seed(0)) / 10).half()
    h[:, 0] = 30
    w = torch.zeros(40, 16, dtype=torch.float16, requires_grad=not replaced)
    rows = torch.zeros(2, 16, dtype=torch.float16, requires_grad=replaced)
    target, weight = torch.full((count,), 3), torch.full((count,), 1 / count)
    own = ReplacedRows(torch.tensor([3, 7]), rows) if replaced else None
    (got,) = grads(score_rows(h, w, None, target, weight, replaced=own).loss, rows if replaced else w)
    exact = w.detach().double().requires_grad_()
    (want,) = grads(plain(h.double(), exact, None, target, weight, LogitTransform())[0], exact)
    torch.testing.assert_close(got.double(), want[[3, 7]] if replaced else want, rtol=2e-3, atol=2e-3)


def test_frozen_parts_get_no_gradient_and_no_work() -> None:
    h, w, b, target, weight = make(20)
    scores = score_rows(h, w.detach(), None, target, weight)
    scores.loss.backward()
    assert h.grad is not None and w.grad is None
    with torch.no_grad():
        assert not score_rows(h, w, b, target, weight).loss.requires_grad


def test_correct_counts_the_largest_logit() -> None:
    h, w, _, target, weight = make(60)
    best = (h @ w.t()).argmax(-1)
    target = torch.where(torch.arange(60) % 3 == 0, best, (best + 1) % 33)
    assert score_rows(h, w, None, target, weight, chunk_rows=16).correct.tolist() == (best == target).tolist()
    assert score_logits(h @ w.t(), target, weight).correct.tolist() == (best == target).tolist()


def test_a_second_backward_is_refused() -> None:
    h, w, _, target, weight = make(5)
    scores = score_rows(h, w, None, target, weight)
    scores.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="score the rows again"):
        scores.loss.backward()


@pytest.mark.parametrize("chunk", [None, 3])
def test_replaced_rows_are_those_of_a_head_with_these_rows(chunk) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (10, 11))
    rows, ids = torch.randn(2, 6, generator=generator, dtype=torch.float64), torch.tensor([7, 3])
    target, row_weight = torch.tensor([7, 3, 0, 1, 7, 2, 4, 3, 9, 10]), torch.rand(10, generator=generator)
    tensors = [tensor.clone().requires_grad_() for tensor in (hidden, weight, rows)]
    got = score_rows(
        tensors[0], tensors[1], None, target, row_weight, chunk_rows=chunk, replaced=ReplacedRows(ids, tensors[2])
    )
    got.loss.backward()
    plain = [tensor.clone().requires_grad_() for tensor in (hidden, weight, rows)]
    logits = plain[0] @ plain[1].index_copy(0, ids, plain[2]).T
    want = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    (want * row_weight).sum().backward()
    torch.testing.assert_close(got.nll, want.detach(), rtol=1e-12, atol=0)
    for ours, theirs in zip(tensors, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "vocabulary, trained, rows",
    [(6400, True, 983), (32_000, True, 256), (32_000, False, 196), (151_680, True, 256), (151_680, False, 41)],
)
def test_chunks_have_few_bytes_but_not_few_rows_where_the_weight_is_trained(
    vocabulary, trained, rows, monkeypatch
) -> None:
    seen, rows_of_a_chunk = [], losses._rows_of_a_chunk
    monkeypatch.setattr(losses, "_rows_of_a_chunk", lambda *how: seen.append(rows_of_a_chunk(*how)) or 1000)
    weight = torch.zeros(vocabulary, 1, requires_grad=trained)
    score_rows(torch.zeros(2, 1), weight, None, torch.zeros(2, dtype=torch.int64), torch.ones(2))
    assert seen == [rows]
