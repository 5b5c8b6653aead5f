"""Evaluation on packs: ``SFTTrainer.evaluate`` beside TRL's, transformers' Trainer's, and the forward of the plain loop.

    python benchmarks/evaluation.py [--vocab_size 6400 32000] [--packs 8] [--rounds 7] [--output results.json]

Model and packs are those of ``causal_step.py``. A round is one evaluation of all packs, with fetching, collating and the metrics
that each trainer reports (ours: loss, perplexity and token accuracy, from sums over all tokens); the loop makes its batches
beforehand and reports the loss alone. Each way is a process of its own, rounds alternate, figures are medians. SFTTrainer and the
plain forward take the products of ``hf_sft/products.py``, TRL and HF Trainer what torch takes by itself.

Demanded: at least as fast per token as the plain forward.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import trainers
from records import conclude, parser, table
from turns import Turn, alternate, figures
from workloads import Row, gsm8k_packs, tokens

from hf_sft.products import fast_products

NAMES = {"SFTTrainer": "our_trainer", "TRL": "trl_trainer", "HF Trainer": "hf_trainer"}


def evaluations(turn: Turn, steps: int, way: str, packs: list[list[Row]], vocabulary: int) -> list[float]:
    """``steps`` evaluations by one of the trainers; their losses."""
    trainers.quiet()
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = getattr(trainers, NAMES[way])(packs, vocabulary, trainers.settings(folder, 1))
        for _ in range(steps):
            turn.begin()
            losses.append(trainer.evaluate()["eval_loss"])
            turn.end()
    return losses


@torch.no_grad()
def forwards(turn: Turn, steps: int, packs: list[list[Row]], vocabulary: int) -> list[float]:
    """``steps`` times the forward of the plain loop over all packs, with the products that ours takes."""
    trainers.quiet()
    loop, losses = trainers.PlainLoop(packs, vocabulary), []
    loop.model.eval()
    count = sum(len(batch["target_ids"]) for batch in loop.batches)
    with fast_products():
        for _ in range(steps):
            turn.begin()
            losses.append(float(sum(loop.loss(batch, count) for batch in loop.batches)))
            turn.end()
    return losses


def run(vocabulary: int, count: int, rounds: int, length: int = 2048) -> dict[str, Any]:
    packs = gsm8k_packs(count, vocabulary, length)
    data = {"packs": packs, "vocabulary": vocabulary}
    ways: dict[str, Any] = {name: (evaluations, {"way": name, **data}) for name in NAMES}
    found = alternate({**ways, "plain forward": (forwards, data)}, rounds)
    total = sum(map(tokens, packs))
    differs = abs(found["SFTTrainer"].losses[0] / found["plain forward"].losses[0] - 1)
    assert differs < 1e-5, f"the losses differ by {differs:.0e}"
    return {
        "vocab_size": vocabulary, "packs": count, "tokens": total, "rounds": rounds,
        **figures(found, "SFTTrainer"),
        "tokens_per_second": {name: total / course.median for name, course in found.items()},
        "losses": {name: course.losses[0] for name, course in found.items()},
    }  # fmt: skip


def missed(results: list[dict[str, Any]]) -> list[str]:
    """What was demanded and is not met."""
    return [f"the plain forward at {r['vocab_size']:,}" for r in results if r["faster_than"]["plain forward"] < 1]


def markdown(record: dict[str, Any]) -> str:
    """The table of a record."""
    body = [
        [
            f"{r['vocab_size']:,}",
            name,
            f"{rate:,.0f}",
            f"{r['peak_mb'][name]:,.0f}",
            f"{r['faster_than'].get(name, 1):.2f} times",
        ]
        for r in record["runs"]
        for name, rate in r["tokens_per_second"].items()
    ]
    return table(["vocabulary", "", "tokens / s", "peak MB", "ours is faster"], body)


def main() -> None:
    words = parser(__doc__, "evaluation")
    words.add_argument("--vocab_size", type=int, nargs="+", default=[6400, 32_000])
    words.add_argument("--packs", type=int, default=8)
    words.add_argument("--rounds", type=int, default=7)
    options = words.parse_args()
    results = [run(size, options.packs, options.rounds) for size in options.vocab_size]
    record = {"note": options.note, "missed": missed(results), "runs": results}
    print(markdown(record))
    conclude("evaluation", record, options.output)


if __name__ == "__main__":
    main()
