"""MagiAttention's ranges, and the call of its kernel, through the stand-ins of ``magi_stand_in``."""

from __future__ import annotations

import sys

import pytest
import tiny
import torch
from layouts import KINDS, brute_force, edge_lengths, packed, tokens
from magi_stand_in import fake_module, first_release, later_release, pairs

from hf_sft.attention.backends import backend_named
from hf_sft.attention.layout import Layout
from hf_sft.attention.magi import attention_ranges, magi_attention

MAGI = backend_named("magi")


def cases() -> list[tuple[list[int], int]]:
    packs = [(edge_lengths(size), size) for size in (1, 4, 8)]
    return packs + [([length], 8) for length in edge_lengths(8)]


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_name_every_allowed_pair_once(kind: str) -> None:
    for lengths, block_size in cases():
        row = tokens(kind, lengths, block_size)
        ranges = attention_ranges(Layout.from_batch(packed(kind, lengths, block_size)))
        assert torch.equal(pairs(len(row), *ranges), brute_force(row).long())
        assert (ranges.queries[:, 0] < ranges.queries[:, 1]).all() and (ranges.keys[:, 0] < ranges.keys[:, 1]).all()


@pytest.mark.parametrize("kernel", [first_release, later_release])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_models_learn_what_they_learn_under_a_dense_mask(family: str, kind: str, kernel, monkeypatch) -> None:
    fake_module(monkeypatch, kernel)
    batch = packed(kind, [5, 1, 30], 8)
    found = {}
    for name in ("dense", "magi"):
        model = tiny.tiny_model(family).double()
        backend_named(name).install(model)
        inputs = backend_named(name).inputs(model, Layout.from_batch(batch))
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **inputs).logits
        logits.square().sum().backward()
        found[name] = [logits, *(parameter.grad for parameter in model.parameters())]
    for got, want in zip(found["magi"], found["dense"], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * want.abs().max().item())


def test_scores_are_scaled_and_capped() -> None:
    layout = Layout.from_batch(packed("elided", [9, 4], 4))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, len(layout.doc), 8, dtype=torch.float64) for heads in (4, 2, 2))
    for kernel in (first_release, later_release):
        with pytest.MonkeyPatch.context() as patch:
            fake_module(patch, kernel)
            got, _ = magi_attention(torch.nn.Identity(), q, k, v, None, scaling=0.7, softcap=0.5, hf_sft_layout=layout)
        scores = 0.5 * torch.tanh(q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.7 / 0.5)
        weights = scores.masked_fill(~layout.allowed(), -torch.inf).softmax(-1)
        want = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_a_release_that_cannot_say_it_is_refused(monkeypatch) -> None:
    fake_module(monkeypatch, lambda q, k, v, q_ranges, k_ranges, attn_type_map=None: (q, None))
    layout = Layout.from_batch(packed("causal", [3], 4))
    x = torch.zeros(1, 1, 3, 8)
    with pytest.raises(ValueError, match="does not take softcap, softmax_scale: update it"):
        magi_attention(torch.nn.Identity(), x, x, x, None, scaling=0.5, softcap=1.0, hf_sft_layout=layout)


def test_an_absent_package_is_an_error_that_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "magi_attention", None)
    with pytest.raises(
        ValueError, match=r"git clone --recursive .*MagiAttention.* or choose attention_backend flex or segment"
    ):
        MAGI.install(tiny.tiny_model("llama"))


def test_sliding_windows_are_refused(monkeypatch) -> None:
    fake_module(monkeypatch)
    with pytest.raises(
        ValueError, match=r"sliding window of 7 tokens.*choose attention_backend flex, segment or dense"
    ):
        MAGI.install(tiny.tiny_model("mistral"))
