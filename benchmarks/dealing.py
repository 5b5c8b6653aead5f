"""How even the work of ranks is: gsm8k train in bins, cut in their order and dealt by their tokens.

    python benchmarks/dealing.py [--data ../shared/data] [--batch 4] [--output results.json]

Two measures, of every micro-batch of an epoch, averaged:

- tokens: those of the fullest rank over those of the mean rank; 1 is even.
- time of padded batches: rows x longest row, the slots that a rank computes. Ranks wait for the slowest of them, after each
  micro-batch (ZeRO-3, FSDP2, which exchange weights) or after each optimizer step (DDP); dealt over cut, summed over the epoch.

"file" is the order of the file (packed: in which bins were begun), "shuffled" that of training, seed 42. Tokens are counted in
full steps; "all" counts the last one as well, which empty bins fill up: cut in order, whole ranks have nothing to do in it, which
weighs much where an epoch has few steps. Times are of all steps. No figure depends on the machine.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from prepare import LENGTH, prepared
from records import write_record

from hf_sft.data.bins import EMPTY, Bins, BinSampler

ORDERS = {"file": None, "shuffled": 42}


def cut(bins: Bins, balanced: bool, seed: int | None, batch: int, world: int, accumulation: int) -> np.ndarray:
    """[steps, accumulation, world, batch] int64: tokens of the bins that each rank gets; 0 for what fills up the last step."""
    ranks = [
        BinSampler(
            len(bins), batch, accumulation=accumulation, world=world, rank=rank, seed=seed, lengths=bins.fills,
            balanced=balanced,
        )
        for rank in range(world)
    ]  # fmt: skip
    numbers = np.array([[[number for _, number in each] for each in rank] for rank in ranks])
    tokens = np.where(numbers == EMPTY, 0, bins.fills[numbers])
    return tokens.reshape(world, -1, accumulation, batch).transpose(1, 2, 0, 3)


def fullest(tokens: np.ndarray) -> float:
    """Mean over micro-batches of the fullest rank's tokens over the mean rank's, where there are any."""
    ranks = tokens.sum(-1).reshape(-1, tokens.shape[2])
    ranks = ranks[ranks.sum(-1) > 0]
    return float((ranks.max(-1) / ranks.mean(-1)).mean())


def padded_time(tokens: np.ndarray) -> dict[str, int]:
    """Slots of the slowest rank, summed over the epoch."""
    slots = (tokens > 0).sum(-1) * tokens.max(-1)
    return {"micro-batch": int(slots.max(-1).sum()), "step": int(slots.sum(1).max(-1).sum())}


def measure(bins: Bins, order: str, **shape: int) -> dict[str, Any]:
    before, after = (cut(bins, balanced, ORDERS[order], **shape) for balanced in (False, True))
    assert np.array_equal(np.sort(before[before > 0]), np.sort(after[after > 0]))  # the same bins, each once
    full = len(bins) // (before.size // len(before))
    found: dict[str, Any] = {"order": order, **shape, "steps": len(before)}
    found |= {"cut": fullest(before[:full]), "dealt": fullest(after[:full])}
    found |= {"cut, all": fullest(before), "dealt, all": fullest(after)}
    if bins.capacity is not None:
        return {"bins": "packed", **found}
    times = [padded_time(tokens) for tokens in (before, after)]
    return {
        "bins": "padded",
        **found,
        **{f"time, waits per {unit}": times[1][unit] / times[0][unit] for unit in times[0]},
    }


def run(data: Path, batch: int) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "qwen2.5")
    with tempfile.TemporaryDirectory() as cache:
        packed = prepared(data / "gsm8k" / "train.jsonl", tokenizer, Path(cache))
        padded = Bins(packed.rows, None)
        print(f"{len(padded)} documents, {sum(padded.lengths)} tokens, {len(packed)} bins of {LENGTH}")
        return [
            measure(bins, order, batch=batch, world=world, accumulation=accumulation)
            for bins in (packed, padded)
            for order in ORDERS
            for world in (2, 8)
            for accumulation in (1, 4)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--output", help="where to write the record; default: benchmarks/records/dealing.json")
    options = parser.parse_args()
    results = run(options.data, options.batch)
    print("| bins | order | ranks | accumulation | cut | dealt | cut, all | dealt, all | time: micro-batch | step |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in results:
        tokens = [f"{r[name]:.4f}" for name in ("cut", "dealt", "cut, all", "dealt, all")]
        times = [f"{value:.3f}" for name, value in r.items() if name.startswith("time")] or ["", ""]
        print("|", " | ".join([r["bins"], r["order"], str(r["world"]), str(r["accumulation"]), *tokens, *times]), "|")
    print(f"record: {write_record('dealing', results, options.output)}")


if __name__ == "__main__":
    main()
