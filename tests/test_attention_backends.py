"""Every backend lets the same pairs through: those of a double loop over the rule."""

from __future__ import annotations

import pytest
import tiny
import torch
from layouts import KINDS, attended, brute_force, edge_lengths, packed, tokens
from magi_stand_in import fake_module

from hf_sft.attention import segment
from hf_sft.attention.backends import BACKEND_NAMES, BACKENDS, backend_named, restore_attention
from hf_sft.attention.flex import flex_layout_attention
from hf_sft.attention.layout import Layout
from hf_sft.attention.magi import magi_attention
from hf_sft.attention.segment import segment_attention

# The unfused kernel says that it is slow; that is known.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
FUNCTIONS = {"segment": segment_attention, "flex": flex_layout_attention, "magi": magi_attention}


def check(kind: str, lengths: list[int], block_size: int, window: int | None) -> None:
    batch = packed(kind, lengths, block_size)
    row = tokens(kind, lengths, block_size)
    layout = Layout.from_batch(batch)
    assert [token.pos for token in row] == layout.pos.tolist(), "the streams lay tokens out otherwise"
    want = brute_force(row, window)
    assert torch.equal(layout.allowed(window), want)
    for name, function in FUNCTIONS.items():
        if name == "magi" and window is not None:
            continue  # ranges know no windows
        seen = attended(function, len(row), sliding_window=window, hf_sft_layout=layout)
        assert torch.equal(seen, want), name


@pytest.fixture(autouse=True)
def _magi(monkeypatch):
    fake_module(monkeypatch)


@pytest.fixture(autouse=True, params=[1, 128])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(segment, "_LEAST_BLOCK", request.param)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_pairs_of_a_pack(block_size: int, kind: str, window: int | None) -> None:
    check(kind, edge_lengths(block_size), block_size, window)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [4, 32])
def test_pairs_of_documents_alone(block_size: int, kind: str) -> None:
    for length in edge_lengths(block_size):
        check(kind, [length], block_size, None)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_pairs_of_a_long_pack(kind: str) -> None:
    """Several tiles, several groups per document, and a block that is larger than a group."""
    check(kind, edge_lengths(32), 32, 50)
    check(kind, [1, 420], 200, None)


def test_names() -> None:
    assert set(BACKENDS) == {"dense", "segment"}, "what trains everywhere"
    assert set(BACKEND_NAMES) == {"dense", "segment", "flash", "flex", "magi"}
    for name in BACKEND_NAMES:
        for wedlm in {False, name != "flash"}:
            assert backend_named(name, wedlm=wedlm).name == name


def test_flash_and_unknown_names_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="flash kernels know whole causal documents by their lengths alone"):
        backend_named("flash", wedlm=True)
    with pytest.raises(ValueError, match="'ring' is unknown; choose auto or one of"):
        backend_named("ring")


def test_one_backend_after_another_and_back() -> None:
    model = tiny.tiny_model("llama")
    for name in ("segment", "flex", "magi", "segment"):
        backend_named(name).install(model)
        assert model.config._attn_implementation == f"hf_sft_{name}"
    assert restore_attention(model) == "sdpa"
    assert restore_attention(model) == "sdpa"


def test_routed_names_are_not_special_to_transformers() -> None:
    for backend in (backend_named(name) for name in ("segment", "flash", "flex", "magi")):
        backend.install(model := tiny.tiny_model("llama"))
        name = model.config._attn_implementation
        assert not any(word in name for word in ("sdpa", "flash", "flex_attention", "eager"))


@pytest.mark.parametrize("name", ["flex", "magi"])
def test_attention_dropout_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"attention dropout is 0.1, and the {name} backend has none"):
        backend_named(name).install(tiny.tiny_model("llama", attention_dropout=0.1))
    layout = Layout.from_batch(packed("causal", [3], 4))
    x = torch.zeros(1, 1, 3, 8)
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1"):
        FUNCTIONS[name](torch.nn.Identity(), x, x, x, None, dropout=0.1, hf_sft_layout=layout)


@pytest.mark.parametrize("name", ["flex", "magi"])
def test_sinks_are_refused(name: str) -> None:
    layout = Layout.from_batch(packed("causal", [3], 4))
    x = torch.zeros(1, 1, 3, 8)
    with pytest.raises(ValueError, match=f"{name} backend has no attention sinks"):
        FUNCTIONS[name](torch.nn.Identity(), x, x, x, None, s_aux=torch.zeros(1), hf_sft_layout=layout)


@pytest.mark.parametrize("name", ["flex", "magi"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_calls_without_a_layout_run_like_sdpa(name: str, family: str) -> None:
    if name == "magi" and family == "mistral":
        return
    model = tiny.tiny_model(family)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9], [7] * 9])
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    want = model.generate(ids, **options)
    backend_named(name).install(model)
    assert model.generate(ids, **options).tolist() == want.tolist()
