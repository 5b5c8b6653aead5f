"""One WeDLM training step: SFTTrainer against plain SDPA and against the reference's arithmetic, on the same masks.

    python benchmarks/wedlm_step.py [--steps 9] [--output results.json]

A Qwen3-like model (4 layers, 256 wide, vocabulary 32,000) takes 2,048 clean tokens in 15 documents, a third of them prompt, in
blocks of 32. The same step (forward, backward, clipping, AdamW) in several ways:

    SFTTrainer  ours, as it comes: fetching, collating and logging count
    limit       a plain loop of its parts: elided noisy streams, segments, cross entropy of the scored rows in chunks
    unelided    the same with whole noisy streams
    sdpa        both streams whole, one boolean mask [1, 1, T, T] through SDPA, all logits, plain cross entropy
    reference   both streams whole, a float mask added and the softmax written out in every layer, all logits (arXiv 2512.22737)

SFTTrainer, limit and unelided take the products of ``hf_sft/products.py``, oneDNN's where they are faster. sdpa and reference are
what others would run, with the products that torch takes by itself: part of the ratio comes from there. How much says the row
"sdpa, same products", which takes ours'.

Each way is a process of its own and their steps alternate; figures are medians. The loops make batches and masks outside of the
clock. Peak memory is the resident set, imports and all. Every way must give the same losses, step by step, and the loops the same
gradients on a small model. What elision gains alone is measured on half-prompt data in three pairs of processes, as the median of
all quotients of a step with whole streams and the same step without; what collating costs, as a share of SFTTrainer's step. What
is demanded is demanded of SFTTrainer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import trainers
from records import conclude, parser, table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, Qwen3ForCausalLM
from turns import WARM_UP, Course, Turn, alternate, beside, figures, largest_difference
from workloads import Row, make_model, row

from hf_sft.attention.backends import BACKENDS
from hf_sft.attention.layout import Layout
from hf_sft.collators import Batch, WeDLMCollator
from hf_sft.models.head import HeadScorer
from hf_sft.noise import MaskRule
from hf_sft.products import fast_products

VOCABULARY, CLEAN_TOKENS, DOCUMENTS, BLOCK = 32_000, 2048, 15, 32
SEED = 42  # of Trainer's settings, by default
COEFFICIENTS = torch.tensor([0.5, 0.5], dtype=torch.float64)  # next token, mask slot: ar_loss_weight 1
# (faster by at least, at most this share of its peak memory), for SFTTrainer against each baseline.
DEMANDED = {"sdpa": (2.5, 0.5), "reference": (5.0, 0.4)}
ELISION_GAIN, COLLATING_SHARE = 1.15, 0.05
PAIRS = 3  # of processes: where memory comes to lie differs from one to the next


def documents(tokens: int, count: int, prompt_share: float, vocabulary: int, seed: int) -> list[Row]:
    """``count`` documents of uneven lengths with ``tokens`` tokens together; the last id of the vocabulary is the mask token."""
    rng = np.random.default_rng(seed)
    shares = rng.uniform(0.4, 1.6, count)
    ends = np.rint(np.cumsum(shares) / shares.sum() * tokens).astype(int)
    return [row(int(length), vocabulary - 1, rng, 1 - prompt_share) for length in np.diff(ends, prepend=0)]


def row_weights(batch: Batch) -> Tensor:
    """[R] weight_i * c_kind / N_kind, as ``SFTTrainer.compute_loss`` forms it."""
    share = torch.where(batch["num_items"] > 0, COEFFICIENTS / batch["num_items"].clamp_min(1e-9), 0.0)
    return batch["target_weight"] * share.float()[batch["target_kind"]]


# ---- the loops ----


class Ours:
    """What SFTTrainer does with a batch."""

    def __init__(self, model: Qwen3ForCausalLM, elide: bool) -> None:
        self.model, self.elide, self.backend = model, elide, BACKENDS["segment"]
        self.backend.install(model)
        self.scorer = HeadScorer(model)

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def loss(self, batch: Batch) -> Tensor:
        inputs = self.backend.inputs(self.model, Layout.from_batch(batch))
        with self.scorer.scoring(batch["logits_to_keep"], batch["target_ids"], row_weights(batch)) as request:
            outputs = self.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **inputs)
        return self.scorer.scores(request, outputs.logits).loss


class Plain:
    """Whole streams, a mask, all logits."""

    elide = False

    def __init__(self, model: Qwen3ForCausalLM, attention: str) -> None:
        AttentionInterface.register("written_out", written_out_attention)
        self.model, self.additive = model, attention == "written_out"
        model.set_attn_implementation(attention)

    def prepare(self, batch: Batch) -> Batch:
        mask = pair_mask(batch)[None, None]
        if self.additive:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
        return {**batch, "attention_mask": mask.to(self.model.dtype) if self.additive else mask}

    def loss(self, batch: Batch) -> Tensor:
        logits = self.model(
            batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
        ).logits[0]
        target = torch.full(logits.shape[:1], -100)
        target[batch["logits_to_keep"]] = batch["target_ids"]
        weight = torch.zeros(len(target))
        weight[batch["logits_to_keep"]] = row_weights(batch)
        return (weight * cross_entropy(logits, target, ignore_index=-100, reduction="none")).sum()


def pair_mask(batch: Batch) -> Tensor:
    """[T, T] bool, who sees whom, as one would write it for plain SDPA."""
    doc, pos, block = batch["doc_ids"][0], batch["position_ids"][0], batch["block_ids"][0]
    row = torch.arange(len(doc))
    before = pos[None, :] < batch["limits"][0][:, None]
    in_block = (block[:, None] == block[None, :]) & (row[None, :] <= row[:, None])
    return (doc[:, None] == doc[None, :]) & torch.where(block[None, :] < 0, before, in_block)


def written_out_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **kwargs: Any
):
    """Scores plus mask, softmax in float32, sums: [1, T, H, E] and None."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling + mask
    accumulated = torch.promote_types(query.dtype, torch.float32)
    probabilities = torch.softmax(scores, dim=-1, dtype=accumulated).to(query.dtype)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), None


LOOPS: dict[str, Callable[[Qwen3ForCausalLM], Ours | Plain]] = {
    "limit": lambda model: Ours(model, elide=True),
    "unelided": lambda model: Ours(model, elide=False),
    "sdpa": lambda model: Plain(model, "sdpa"),
    "reference": lambda model: Plain(model, "written_out"),
    "sdpa, same products": lambda model: Plain(model, "sdpa"),
}
FAST = ("limit", "unelided", "sdpa, same products")  # loops with the products of ours


# ---- measurements ----


def steps_of(turn: Turn, steps: int, name: str, packs: list[list[Row]]) -> list[float]:
    """``steps`` steps of one loop, with a model and an optimizer of its own: those of ``trainers.settings``."""
    way = LOOPS[name](trainers.make_model(VOCABULARY).train())
    parameters = list(way.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=trainers.LEARNING_RATE, weight_decay=0.0, fused=True)
    losses = []
    with fast_products() if name in FAST else nullcontext():
        for number in range(steps):
            batch = way.prepare(collated(packs, number, way.elide))
            turn.begin()
            loss = way.loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            turn.end()
    return losses


def collated(packs: list[list[Row]], number: int, elide: bool = True) -> Batch:
    """The batch that SFTTrainer makes of pack ``number``: its noise belongs to the places of documents in the data."""
    first = sum(map(len, packs[:number]))
    rows = [{**each, "document": first + place, "epoch": 0} for place, each in enumerate(packs[number])]
    return WeDLMCollator(VOCABULARY - 1, MaskRule(BLOCK), seed=SEED, elide=elide)([rows])


def packs_of(count: int, prompt_share: float) -> list[list[Row]]:
    return [documents(CLEAN_TOKENS, DOCUMENTS, prompt_share, VOCABULARY, seed) for seed in range(count)]


def compared(names: list[str], steps: int, prompt_share: float) -> dict[str, Course]:
    """``steps`` steps of each way in turn; all must have the same losses."""
    packs = packs_of(steps + WARM_UP, prompt_share)
    ways: dict[str, Any] = {name: (steps_of, {"name": name, "packs": packs}) for name in names}
    if "SFTTrainer" in ways:
        how = {"packs": packs, "vocabulary": VOCABULARY - 1, "block_size": BLOCK}
        ways["SFTTrainer"] = (trainers.wedlm, how)
    found = alternate(ways, steps)
    differs = largest_difference(found, names[0])
    assert differs <= 1e-4, f"the losses differ by {differs:.1e}"
    return found


def largest_gradient_difference() -> float:
    """All loops on a small model in float64: the largest difference to the limit, as a share of each gradient's norm."""
    rows, gradients = documents(300, 4, 1 / 3, 512, seed=0), {}
    for name, make in LOOPS.items():
        way = make(make_model(512, width=64, layers=2).double())
        collator = WeDLMCollator(511, MaskRule(8), seed=0, elide=way.elide)
        way.loss(way.prepare(collator([rows]))).backward()
        gradients[name] = [parameter.grad for parameter in way.model.parameters()]
    worst = max(
        ((got - want).norm() / want.norm()).item()
        for name in LOOPS
        for got, want in zip(gradients[name], gradients["limit"], strict=True)
    )
    assert worst <= 1e-6, f"gradients differ by {worst:.1e}"  # row weights are float32
    return worst


def collating_seconds(packs: list[list[Row]]) -> float:
    seconds = []
    for number in range(len(packs)):
        start = time.perf_counter()
        collated(packs, number)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(steps: int) -> dict[str, Any]:
    gradient_difference = largest_gradient_difference()
    found = compared(["SFTTrainer", "limit", "sdpa", "sdpa, same products", "reference"], steps, 1 / 3)
    halves = [compared(["limit", "unelided"], steps, 1 / 2) for _ in range(PAIRS)]
    collating = collating_seconds(packs_of(steps, 1 / 3))
    return {
        "steps": steps, "vocab_size": VOCABULARY, "clean_tokens": CLEAN_TOKENS, "documents": DOCUMENTS, "block_size": BLOCK,
        **figures(found, "SFTTrainer"),
        "half_prompt_seconds": [{name: course.median for name, course in pair.items()} for pair in halves],
        "elision_gain": statistics.median(
            whole / elided
            for pair in halves
            for whole, elided in zip(pair["unelided"].seconds, pair["limit"].seconds, strict=True)
        ),
        "collating_seconds": collating, "collating_share": collating / found["SFTTrainer"].median,
        "largest_relative_loss_difference": largest_difference(found, "SFTTrainer"),
        "largest_gradient_difference": gradient_difference,
    }  # fmt: skip


def missed(results: dict[str, Any]) -> list[str]:
    """What was demanded and is not met."""
    found = []
    for name, (faster, share) in DEMANDED.items():
        if results["faster_than"][name] < faster or results["share_of_peak"][name] > share:
            found.append(name)
    if results["elision_gain"] < ELISION_GAIN:
        found.append("the gain of elision")
    if results["collating_share"] >= COLLATING_SHARE:
        found.append("the share of collating")
    return found


def markdown(results: dict[str, Any]) -> str:
    """The table of a record."""
    body = []
    for name, seconds in results["seconds"].items():
        rate = results["clean_tokens"] / seconds
        body.append(
            [name, f"{seconds:.3f}", f"{rate:,.0f}", f"{results['peak_mb'][name]:,.0f}", *beside(results, name)]
        )
    for name, gain in (("limit", ""), ("unelided", f"{results['elision_gain']:.2f} times")):
        seconds = statistics.median(pair[name] for pair in results["half_prompt_seconds"])
        rate = results["clean_tokens"] / seconds
        body.append([f"{name}, half of it prompt", f"{seconds:.3f}", f"{rate:,.0f}", "", gain, ""])
    return table(["", "s / step", "clean tokens / s", "peak MB", "ours is faster", "ours needs"], body)


def main() -> None:
    options = parser(__doc__, "wedlm_step", steps=9).parse_args()
    results = {"note": options.note, **measure(options.steps)}
    results["missed"] = missed(results)
    print(markdown(results))
    print(f"elision gains {results['elision_gain']:.2f} times on half-prompt data")
    print(f"collating takes {results['collating_seconds'] * 1e3:.1f} ms, {results['collating_share']:.1%} of our step")
    differences = (results[f"largest_{what}_difference"] for what in ("relative_loss", "gradient"))
    print("losses differ by {:.0e}, gradients by {:.0e}".format(*differences))
    conclude("wedlm_step", results, options.output)


if __name__ == "__main__":
    main()
