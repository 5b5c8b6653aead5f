"""A training step of SFTTrainer beside TRL's, transformers' Trainer, a plain loop, and the machine's matrix products.

    python benchmarks/causal_step.py [--vocab_size 6400 151680] [--steps 20] [--output results.json]

A Qwen3-like model (4 layers, 256 wide) takes packs of 2,048 tokens in documents as long as gsm8k's. All get the same packs in the
same order and have the same losses; a step goes from the end of one to the end of the next, with fetching, collating, clipping,
AdamW and logging. Each way is a process of its own, and their steps alternate; figures are medians. Peak memory is the resident
set, imports and all. SFTTrainer and the limit take the products of ``hf_sft/products.py``, oneDNN's where they are faster; the
others take what torch takes by itself, as their users would: part of the ratio comes from there.

    SFTTrainer   ours, as it comes
    TRL          its SFTTrainer with its packing, which keeps documents apart; activation checkpointing off, float32. It takes
                 its head in chunks as well; on a CPU of all rows, also those that nobody scores (TRL 1.16)
    HF Trainer   transformers' Trainer with its flattening collator
    plain loop   segments, the head on the scored rows, F.cross_entropy, fused AdamW; batches made beforehand
    limit        the same with ours' products
    products     the products with weights of such a step alone, by either library: the floor of this machine
"""

from __future__ import annotations

from typing import Any

import trainers
from floor import products_seconds
from records import conclude, parser, table
from turns import WARM_UP, alternate, beside, figures, largest_difference
from workloads import gsm8k_packs, make_model, scored, tokens

from hf_sft.products import fast_products, onednn_is_faster

WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SFTTrainer": (trainers.ours, {}), "TRL": (trainers.trl, {}), "HF Trainer": (trainers.hf, {}),
    "plain loop": (trainers.plain, {}), "limit": (trainers.plain, {"fast": True}),
}  # fmt: skip
# Vocabulary -> at least so many times TRL's tokens per second, at most this share of its peak memory.
DEMANDED = {6400: (2.5, 1.0), 151_680: (4.5, 0.55)}
NEAR_LIMIT = 1.1  # times the limit's step


def run(vocabulary: int, steps: int, length: int = 2048) -> dict[str, Any]:
    """The figures of one vocabulary; raises AssertionError where two ways learn different things."""
    packs = gsm8k_packs(steps + WARM_UP, vocabulary, length)
    data = {"packs": packs, "vocabulary": vocabulary}
    found = alternate({name: (way, {**data, **how}) for name, (way, how) in WAYS.items()}, steps)
    differs = largest_difference(found, "SFTTrainer")
    assert differs < 1e-4, f"the losses differ by {differs:.0e}"
    per_pack = sum(map(tokens, packs)) / len(packs)
    rows = round(sum(map(scored, packs)) / len(packs))
    return {
        "vocab_size": vocabulary, "steps": steps, "tokens_per_step": per_pack, "scored_rows_per_step": rows,
        **figures(found, "SFTTrainer"),
        "products_seconds": products(make_model(vocabulary), round(per_pack), rows),
        "tokens_per_second": {name: per_pack / course.median for name, course in found.items()},
        "largest_relative_loss_difference": differs,
    }  # fmt: skip


def products(model: Any, tokens: int, rows: int) -> dict[str, float]:
    """Seconds of the step's products by each library that is there."""
    found = {"BLAS": products_seconds(model, tokens, rows)}
    if onednn_is_faster():
        with fast_products():
            found["oneDNN"] = products_seconds(model, tokens, rows)
    return found


def missed(results: list[dict[str, Any]]) -> list[str]:
    """What was demanded and is not met."""
    found = []
    for r in results:
        faster, share = DEMANDED.get(r["vocab_size"], (0.0, 1.0))
        if r["faster_than"]["TRL"] < faster or r["share_of_peak"]["TRL"] > share:
            found.append(f"TRL at {r['vocab_size']:,}")
        if r["seconds"]["SFTTrainer"] > NEAR_LIMIT * r["seconds"]["limit"]:
            found.append(f"the limit at {r['vocab_size']:,}")
    return found


def markdown(record: dict[str, Any]) -> str:
    """The table of a record."""
    body = []
    for r in record["runs"]:
        for name, seconds in r["seconds"].items():
            cells = [f"{seconds:.3f}", f"{r['tokens_per_second'][name]:,.0f}", f"{r['peak_mb'][name]:,.0f}"]
            body.append([f"{r['vocab_size']:,}", name, *cells, *beside(r, name)])
        for name, seconds in r["products_seconds"].items():
            body.append([f"{r['vocab_size']:,}", f"products alone, {name}", f"{seconds:.3f}", "", "", "", ""])
    return table(["vocabulary", "", "s / step", "tokens / s", "peak MB", "ours is faster", "ours needs"], body)


def main() -> None:
    words = parser(__doc__, "causal_step", steps=20)
    words.add_argument("--vocab_size", type=int, nargs="+", default=list(DEMANDED))
    words.add_argument("--length", type=int, default=2048)
    options = words.parse_args()
    results = [run(vocabulary, options.steps, options.length) for vocabulary in options.vocab_size]
    record = {"note": options.note, "missed": missed(results), "runs": results}
    print(markdown(record))
    conclude("causal_step", record, options.output)


if __name__ == "__main__":
    main()
