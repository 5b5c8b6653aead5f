"""WeDLM's noise and streams: what is masked, with which weight, in which order, and that elision loses nothing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tiny
import torch

from hf_sft.attention import layout as layout_module
from hf_sft.attention.layout import Layout, draw
from hf_sft.noise import MaskRule, document_generator, draw_mask, mask_at_ratio
from hf_sft.streams import noisy_stream

B = 8
LENGTHS = [1, B - 1, B, B + 1, 3 * B + 5, 10 * B]


def supervised(length: int, seed: int = 0) -> np.ndarray:
    flags = np.random.default_rng(seed).random(length) < 0.7
    flags[-1] = True
    return flags


# Noise


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("per_block", [True, False])
def test_elbo_masks_ceil_u_n_of_each_block(length: int, per_block: bool) -> None:
    flags, rule = supervised(length), MaskRule(B, per_block=per_block)
    for seed in range(20):
        mask = draw_mask(flags, rule, document_generator(seed, 0, 0))
        assert not (mask.masked & ~flags).any() and (mask.weight[~mask.masked] == 0).all()
        for start in range(0, length, B):  # every block with something to learn has a mask slot, and weighs n
            block = slice(start, start + B)
            n = flags[block].sum()
            assert mask.masked[block].sum() >= (n > 0)
            assert mask.weight[block].sum() == pytest.approx(n, rel=1e-12)


def test_every_number_of_slots_is_equally_likely() -> None:
    flags, rule = np.ones(4, dtype=bool), MaskRule(4)
    counts = [draw_mask(flags, rule, document_generator(0, 0, d)).masked.sum() for d in range(4000)]
    share = np.bincount(counts, minlength=5)[1:] / 4000
    assert np.abs(share - 0.25).max() < 4 * math.sqrt(0.25 * 0.75 / 4000)  # 4 standard errors


Slots = tuple[int, ...]


def every_mask(flags: np.ndarray, rule: MaskRule) -> dict[Slots, tuple[float, np.ndarray]]:
    """All masks of a document with one block to learn: positions of the slots -> probability and weight [L], as drawn.

    m = ceil(u n) is constant on each of the n intervals of u, so that the middle of each stands for a probability of 1 / n.
    """
    n, found = int(flags.sum()), {}
    blocks = -(-len(flags) // rule.block_size)
    for m in range(1, n + 1):
        drawn = {}
        for seed in range(200):
            mask = mask_at_ratio(flags, np.full(blocks, (m - 0.5) / n), rule, np.random.default_rng(seed))
            drawn[tuple(np.nonzero(mask.masked)[0].tolist())] = mask.weight
        assert set(drawn) == set(itertools.combinations(np.nonzero(flags)[0].tolist(), m))  # every subset, no other
        found |= {slots: (1 / n / len(drawn), weight) for slots, weight in drawn.items()}
    return found


@pytest.mark.parametrize("weighting", ["weighted", "uniform"])
def test_the_weights_of_all_masks_sum_to_n(weighting: str) -> None:
    """And n / m makes any nll(i, S) the any-order bound; uniform weights keep the sum of weights only."""
    n, rng = 4, np.random.default_rng(0)
    drawn = every_mask(np.ones(n, dtype=bool), MaskRule(n, weighting=weighting))  # type: ignore[arg-type]
    assert len(drawn) == 2**n - 1
    assert sum(share * weight.sum() for share, weight in drawn.values()) == pytest.approx(n, rel=1e-12)
    nll = {slots: rng.random(len(slots)) for slots in drawn}
    total = sum(share * (weight[list(slots)] * nll[slots]).sum() for slots, (share, weight) in drawn.items())
    means = [np.mean([nll[slots].mean() for slots in drawn if len(slots) == m]) for m in range(1, n + 1)]
    assert (total == pytest.approx(n * np.mean(means), rel=1e-12)) == (weighting == "weighted")


def test_reference_masks_round_n_gamma_with_weight_1_over_gamma() -> None:
    flags, rule = np.ones(B, dtype=bool), MaskRule(B, sampling="reference")
    for gamma in (0.01, 0.3, 0.5, 0.99):
        mask = mask_at_ratio(flags, np.array([gamma]), rule, np.random.default_rng(0))
        assert mask.masked.sum() == round(B * gamma)
        assert (mask.weight[mask.masked] == 1 / gamma).all()


def test_noise_depends_on_seed_epoch_and_document_alone() -> None:
    flags, rule = np.ones(64, dtype=bool), MaskRule(B)
    draws = {
        key: draw_mask(flags, rule, document_generator(*key)).masked
        for key in itertools.product((0, 1), (0, 1), range(5))
    }
    assert len({mask.tobytes() for mask in draws.values()}) == len(draws)
    for key, mask in draws.items():
        assert (draw_mask(flags, rule, document_generator(*key)).masked == mask).all()


@pytest.mark.parametrize("wrong", [{"block_size": 0}, {"sampling": "all"}, {"weighting": "none"}])
def test_wrong_rules_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(str(value) for value in wrong.values()))):
        MaskRule(**wrong)


# Streams and layout


def dual(documents: list[np.ndarray], elide: bool) -> tuple[Layout, np.ndarray, np.ndarray]:
    """Layout of packed documents (clean, then noisy stream of each), the row's slots, and its positions in the whole text."""
    doc, pos, block, limit, slot, lengths = [], [], [], [], [], []
    for number, masked in enumerate(documents):
        stream, length = noisy_stream(masked, B, elide=elide), len(masked)
        pos += [np.arange(length), stream.pos]
        block += [np.full(length, -1), stream.block]
        limit += [np.arange(length) + 1, stream.anchor]
        slot += [np.zeros(length, bool), stream.slot]
        lengths.append(length + len(stream.pos))
        doc.append(np.full(lengths[-1], number))
    tensors = [torch.from_numpy(np.concatenate(parts)) for parts in (doc, pos, block, limit)]
    return Layout(tensors[0], tensors[1], lengths, tensors[2], tensors[3]), np.concatenate(slot), tensors[1].numpy()


def masks(lengths: list[int]) -> list[np.ndarray]:
    return [draw_mask(supervised(n, n), MaskRule(B), document_generator(1, 0, n)).masked for n in lengths]


def brute_force(documents: list[np.ndarray], elide: bool) -> np.ndarray:
    """The rule told token by token, from the documents, without the layout's arrays."""
    rows: list[tuple[int, str, int, int]] = []  # document, stream, position, anchor
    for number, masked in enumerate(documents):
        rows += [(number, "clean", p, 0) for p in range(len(masked))]
        for start in range(0, len(masked), B):
            block = range(start, min(start + B, len(masked)))
            slots = [p for p in block if masked[p]]
            anchor = start
            if elide and not slots:
                continue
            if elide:
                anchor = slots[0]
            rows += [(number, "noisy", p, anchor) for p in block if not masked[p] and p >= anchor]
            rows += [(number, "noisy", p, anchor) for p in slots]
    allowed = np.zeros((len(rows), len(rows)), dtype=bool)
    for q, (doc_q, stream_q, pos_q, anchor_q) in enumerate(rows):
        for k, (doc_k, stream_k, pos_k, _) in enumerate(rows):
            if doc_q != doc_k:
                continue
            if stream_k == "clean":
                allowed[q, k] = pos_k <= pos_q if stream_q == "clean" else pos_k < anchor_q
            elif stream_q == "noisy":
                allowed[q, k] = pos_k // B == pos_q // B and k <= q
    return allowed


@pytest.mark.parametrize("elide", [True, False])
@pytest.mark.parametrize("lengths", [*([n] for n in LENGTHS), LENGTHS])
def test_allowed_pairs_equal_a_double_loop(lengths: list[int], elide: bool) -> None:
    layout, _, _ = dual(masks(lengths), elide)
    assert (layout.allowed().numpy() == brute_force(masks(lengths), elide)).all()


def test_the_second_picture_of_the_docstring_is_the_rule() -> None:
    picture = layout_module.__doc__.split("are masked)::")[1]
    expected = "\n".join(line.strip()[1:].strip() for line in picture.strip().splitlines()[1:])
    masked, streams = np.array([False, True, True, False]), noisy_stream(np.array([False, True, True, False]), 2)
    doc = torch.zeros(4 + len(streams.pos), dtype=torch.int64)
    pos = torch.from_numpy(np.concatenate([np.arange(4), streams.pos]))
    block = torch.from_numpy(np.concatenate([np.full(4, -1), streams.block]))
    limit = torch.from_numpy(np.concatenate([np.arange(4) + 1, streams.anchor]))
    assert masked.sum() == streams.slot.sum()
    assert draw(Layout(doc, pos, [len(doc)], block, limit).allowed()) == expected


def test_half_prompt_data_keeps_about_half_of_the_noisy_stream() -> None:
    total = kept = 0
    for d in range(300):
        flags = np.arange(256) >= 128
        mask = draw_mask(flags, MaskRule(32), document_generator(0, 0, d))
        total, kept = total + 256, kept + len(noisy_stream(mask.masked, 32).pos)
    assert 1 + kept / total == pytest.approx(1.46, abs=0.01)


# Oracles, in float64 through a real network


def exact_model(**overrides):
    model = tiny.tiny_model("llama", **overrides)
    for module in model.modules():  # transformers' RMSNorm goes through float32
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, m=module: (
                m.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.variance_epsilon)
            )
    rotary = model.model.rotary_emb
    rotary.forward = lambda x, position_ids: _rotary(rotary.inv_freq.double(), position_ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    return model.double().eval()


def _rotary(inv_freq, position_ids):
    angles = position_ids[..., None].double() * inv_freq
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def mask_id(model) -> int:
    return model.config.vocab_size - 1


def dual_logits(model, texts: list[np.ndarray], documents: list[np.ndarray], elide: bool):
    layout, slot, _ = dual(documents, elide)
    ids = []
    for text, masked in zip(texts, documents, strict=True):
        stream = noisy_stream(masked, B, elide=elide)
        ids += [text, np.where(stream.slot, mask_id(model), text[stream.pos])]
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(np.concatenate(ids))[None], position_ids=layout.pos[None],
            attention_mask=layout.allowed()[None, None], use_cache=False,
        ).logits[0]  # fmt: skip
    return logits, layout, slot


def slot_logits(model, text: np.ndarray, block: np.ndarray, slots: np.ndarray) -> torch.Tensor:
    """[m, V] from one causal pass over [prefix; observed; masks], each at its own position, as decoding runs it.

    ``block`` are the positions of the block, ``slots`` those of its m hidden tokens.
    """
    order = np.concatenate([np.arange(block[0]), block[~np.isin(block, slots)], slots])
    ids = np.where(np.isin(order, slots), mask_id(model), text[order])
    causal = torch.ones(len(order), len(order), dtype=torch.bool).tril()
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(ids)[None], position_ids=torch.from_numpy(order)[None],
            attention_mask=causal[None, None], use_cache=False,
        ).logits[0]  # fmt: skip
    return logits[-len(slots) :]


@pytest.mark.parametrize("elide", [True, False])
def test_clean_logits_are_autoregressive_and_slot_logits_one_causal_pass(elide: bool) -> None:
    model, documents = exact_model(), masks([B - 1, 3 * B + 5, B])
    texts = [np.random.default_rng(n).integers(0, 255, len(masked)) for n, masked in enumerate(documents)]
    logits, layout, slot = dual_logits(model, texts, documents, elide)
    for number, (text, masked) in enumerate(zip(texts, documents, strict=True)):
        own = (layout.doc == number).numpy()
        clean = own & (layout.block < 0).numpy()
        with torch.no_grad():
            plain = model(input_ids=torch.from_numpy(text)[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[clean], plain, rtol=0, atol=1e-12)
        for block in range(0, len(text), B):
            positions = np.arange(block, min(block + B, len(text)))
            slots = positions[masked[positions]]
            if not len(slots):
                continue
            one_pass = slot_logits(model, text, positions, slots)
            here = own & slot & np.isin(layout.pos.numpy(), slots)
            torch.testing.assert_close(logits[here], one_pass, rtol=0, atol=1e-12)


@pytest.mark.parametrize("elide", [True, False])
@pytest.mark.parametrize("prompt", [0, 3, B])
def test_the_mean_over_masks_is_the_any_order_bound_of_a_network(prompt: int, elide: bool) -> None:
    """A block of 4 supervised tokens: the loss over all 15 masks, as trained, against all 24 orders of decoding.

    What a network says of hidden token i is a function nll(i, S) of i and the *set* S of hidden tokens: what is observed, and the
    slots, stand in the order of their positions, however the observed came to be. An order o of decoding pays
    sum_k nll(o_k, S_k), S_k being what is hidden before step k. Over all orders each S of m tokens is met at step n - m with
    probability 1 / C(n, m), and o_k is any of its tokens with probability 1 / m: the mean over orders is
    sum_m E_S[1 / m * sum_(i in S) nll(i, S)] = n * E_m E_S[...], the mean over masks with weights n / m. Nothing is left out.
    """
    n, model = 4, exact_model(vocab_size=9, pad_token_id=0, eos_token_id=1)
    text = np.random.default_rng(prompt).integers(0, mask_id(model), prompt + n)
    flags, block = np.arange(prompt + n) >= prompt, np.arange(prompt // B * B, prompt + n)
    learned = np.nonzero(flags)[0].tolist()

    trained = 0.0  # weights as drawn, slots in the dual stream
    masks_drawn = every_mask(flags, MaskRule(B))
    assert len(masks_drawn) == 15
    for slots, (share, weight) in masks_drawn.items():
        logits, layout, slot = dual_logits(model, [text], [np.isin(np.arange(len(text)), slots)], elide)
        pos = layout.pos.numpy()[slot]
        nll = -torch.log_softmax(logits[slot], -1)[torch.arange(len(pos)), text[pos]].numpy()
        trained += share * (weight[pos] * nll).sum()

    paid = []  # by each order, slots in one causal pass
    for order in itertools.permutations(learned):
        total = 0.0
        for step, token in enumerate(order):
            hidden = np.array(sorted(order[step:]))
            logits = slot_logits(model, text, block, hidden)[hidden.tolist().index(token)]
            total -= torch.log_softmax(logits, -1)[text[token]].item()
        paid.append(total)
    assert len(paid) == 24 and np.ptp(paid) > 1e-3 * np.mean(
        paid
    )  # orders differ: the mean is not that of equal things
    assert trained == pytest.approx(np.mean(paid), rel=1e-12)
