"""Packed, padded and one by one: the same losses and the same gradients, on every backend and family."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from hf_sft.attention import layout as layout_module
from hf_sft.attention import segment as segment_module
from hf_sft.attention.backends import BACKENDS, Segment, layer_windows
from hf_sft.attention.layout import Layout, draw
from hf_sft.attention.selfcheck import check_backend, choose_layout
from hf_sft.collators import CausalCollator
from hf_sft.models.head import HeadScorer
from hf_sft.models.wrappers import base_model

PACKABLE = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_neox"]  # test_families has the others
LENGTHS = [1, 23, 6, 40, 2]  # a document without a next token, and some beyond the sliding window of 7
VARIANTS = ["plain", "peft", "checkpointing", "peft+checkpointing"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Documents of a few tokens are cut at sliding windows like long ones."""
    monkeypatch.setattr(segment_module, "_LEAST_BLOCK", 1)


def make_layout(lengths: list[int]) -> Layout:
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Layout(doc, torch.cat([torch.arange(n) for n in lengths]), lengths)


def rows() -> list[dict]:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 255, length) for length in LENGTHS]
    return [{"input_ids": ids, "labels": np.where(rng.random(len(ids)) < 0.6, ids, -100)} for ids in documents]


def make_model(family: str, variant: str):
    # Soft caps are set low enough to bend the tiny logits.
    caps = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5} if family == "gemma2" else {}
    model = tiny.tiny_model(family, **caps)
    if caps:
        model.set_attn_implementation("eager")  # sdpa knows no soft cap
    with torch.no_grad():  # weights large enough that attention matters
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    if "peft" in variant:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if "checkpointing" in variant:
        tiny.checkpoint_activations(model)
    return model


def learned(model, batches, backend=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Per-token losses and gradients of the summed loss, the way the Trainer computes them."""
    scorer = HeadScorer(model)
    nll = []
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask") if key in batch}
        if backend is not None:
            inputs |= backend.inputs(base_model(model), Layout.from_batch(batch))
        weight = batch["target_weight"]
        with scorer.scoring(batch["logits_to_keep"], batch["target_ids"], weight) as request:
            outputs = model(**inputs, use_cache=False)
        scores = scorer.scores(request, outputs.logits)
        scores.loss.backward()
        nll.append(scores.nll)
    return torch.cat(nll), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def reference(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each document alone through the untouched model, cross entropy from its full logits."""
    nll = []
    for row in rows():
        ids, labels = torch.tensor(row["input_ids"])[None], torch.tensor(row["labels"])[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        kept = labels != -100
        nll.append(torch.nn.functional.cross_entropy(logits[kept].float(), labels[kept], reduction="none"))
    nll = torch.cat(nll)
    nll.sum().backward()
    return nll.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want) -> None:
    assert (got[0] - want[0]).norm() <= 1e-5 * want[0].norm()
    assert got[1].keys() == want[1].keys() and want[1]
    total = torch.stack([g.norm() for g in want[1].values()]).norm()
    for name, gradient in want[1].items():
        # A key bias has no gradient at all (softmax ignores it): there only rounding is left, measured by the whole.
        size = total if name.endswith("k_proj.bias") else gradient.norm()
        assert (got[1][name] - gradient).norm() <= 1e-5 * size, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", PACKABLE)
def test_packed_padded_and_one_by_one_learn_the_same(family: str, variant: str) -> None:
    want = reference(make_model(family, variant))
    padded = CausalCollator(packed=False)(rows())
    assert_same(learned(make_model(family, variant), [padded]), want)
    one_by_one = [CausalCollator(packed=False)([row]) for row in rows()]
    assert_same(learned(make_model(family, variant), one_by_one), want)
    packed = CausalCollator()([rows()])
    for backend in BACKENDS.values():
        model = make_model(family, variant)
        backend.install(base_model(model))
        assert_same(learned(model, [packed], backend), want)


def test_the_picture_of_the_docstring_is_the_rule() -> None:
    picture = layout_module.__doc__.split("see key)::")[1]
    expected = "\n".join(line.strip()[1:].strip() for line in picture.strip().split("\n\n")[0].splitlines()[1:])
    assert draw(make_layout([3, 2, 4]).allowed()) == expected


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_the_rule_equals_a_double_loop(window: int | None) -> None:
    lengths = [1, 4, 2, 9]
    layout = make_layout(lengths)
    allowed = layout.allowed(window)
    for q in range(sum(lengths)):
        for k in range(sum(lengths)):
            want = layout.doc[q] == layout.doc[k] and k <= q
            want = want and (window is None or layout.pos[q] - layout.pos[k] < window)
            assert bool(allowed[q, k]) == bool(want)


@pytest.mark.parametrize(
    "groups, window, softcap, sinks",
    [(1, None, None, False), (2, 3, None, False), (2, 3, 0.7, True), (1, 1, None, False), (1, 8, None, True)],
)
def test_segment_equals_attention_under_the_dense_mask(groups, window, softcap, sinks) -> None:
    lengths, heads, width = [1, 5, 9], 4, 8
    torch.manual_seed(0)
    q = torch.randn(1, heads, 15, width, dtype=torch.float64)
    k, v = (torch.randn(1, heads // groups, 15, width, dtype=torch.float64) for _ in range(2))
    s_aux = torch.randn(heads, dtype=torch.float64) if sinks else None
    layout = make_layout(lengths)
    from hf_sft.attention.backends import segment_attention

    got, _ = segment_attention(
        torch.nn.Identity(), q, k, v, None, sliding_window=window, softcap=softcap, s_aux=s_aux, hf_sft_layout=layout
    )
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) / width**0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~layout.allowed(window), -torch.inf)
    if sinks:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(1, -1, 15, 1)], -1)
    probabilities = scores.softmax(-1)[..., :15]
    want = (probabilities @ v.repeat_interleave(groups, 1)).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("length, window, block", [(1000, 100, 128), (1000, 300, 128), (257, 128, 128), (50, 7, 1)])
def test_a_sliding_window_costs_its_band_and_not_the_square_of_the_document(length, window, block, monkeypatch) -> None:
    monkeypatch.setattr(segment_module, "_LEAST_BLOCK", block)
    areas, masks, attend = [], [], segment_module.scaled_dot_product_attention

    def counted(q, k, v, attn_mask=None, **options):
        areas.append(q.shape[2] * k.shape[2])
        masks.append(attn_mask)
        return attend(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(segment_module, "scaled_dot_product_attention", counted)
    layout, row = make_layout([length]), torch.randn(1, 2, length, 4)
    for _ in range(2):
        segment_module.segment_attention(
            torch.nn.Identity(), *3 * [row], None, sliding_window=window, hf_sft_layout=layout
        )
    assert sum(areas) <= 2 * length * (window + max(window, block))
    assert len({id(mask) for mask in masks}) <= 3  # the first block's, those between, the last one's: for all layers


def test_windows_are_read_per_kind_of_layer() -> None:
    assert layer_windows(tiny.tiny_model("mistral").config) == {"full_attention": 7}
    assert layer_windows(tiny.tiny_model("gemma2").config) == {"full_attention": None, "sliding_attention": 7}
    assert layer_windows(tiny.tiny_model("qwen3").config) == {"full_attention": None}


@pytest.mark.parametrize("family", PACKABLE)
def test_auto_takes_segments(family: str) -> None:
    assert choose_layout(make_model(family, "plain")).name == "segment"


class Leaking(Segment):
    """A backend with the commonest fault: one causal row, borders ignored."""

    name = "leaking"

    def inputs(self, model, layout):
        whole = [sum(layout.doc_lengths)]
        return super().inputs(model, Layout(torch.zeros_like(layout.doc), layout.pos, whole))


@pytest.mark.parametrize("family", PACKABLE)
def test_the_selfcheck_finds_documents_that_see_each_other(family: str) -> None:
    verdict = check_backend(tiny.tiny_model(family), Leaking())
    assert not verdict.passed and "see each other" in verdict.reason


def test_the_selfcheck_finds_a_layout_that_is_dropped(monkeypatch) -> None:
    model = tiny.tiny_model("llama")
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, hf_sft_layout=None, **k: forward(*a, **k))
    assert not check_backend(model, BACKENDS["segment"]).passed
    assert choose_layout(model).name == "dense"


def test_a_recurrent_model_is_trained_padded(caplog) -> None:
    model = tiny.tiny_model("mamba")
    choice = choose_layout(model)
    assert choice.name == "padded" and "cannot be packed" in caplog.text
    want = reference(tiny.tiny_model("mamba"))
    assert_same(learned(model, [CausalCollator(packed=False)(rows())]), want)


@pytest.mark.parametrize("ask", [{"requested": "segment"}, {"packing": True}])
def test_packing_a_recurrent_model_by_name_is_an_error(ask: dict) -> None:
    with pytest.raises(ValueError, match="MambaForCausalLM cannot be packed"):
        choose_layout(tiny.tiny_model("mamba"), **ask)


def test_contradictions_and_unknown_backends_are_errors() -> None:
    with pytest.raises(ValueError, match="leave out one"):
        choose_layout(tiny.tiny_model(), "segment", packing=False)
    with pytest.raises(ValueError, match="choose auto or one of dense, segment, flash, flex, magi"):
        choose_layout(tiny.tiny_model(), "ring")


def test_generation_works_on_a_model_prepared_for_segments() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    for family in ("llama", "mistral", "gemma2"):
        model = make_model(family, "plain").eval()
        want = model.generate(ids, **options)
        BACKENDS["segment"].install(model)
        assert model.generate(ids, **options).tolist() == want.tolist()
