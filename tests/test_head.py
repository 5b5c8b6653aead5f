"""Scoring at the head of whatever kind: losses and gradients are those of the whole logits, which never stand in memory."""

from __future__ import annotations

import contextlib
import logging

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_sft import losses
from hf_sft.losses import score_through
from hf_sft.models.head import HeadScorer, logit_transform
from hf_sft.models.wrappers import evaluating

IDS = torch.arange(40)[None] * 7 % 259
ROWS, TARGETS = torch.arange(0, 40, 2), torch.arange(20) * 5 % 259
WEIGHTS = torch.linspace(0.0, 0.2, 20)
HEAD = ["q_proj", "lm_head"]


def lora(family="llama", config=None, **options):
    torch.manual_seed(1)
    model = get_peft_model(tiny.tiny_model(family, **(config or {})), LoraConfig(**{"target_modules": HEAD} | options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)  # zero at first, and its other half without a gradient then
    return model


def with_bias():
    model = tiny.tiny_model()
    model.lm_head = nn.Linear(32, 259)
    return get_peft_model(model, LoraConfig(target_modules=HEAD, bias="all"))


def merged():
    model = lora()
    model.merge_adapter()
    return model.requires_grad_(True)


def switched_off():
    model = lora()
    model.base_model.disable_adapter_layers()
    model.get_input_embeddings().requires_grad_(True)
    return model


class OddLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.5


def odd():
    model = tiny.tiny_model(tie_word_embeddings=True)
    model.lm_head.__class__ = OddLinear
    return model


MODELS = {
    "full": lambda: tiny.tiny_model(),
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "lora and bias": with_bias,
    "saved": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "merged": merged,
    "switched off": switched_off,
    "tied and odd": odd,
    "soft cap": lambda: lora("gemma2", dict(final_logit_softcapping=2.0)),
    "scale": lambda: lora("granite", dict(logits_scaling=2.0)),
}


def scored(model, chunked, weight=WEIGHTS, grad=True, rows=ROWS, targets=TARGETS):
    """The scores and the gradients of one forward, from chunks or from whole logits."""
    scorer = HeadScorer(model)
    scorer.chunked = chunked
    model.zero_grad()
    with contextlib.nullcontext() if grad else torch.no_grad(), scorer.scoring(rows, targets, weight) as request:
        logits = model(input_ids=IDS, use_cache=False).logits
        scores = scorer.scores(request, logits)
    if grad:
        (3 * scores.loss).backward()
    scorer._hook.remove()
    return scores, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, tolerance=1e-12):
    torch.testing.assert_close(got[0].loss, want[0].loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[0].nll, want[0].nll, rtol=tolerance, atol=tolerance)
    assert got[0].correct.equal(want[0].correct)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three to seven rows at a time."""
    monkeypatch.setattr(losses, "_rows_of_a_chunk", lambda device, width, dtype, least=16: 3 if width > 259 else 7)


@pytest.mark.parametrize("kind", MODELS)
def test_chunks_give_what_whole_logits_give(kind):
    model = MODELS[kind]().double()
    assert HeadScorer(model).verify(model, IDS)
    want = scored(model, False)
    if kind not in ("full", "saved", "tied and odd", "merged", "switched off"):
        assert sum(gradient.norm() > 0 for name, gradient in want[1].items() if "lm_head" in name) >= 2
    assert_same(scored(model, True), want)
    with_pairs = [
        scored(model, chunked, weight=lambda nll: (nll - nll.mean()).float() * WEIGHTS) for chunked in (True, False)
    ]
    assert_same(*with_pairs)
    nothing = dict(rows=ROWS[:0], targets=TARGETS[:0], weight=WEIGHTS[:0])
    assert_same(scored(model, True, **nothing), scored(model, False, **nothing))
    assert_same(scored(model, True, grad=False), (want[0], {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family, config", [("gemma2", {"final_logit_softcapping": 30.0}), ("granite", {"logits_scaling": 1.5})]
)
def test_what_the_config_does_not_name_is_found_with_new_weights(family, config, dtype, caplog):
    model = tiny.tiny_model(family, **config).to(dtype)
    assert HeadScorer(model).verify(model, IDS) and not caplog.text
    scorer = HeadScorer(model)
    scorer.transform = losses.LogitTransform(1.0, None)
    assert not scorer.verify(model, IDS) and "the model's logits are not what" in caplog.text


@pytest.mark.parametrize(
    "name, want",
    [("final_logit_softcapping", (1.0, 30.0)), ("logits_soft_cap", (1.0, 30.0)), ("output_logit_soft_cap", (1.0, 30.0))]
    + [("logit_scale", (30.0, None)), ("lm_head_multiplier", (30.0, None)), ("logits_scaling", (1 / 30, None))],
)
def test_configs_name_caps_and_scales_in_several_ways(name, want):
    config = tiny.tiny_model().config
    setattr(config, name, 30.0)
    assert logit_transform(config) == losses.LogitTransform(*want)


def test_four_bit_heads_are_scored_in_chunks():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    head = bnb.nn.Linear4bit(64, 259, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    head.support_avx512bf16_for_cpu = False
    head.weight.data.normal_()
    head.to("cpu")
    hidden = torch.randn(20, 64)
    found = []
    for make in (
        lambda h: score_through(head, h, TARGETS, WEIGHTS),
        lambda h: losses.score_logits(head(h), TARGETS, WEIGHTS),
    ):
        rows = hidden.clone().requires_grad_()
        scores = make(rows)
        scores.loss.backward()
        found.append((scores, {"hidden": rows.grad}))
    assert_same(*found, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reaches_the_head_and_its_gradients(dtype):
    """Also behind a pass without gradients, whose casts of the weights are not met again."""
    model = lora()
    got, want = [], []
    for chunked, found in ((True, got), (False, want)):
        with torch.autocast("cpu", dtype):
            found += scored(model, chunked, weight=lambda nll: (nll > 0) * WEIGHTS)
    assert got[1].keys() == want[1].keys() and got[0].loss.dtype == torch.float32
    for name, gradient in want[1].items():
        assert (got[1][name] - gradient).norm() <= 0.05 * gradient.norm(), name
    assert abs(got[0].loss - want[0].loss) < 0.01 * want[0].loss


def test_dropout_is_drawn_alike_where_rows_are_scored_twice():
    """A loss that asks for the nll first gets the gradient of what it has seen."""
    model, seen = lora(lora_dropout=0.5).train(), []
    scores, _ = scored(model, True, weight=lambda nll: (seen.append(nll), WEIGHTS)[1])
    assert seen[0].equal(scores.nll)
    with evaluating(model):
        assert not scored(model, True)[0].nll.equal(scores.nll)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


@pytest.mark.parametrize("kind", ["full", "lora", "soft cap"])
def test_logits_are_never_whole(kind):
    """With more rows than the model is wide, nothing in a step is as large as the logits of the scored rows."""
    model = MODELS[kind]()
    rows, ids = torch.arange(40), torch.arange(40) % 259
    largest = {}
    for chunked in (True, False):
        with Largest() as mode:
            scored(model, chunked, rows=rows, targets=ids, weight=torch.ones(40))
        largest[chunked] = mode.numbers
    assert largest[False] == 40 * 259 and largest[True] == 32 * 259  # the weight itself


def test_evaluation_takes_no_gradient(monkeypatch):
    asked, score = [], losses._score_chunk
    monkeypatch.setattr(losses, "_score_chunk", lambda *args: (asked.append(args[-1]), score(*args))[1])
    for model in (tiny.tiny_model(), lora()):
        scored(model, True, grad=False)
        scored(model, True, grad=False, weight=lambda nll: nll.float())
        assert asked and not any(asked)
        scored(model, True)
        assert any(asked)
        asked.clear()


def test_logits_that_the_config_does_not_tell_are_whole_and_said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_sft"), "propagate", True)
    model = lora()
    base = model.get_base_model()
    base.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits * 2))
    scorer = HeadScorer(model)
    with caplog.at_level("WARNING"):
        assert not scorer.verify(model, IDS) and not scorer.chunked
    assert "the model's logits are not what its head" in caplog.text and scorer.why_whole in caplog.text


def test_parts_of_a_head_that_zero3_gathers_one_by_one_run_whole(caplog):
    for model, chunked in ((lora(), False), (tiny.tiny_model(), True)):
        for parameter in model.get_output_embeddings().parameters():
            parameter.ds_id = 0
        scorer = HeadScorer(model)
        with caplog.at_level("WARNING"):
            scorer.after_engine()
        assert scorer.chunked is chunked and ("ZeRO-3" in scorer.why_whole) is not chunked


def test_whoever_the_head_asks_is_trained():
    """Leaves are found in the graph: a tensor that is no parameter of the head has its gradient too."""
    weight, shift = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, dtype=torch.float64, requires_grad=True)
    hidden, target, share = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 9, torch.rand(20)

    def head(rows):
        return (rows @ weight.T + shift).tanh()  # whose backward reads its own output

    found = []
    for make in (score_through, lambda head, h, t, w: losses.score_logits(head(h), t, w)):
        shift.grad = None
        rows = hidden.clone().requires_grad_()
        scores = make(head, rows, target, share)
        scores.loss.backward()
        found.append((scores, {"shift": shift.grad.clone(), "hidden": rows.grad}))
    assert_same(*found)
