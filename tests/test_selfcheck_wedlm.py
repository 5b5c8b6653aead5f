"""WeDLM's self-check: backends that are right for clean streams and wrong for noisy ones are found before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sft.attention import selfcheck
from hf_sft.attention.backends import Segment, backend_named
from hf_sft.attention.dense import Dense
from hf_sft.attention.layout import Layout
from hf_sft.attention.selfcheck import check_backend, choose_layout

MASK_ID = 258
FAMILIES = [
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
]  # plain, norms on queries and keys, a window of 7, soft caps and two windows


def noisy(layout: Layout) -> torch.Tensor:
    assert layout.block is not None
    return layout.block >= 0


def last(layout: Layout) -> torch.Tensor:
    """The row's last token: a slot of the second document."""
    return torch.arange(len(layout.doc)) == len(layout.doc) - 1


def refuse(layout: Layout) -> Layout:
    raise ValueError("no noisy streams here")


# What a backend may get wrong about noisy streams.
LIES: dict[str, Callable[[Layout], Layout]] = {
    "the clean stream up to the own position": lambda x: replace(x, limit=x.pos),
    "the truth of the first slot": lambda x: replace(x, limit=x.limit + noisy(x)),
    "one clean token too few": lambda x: replace(x, limit=x.limit - noisy(x).long()),
    "one clean token too few for the last slot": lambda x: replace(x, limit=x.limit - last(x).long()),
    "no clean stream": lambda x: replace(x, limit=torch.where(noisy(x), 0, x.limit)),
    "blocks see each other": lambda x: replace(x, block=torch.where(noisy(x), 0, -1)),
    "every token a block": lambda x: replace(x, block=torch.where(noisy(x), torch.arange(len(x.doc)), -1)),
    "one causal row": lambda x: replace(x, block=None, limit=None, pieces=None),
    "noisy streams fail": refuse,
}
# What only one of the two can get wrong: segment cuts the row by its pieces, dense keeps documents apart by their numbers.
LIES_OF_SEGMENT = {"pieces dropped": lambda x: replace(x, pieces=None)}
LIES_OF_DENSE = {"documents see each other": lambda x: replace(x, doc=torch.zeros_like(x.doc))}
CASES = [
    *((Segment, name, lie) for name, lie in (LIES | LIES_OF_SEGMENT).items()),
    *((Dense, name, lie) for name, lie in (LIES | LIES_OF_DENSE).items()),
]


def wrong_backend(kind: type[Any], lie: Callable[[Layout], Layout]) -> Any:
    """Right for causal layouts; of noisy ones it hears what ``lie`` makes of them."""

    class Wrong(kind):
        name = "wrong"

        def inputs(self, model: Any, layout: Layout) -> dict[str, Any]:
            return super().inputs(model, layout if layout.block is None else lie(layout))

    return Wrong()


@pytest.mark.parametrize("kind, name, lie", [pytest.param(*case, id=f"{case[0].name}-{case[1]}") for case in CASES])
def test_a_backend_that_is_wrong_for_noisy_streams_is_found(kind: type, name: str, lie: Callable) -> None:
    for family in ("llama", "qwen3"):
        model, backend = tiny.tiny_model(family), wrong_backend(kind, lie)
        own = model.config._attn_implementation
        assert check_backend(model, backend).passed
        verdict = check_backend(model, backend, mask_token_id=MASK_ID)
        assert not verdict.passed and verdict.backend == "wrong"
        assert (
            "no noisy streams here" if lie is refuse else "mask slots packed and in one causal pass"
        ) in verdict.reason
        assert model.config._attn_implementation == own  # what failed is not left behind


def test_noisy_streams_without_the_window_are_found() -> None:
    class Wide(Dense):
        def inputs(self, model: Any, layout: Layout) -> dict[str, Any]:
            if layout.block is None:
                return super().inputs(model, layout)
            return {"attention_mask": layout.allowed()[None, None]}

    model = tiny.tiny_model("mistral")
    assert check_backend(model, Wide()).passed
    assert not check_backend(model, Wide(), mask_token_id=MASK_ID).passed


@pytest.mark.parametrize("requested", ["auto", "segment"])
def test_no_layout_is_chosen_that_fails_for_noisy_streams(monkeypatch, requested: str) -> None:
    wrong = wrong_backend(Segment, LIES["the clean stream up to the own position"])
    monkeypatch.setattr(selfcheck, "backend_named", lambda name, **_: wrong)
    model = tiny.tiny_model("llama")
    own = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"two streams of a document come out wrong on LlamaForCausalLM \(wrong: "):
        choose_layout(model, requested, mask_token_id=MASK_ID)
    assert model.config._attn_implementation == own
    assert choose_layout(model, requested).backend is wrong  # the next token alone can be learned with it


def test_auto_goes_on_to_the_next_backend(monkeypatch) -> None:
    wrong = wrong_backend(Segment, LIES["blocks see each other"])
    monkeypatch.setattr(
        selfcheck, "backend_named", lambda name, **_: wrong if name == "segment" else backend_named(name)
    )
    choice = choose_layout(tiny.tiny_model("llama"), mask_token_id=MASK_ID)
    assert choice.name == "dense" and choice.reason.startswith("wrong: ")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["segment", "dense", "flex"])
def test_right_backends_pass(family: str, name: str) -> None:
    model = tiny.tiny_model(family)
    if family == "gemma2" and name == "dense":
        model.set_attn_implementation("eager")  # takes the soft cap in every release
    verdict = check_backend(model, backend_named(name), mask_token_id=MASK_ID)
    assert verdict.passed and "mask slots" in verdict.reason, verdict.reason


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_takes_segments_for_both_streams(family: str) -> None:
    assert choose_layout(tiny.tiny_model(family), mask_token_id=MASK_ID).name == "segment"


def without_rotary_positions(family: str) -> Any:
    if family == "mamba":
        return tiny.tiny_model("mamba")
    sizes = dict(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=256)
    return GPT2LMHeadModel(GPT2Config(**sizes))


@pytest.mark.parametrize("family", ["gpt2", "mamba"])
@pytest.mark.parametrize("requested", ["auto", "dense"])
def test_models_without_rotary_positions_are_refused(family: str, requested: str) -> None:
    with pytest.raises(ValueError, match=r"has no rotary positions.*use objective causal, or a model with RoPE"):
        choose_layout(without_rotary_positions(family), requested, mask_token_id=MASK_ID)


def test_what_two_streams_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="its two streams need a packed layout; leave packing out"):
        choose_layout(tiny.tiny_model(), packing=False, mask_token_id=MASK_ID)
    with pytest.raises(ValueError, match="flex"):
        choose_layout(tiny.tiny_model(), "flex", mask_token_id=MASK_ID)
    with pytest.raises(ValueError, match="flash"):
        choose_layout(tiny.tiny_model(), "flash", mask_token_id=MASK_ID)
