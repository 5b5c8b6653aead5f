"""One WeDLM training step: ours against plain SDPA and against the reference's arithmetic, on the same masks.

    OMP_NUM_THREADS=2 python benchmarks/wedlm_step.py [--rounds 7] [--record]

A Qwen3-like model (4 layers, 256 wide, vocabulary 32,000) takes 2,048 clean tokens in 15 documents, a third of them prompt, in
blocks of 32. Four ways to do the same step (forward, backward, AdamW):

    ours        elided noisy streams, segments, cross entropy of the scored rows in chunks
    unelided    the same with whole noisy streams
    sdpa        both streams whole, one boolean mask [1, 1, T, T] through SDPA, all logits, plain cross entropy
    reference   both streams whole, a float mask added and the softmax written out in every layer, all logits (arXiv 2512.22737)

Steps alternate in one process, so that a slow moment of the machine hits all; the figures are medians. The masks of the two
baselines are made outside of the clock. Peak memory is the resident set of a process of its own per way, imports and all.
Every way must give the same losses, step by step, and the same gradients on a small model. What elision gains alone is measured
on half-prompt data, and what collating costs as a share of our step.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from records import write_record
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

from hf_sft.attention.backends import BACKENDS
from hf_sft.attention.layout import Layout
from hf_sft.collators import Batch, WeDLMCollator
from hf_sft.models.head import HeadScorer
from hf_sft.noise import MaskRule

VOCABULARY, CLEAN_TOKENS, DOCUMENTS, BLOCK = 32_000, 2048, 15, 32
COEFFICIENTS = torch.tensor([0.5, 0.5], dtype=torch.float64)  # next token, mask slot: ar_loss_weight 1
# (faster by at least, at most this share of its peak memory), for ours against each baseline.
DEMANDED = {"sdpa": (2.5, 0.5), "reference": (5.0, 0.4)}
ELISION_GAIN, COLLATING_SHARE = 1.15, 0.05


def documents(tokens: int, count: int, prompt_share: float, vocabulary: int, seed: int) -> list[dict]:
    """``count`` documents of uneven lengths with ``tokens`` tokens together; the last id of the vocabulary is the mask token."""
    rng = np.random.default_rng(seed)
    shares = rng.uniform(0.4, 1.6, count)
    ends = np.rint(np.cumsum(shares) / shares.sum() * tokens).astype(int)
    rows = []
    for length in np.diff(ends, prepend=0):
        ids = rng.integers(0, vocabulary - 1, length)
        rows.append({"input_ids": ids, "labels": np.where(np.arange(length) < round(prompt_share * length), -100, ids)})
    return rows


def make_model(vocabulary: int = VOCABULARY, width: int = 256, layers: int = 4) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=4, head_dim=width // 8, max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


def row_weights(batch: Batch) -> Tensor:
    """[R] weight_i * c_kind / N_kind, as ``SFTTrainer.compute_loss`` forms it."""
    share = torch.where(batch["num_items"] > 0, COEFFICIENTS / batch["num_items"].clamp_min(1e-9), 0.0)
    return batch["target_weight"] * share.float()[batch["target_kind"]]


# ---- four ways ----


class Ours:
    """What SFTTrainer does in a step."""

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


WAYS: dict[str, Callable[[Qwen3ForCausalLM], Ours | Plain]] = {
    "ours": lambda model: Ours(model, elide=True),
    "unelided": lambda model: Ours(model, elide=False),
    "sdpa": lambda model: Plain(model, "sdpa"),
    "reference": lambda model: Plain(model, "written_out"),
}


class Stepper:
    """One way with a model and an optimizer of its own."""

    def __init__(self, name: str) -> None:
        self.way = WAYS[name](make_model().train())
        self.optimizer = torch.optim.AdamW(self.way.model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        self.seconds: list[float] = []
        self.collating: list[float] = []
        self.losses: list[float] = []

    def step(self, rows: list[dict], number: int) -> None:
        """One step on the masks that belong to step ``number``."""
        collator = WeDLMCollator(VOCABULARY - 1, MaskRule(BLOCK), seed=number, elide=self.way.elide)
        start = time.perf_counter()
        batch = collator([rows])
        self.collating.append(time.perf_counter() - start)
        batch = self.way.prepare(batch)
        start = time.perf_counter()
        loss = self.way.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


# ---- measurements ----


def alternate(names: list[str], rounds: int, prompt_share: float) -> dict[str, Stepper]:
    """``rounds`` steps of each way in turn, after one to warm up; all must have the same losses to 1e-5."""
    steppers = {name: Stepper(name) for name in names}
    for number in range(rounds + 1):
        rows = documents(CLEAN_TOKENS, DOCUMENTS, prompt_share, VOCABULARY, seed=number)
        for stepper in steppers.values():
            stepper.step(rows, number)
    ours = np.array(steppers["ours"].losses)
    for name, stepper in steppers.items():
        differs = np.abs(np.array(stepper.losses) / ours - 1).max()
        assert differs <= 1e-5, f"the losses of {name} differ from ours by {differs:.1e}"
        stepper.seconds, stepper.collating = stepper.seconds[1:], stepper.collating[1:]
    return steppers


def largest_gradient_difference() -> float:
    """All ways on a small model in float64: the largest difference to ours, as a share of each gradient's norm."""
    rows, gradients = documents(300, 4, 1 / 3, 512, seed=0), {}
    for name, make in WAYS.items():
        way = make(make_model(512, width=64, layers=2).double())
        collator = WeDLMCollator(511, MaskRule(8), seed=0, elide=way.elide)
        way.loss(way.prepare(collator([rows]))).backward()
        gradients[name] = [parameter.grad for parameter in way.model.parameters()]
    worst = max(
        ((got - want).norm() / want.norm()).item()
        for name in WAYS
        for got, want in zip(gradients[name], gradients["ours"], strict=True)
    )
    assert worst <= 1e-6, f"gradients differ by {worst:.1e}"  # row weights are float32
    return worst


def own_peak(name: str, steps: int = 3) -> dict[str, float]:
    """Peak resident memory of this process in MB, before and after ``steps`` steps of one way."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    stepper = Stepper(name)
    for number in range(steps):
        stepper.step(documents(CLEAN_TOKENS, DOCUMENTS, 1 / 3, VOCABULARY, seed=number), number)
    return {"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def peak_memory(name: str) -> dict[str, float]:
    """``own_peak`` in a fresh process."""
    command = [sys.executable, __file__, "--peak", name]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure(rounds: int) -> dict[str, Any]:
    gradient_difference = largest_gradient_difference()
    memory = {name: peak_memory(name) for name in ("ours", "sdpa", "reference")}
    steppers = alternate(["ours", "sdpa", "reference"], rounds, 1 / 3)
    halves = alternate(["ours", "unelided"], 2 * rounds, 1 / 2)
    seconds = {name: statistics.median(stepper.seconds) for name, stepper in steppers.items()}
    half_seconds = {name: statistics.median(stepper.seconds) for name, stepper in halves.items()}
    collating = statistics.median(steppers["ours"].collating)
    return {
        "rounds": rounds, "vocab_size": VOCABULARY, "clean_tokens": CLEAN_TOKENS, "documents": DOCUMENTS,
        "block_size": BLOCK, "seconds": seconds, "peak_mb": memory,
        "faster_than": {name: seconds[name] / seconds["ours"] for name in DEMANDED},
        "share_of_peak": {name: memory["ours"]["peak"] / memory[name]["peak"] for name in DEMANDED},
        "half_prompt_seconds": half_seconds, "elision_gain": half_seconds["unelided"] / half_seconds["ours"],
        "collating_seconds": collating, "collating_share": collating / (collating + seconds["ours"]),
        "largest_gradient_difference": gradient_difference,
    }  # fmt: skip


def report(results: dict[str, Any]) -> bool:
    """Print the table; False if a demand is not met."""
    print(f"{'':>10} {'s / step':>9} {'ours is faster':>15} {'peak MB':>8} {'ours needs':>11}")
    for name, seconds in results["seconds"].items():
        line = f"{name:>10} {seconds:>9.3f} {'':>15} {results['peak_mb'][name]['peak']:>8.0f}"
        if name in DEMANDED:
            faster, share = results["faster_than"][name], results["share_of_peak"][name]
            line = (
                f"{name:>10} {seconds:>9.3f} {faster:>14.2f}x {results['peak_mb'][name]['peak']:>8.0f} {share:>10.0%}"
            )
        print(line)
    print(f"elision gains {results['elision_gain']:.2f}x on half-prompt data")
    print(f"collating takes {results['collating_seconds'] * 1e3:.1f} ms, {results['collating_share']:.1%} of our step")
    print(f"losses agree to 1e-5, gradients to {results['largest_gradient_difference']:.0e}")
    met = [results["elision_gain"] >= ELISION_GAIN, results["collating_share"] < COLLATING_SHARE]
    for name, (faster, share) in DEMANDED.items():
        met += [results["faster_than"][name] >= faster, results["share_of_peak"][name] <= share]
    return all(met)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--record", action="store_true", help="write benchmarks/records/wedlm_step.json")
    parser.add_argument("--peak", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(own_peak(options.peak)))
        return
    results = measure(options.rounds)
    met = report(results)
    if options.record:
        print(f"record: {write_record('wedlm_step', results)}")
    if not met:
        sys.exit("a demand is not met")


if __name__ == "__main__":
    main()
