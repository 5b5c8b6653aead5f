"""WeDLM's batches: what they hold, and that loss and gradients are those of a plain implementation, on every backend."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import tiny
import torch

from hf_sft.attention.backends import BACKENDS
from hf_sft.attention.layout import Layout
from hf_sft.collators import WeDLMCollator
from hf_sft.models.head import HeadScorer
from hf_sft.models.wrappers import base_model
from hf_sft.noise import MaskRule, document_generator, draw_mask

B, MASK_ID, AR_WEIGHT = 8, 258, 0.5
# An answer shorter than a block, one token, several blocks, a prompt that fills the document.
PROMPTS_AND_ANSWERS = [(3, 4), (0, 1), (20, 45), (11, 0), (9, 23)]


def rows() -> list[dict]:
    rng = np.random.default_rng(0)
    made = []
    for prompt, answer in PROMPTS_AND_ANSWERS:
        ids = rng.integers(0, 255, prompt + answer)
        made.append({"input_ids": ids, "labels": np.where(np.arange(len(ids)) < prompt, -100, ids)})
    return [{**row, "document": 7 + number, "epoch": 2} for number, row in enumerate(made)]


def collator(**options) -> WeDLMCollator:
    rule = MaskRule(B, **{k: options.pop(k) for k in ("sampling", "weighting", "per_block") if k in options})
    return WeDLMCollator(MASK_ID, rule, seed=3, **options)


def plain_weights(masked: np.ndarray, supervised: np.ndarray, rule: MaskRule, generator) -> np.ndarray:
    """[L] weights of the slots, block by block from n, m and the first numbers of the generator."""
    blocks = -(-len(masked) // B)
    ratio = np.broadcast_to(1 - generator.random(blocks if rule.per_block else 1), blocks)
    weight = np.zeros(len(masked))
    for number in range(blocks):
        block = slice(number * B, number * B + B)
        n, m = supervised[block].sum(), masked[block].sum()
        if m and rule.sampling == "elbo":
            weight[block] = 2 * n / (n + 1) if rule.weighting == "uniform" else n / m
        elif m:
            weight[block] = 1 if rule.weighting == "uniform" else 1 / ratio[number]
    return weight * masked


def plain_loss(model, rule: MaskRule, ar: bool) -> torch.Tensor:
    """From the paper, document by document: both streams whole, one dense mask, all logits, the sums written out."""
    slot_sum, next_sum = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    weights, supervised_tokens, next_rows = 0.0, 0, 0
    for row in rows():
        ids, supervised = row["input_ids"], row["labels"] != -100
        length = len(ids)
        mask = draw_mask(supervised, rule, document_generator(3, 2, row["document"]))
        weight = plain_weights(mask.masked, supervised, rule, document_generator(3, 2, row["document"]))
        order = [
            p
            for s in range(0, length, B)
            for m in (False, True)
            for p in range(s, min(s + B, length))
            if mask.masked[p] == m
        ]
        order = np.array(order, dtype=np.int64)
        pos = np.concatenate([np.arange(length), order])
        noisy = np.where(mask.masked[order], MASK_ID, ids[order])
        q, k = np.meshgrid(np.arange(2 * length), np.arange(2 * length), indexing="ij")
        clean_q, clean_k = q < length, k < length
        same_block = pos[q] // B == pos[k] // B
        allowed = np.where(
            clean_k, np.where(clean_q, pos[k] <= pos[q], pos[k] < pos[q] // B * B), ~clean_q & same_block & (k <= q)
        )
        logits = model(
            input_ids=torch.from_numpy(np.concatenate([ids, noisy]))[None], position_ids=torch.from_numpy(pos)[None],
            attention_mask=torch.from_numpy(allowed)[None, None], use_cache=False,
        ).logits[0].double()  # fmt: skip
        nll = -torch.log_softmax(logits, -1)
        for place, position in enumerate(order):
            if mask.masked[position]:
                slot_sum = slot_sum + weight[position] * nll[length + place, ids[position]]
        for position in range(length - 1):
            if supervised[position + 1]:
                next_sum, next_rows = next_sum + nll[position, ids[position + 1]], next_rows + 1
        weights, supervised_tokens = weights + weight.sum(), supervised_tokens + supervised.sum()
    a = AR_WEIGHT if ar else 0.0
    slot_sum = slot_sum / (weights if rule.sampling == "reference" else supervised_tokens)
    return slot_sum / (1 + a) + (a / (1 + a) * next_sum / next_rows if ar else 0.0)


def our_loss(model, batch, backend) -> torch.Tensor:
    a = AR_WEIGHT if (batch["target_kind"] == 0).any() else 0.0
    coefficient = torch.tensor([a / (1 + a), 1 / (1 + a)]) / batch["num_items"].clamp_min(1e-9)
    weight = (batch["target_weight"] * coefficient[batch["target_kind"]]).float()
    scorer = HeadScorer(model)
    inputs = backend.inputs(base_model(model), Layout.from_batch(batch))
    with scorer.scoring(batch["logits_to_keep"], batch["target_ids"], weight) as request:
        outputs = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **inputs)
    return scorer.scores(request, outputs.logits).loss


def make_model(family: str):
    model = tiny.tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    return model


RULES = {
    "elbo": {},
    "elbo uniform": dict(weighting="uniform"),
    "elbo per document": dict(per_block=False),
    "reference": dict(sampling="reference"),
    "reference uniform": dict(sampling="reference", weighting="uniform"),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rule, ar", [*((rule, True) for rule in RULES), ("elbo", False)])
def test_loss_and_gradients_are_those_of_a_plain_implementation(family: str, rule: str, ar: bool) -> None:
    """In float64; what is left is that the weights of targets are float32."""
    options, model = RULES[rule], make_model(family).double()
    want = plain_loss(model, MaskRule(B, **options), ar)
    want.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    for elide in (True, False):
        batch = collator(enable_ar_loss=ar, elide=elide, **options)([rows()])
        for backend in BACKENDS.values():
            model = make_model(family).double()
            backend.install(model)
            loss = our_loss(model, batch, backend)
            loss.backward()
            assert abs(loss.item() - want.item()) <= 2e-7 * want.item()
            for name, parameter in model.named_parameters():
                size = total if name.endswith("k_proj.bias") else gradients[name].norm()  # softmax ignores a key bias
                assert (parameter.grad - gradients[name]).norm() <= 5e-7 * size, (name, backend.name, elide)


def test_segments_honour_a_sliding_window_over_logical_positions() -> None:
    batch = collator()([rows()])
    logits = {}
    for name, backend in BACKENDS.items():
        model = make_model("mistral")  # window 7
        backend.install(model)
        inputs = backend.inputs(model, Layout.from_batch(batch))
        with torch.no_grad():
            logits[name] = model(
                batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **inputs
            ).logits
    torch.testing.assert_close(
        logits["segment"], logits["dense"], rtol=0, atol=1e-5 * logits["dense"].abs().max().item()
    )


def test_the_contract() -> None:
    batch = collator()([rows()])
    slots = batch["target_kind"] == 1
    assert (batch["input_ids"][0, batch["logits_to_keep"][slots]] == MASK_ID).all()
    assert not (batch["input_ids"][0, batch["logits_to_keep"][~slots]] == MASK_ID).any()
    supervised = sum(answer for _, answer in PROMPTS_AND_ANSWERS)
    next_rows = sum(answer - (prompt == 0) for prompt, answer in PROMPTS_AND_ANSWERS if answer)
    assert batch["num_items"].tolist() == [next_rows, supervised]
    assert batch["target_weight"][slots].sum().item() == pytest.approx(supervised, rel=1e-6)
    assert batch["num_tokens"] == sum(map(sum, PROMPTS_AND_ANSWERS)) < batch["input_ids"].shape[1]
    assert sum(batch["doc_lengths"]) == batch["input_ids"].shape[1]
    # The document that is all prompt has no noisy stream; every row of a slot belongs to the document it says.
    assert batch["doc_pieces"][3] == (11, [])
    assert (batch["doc_ids"][0, batch["logits_to_keep"]] == batch["target_doc"]).all()
    assert len(pickle.dumps(batch)) < 20_000


def test_the_cut_of_a_batch_changes_nothing() -> None:
    """Slots, targets and weights of a document are the same alone and packed, in any order, on any rank."""
    together = collator()([rows()])
    for number, row in enumerate(rows()):
        alone = collator()([row])
        own = together["target_doc"] == number
        for key in ("target_ids", "target_weight", "target_kind"):
            assert alone[key].tolist() == together[key][own].tolist(), key
    other_epoch = collator()([[{**row, "epoch": 3} for row in rows()]])
    assert other_epoch["input_ids"].tolist() != together["input_ids"].tolist()


def test_reference_weights_sum_to_one_per_micro_batch() -> None:
    batch = collator(sampling="reference")([rows()])
    assert batch["target_weight"][batch["target_kind"] == 1].sum().item() == pytest.approx(1, rel=1e-6)
    assert batch["num_items"][1] == 1


def test_a_reference_micro_batch_counts_as_one_whatever_chance_masks() -> None:
    """An answer of one token is masked where gamma rounds to 1. N counts micro-batches with something to learn, so that losing
    all slots in one of them does not raise the weight of the others."""
    make = collator(sampling="reference")
    answer = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "document": 0}
    prompt = {"input_ids": [5, 6, 7], "labels": [-100, -100, -100], "document": 1}
    slots = []
    for epoch in range(20):
        gamma = 1 - document_generator(3, epoch, 0).random()
        for bins in ([[{**answer, "epoch": epoch}]], [[{**answer, "epoch": epoch}, {**prompt, "epoch": epoch}]]):
            batch = make(bins)
            masked = batch["target_kind"] == 1
            assert batch["num_items"].tolist() == [1, 1]
            assert masked.sum() == (gamma > 0.5) == batch["target_weight"][masked].sum()
        slots.append(int(masked.sum()))
        assert make([[{**prompt, "epoch": epoch}]])["num_items"].tolist() == [0, 0]
    assert set(slots) == {0, 1}
    assert make([])["num_items"].tolist() == [0, 0]
    # Under elbo N counts the supervised tokens.
    assert collator()([[answer, prompt]])["num_items"].tolist() == [1, 1]
    assert collator()([[answer, answer]])["num_items"].tolist() == [2, 2]
    assert make([[answer, answer]])["num_items"].tolist() == [2, 1]


@pytest.mark.parametrize(
    "bins", [[], [[{"input_ids": [1, 2, 3], "labels": [-100] * 3}]], [[{"input_ids": [5], "labels": [5]}]]]
)
@pytest.mark.parametrize("name", BACKENDS)
def test_odd_batches_give_finite_losses_and_connected_gradients(bins: list, name: str) -> None:
    model = make_model("llama")
    BACKENDS[name].install(model)
    loss = our_loss(model, collator()(bins), BACKENDS[name])
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_4d_mask_is_the_rule() -> None:
    batch = collator(return_4d_mask=True)([rows()])
    assert (batch["attention_mask"][0, 0] == Layout.from_batch(batch).allowed()).all()
