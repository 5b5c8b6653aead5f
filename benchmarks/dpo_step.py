"""Learning from preference pairs: DPOTrainer against TRL's on the same pairs, model, reference and number of pairs per step.

    python benchmarks/dpo_step.py [--vocab_size 6400 32000] [--steps 7] [--output results.json]

A Qwen3-like model (4 layers, 256 wide) and a copy of it as the reference see pairs whose prompts and answers have the lengths of
real ones (seeded, from a table of quantiles), their tokens random. Each trainer is a process of its own, steps alternate, and
figures are medians. Peak memory is the resident set, imports and all. TRL's settings are its defaults, but for activation
checkpointing, which is off in both, and float32. DPOTrainer takes the products of ``hf_sft/products.py``, oneDNN's where they are
faster, TRL what torch takes by itself.

Demanded: at least as fast as TRL, with the same losses (before the first step policy and reference are one and the loss is log 2;
those after it tell whether both learn the same).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import trainers
from records import conclude, parser, table
from turns import WARM_UP, Turn, alternate, beside, figures, largest_difference

# Quantiles (0, 1/8 .. 1) of LLaMA-Factory's dpo_en_demo under the Qwen2.5 tokenizer, prompts cut to their last 128 tokens and
# answers to 384.
PROMPTS = [35, 54, 74, 107, 128, 128, 128, 128, 128]
ANSWERS = [3, 57, 135, 237, 314, 384, 384, 384, 384]
LEARNING_RATE = 1e-5
SAME = 1e-4  # losses differ by no more, relative

Pair = dict[str, list[int]]


def pairs(count: int, vocabulary: int, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)

    def ids(quantiles: list[int]) -> list[int]:
        length = int(np.interp(rng.random(), np.linspace(0, 1, len(quantiles)), quantiles))
        return rng.integers(2, vocabulary, length).tolist()

    return [
        {"prompt_ids": ids(PROMPTS), "chosen_ids": ids(ANSWERS), "rejected_ids": ids(ANSWERS)} for _ in range(count)
    ]


def ours(turn: Turn, steps: int, data: list[Pair], vocabulary: int, batch: int) -> list[float]:
    from hf_sft import DataArguments, DPOArguments, DPOTrainer, TrainingArguments

    def make(values: dict[str, Any]) -> Any:
        model = trainers.make_model(vocabulary)
        trainer: Any = DPOTrainer(
            model, TrainingArguments(**of_pairs(values, batch)), ref_model=copy.deepcopy(model), train_dataset=data,
            data_args=DataArguments(task_type="dpo", max_seq_length=512), dpo_args=DPOArguments(),
        )  # fmt: skip
        # A bin for each pair: the steps of both trainers then have the same pairs.
        trainer.train_dataset.bins = [[number] for number in range(len(data))]
        return trainer

    return trainers.steps_of(turn, steps, make)


def theirs(turn: Turn, steps: int, data: list[Pair], vocabulary: int, batch: int) -> list[float]:
    import trl
    from datasets import Dataset, disable_progress_bars
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    def make(values: dict[str, Any]) -> Any:
        disable_progress_bars()
        model = trainers.make_model(vocabulary)
        first = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])  # tokenised while it is built
        trainer = trl.DPOTrainer(
            model=model, ref_model=copy.deepcopy(model), train_dataset=first, processing_class=trainers.words_tokenizer(),
            args=trl.DPOConfig(**of_pairs(values, batch), bf16=False, gradient_checkpointing=False),
            data_collator=DataCollatorForPreference(pad_token_id=0),
        )  # fmt: skip
        trainer.train_dataset = Dataset.from_list(data)
        return trainer

    return trainers.steps_of(turn, steps, make)


def of_pairs(values: dict[str, Any], batch: int) -> dict[str, Any]:
    return {**values, "per_device_train_batch_size": batch, "learning_rate": LEARNING_RATE}


def run(vocabulary: int, steps: int, batch: int) -> dict[str, Any]:
    data = pairs((steps + WARM_UP) * batch, vocabulary)
    how = {"data": data, "vocabulary": vocabulary, "batch": batch}
    found = alternate({"DPOTrainer": (ours, how), "TRL": (theirs, how)}, steps)
    tokens = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in data)
    return {
        "vocab_size": vocabulary, "steps": steps, "pairs_per_step": batch, "tokens_per_step": tokens / (steps + WARM_UP),
        **figures(found, "DPOTrainer"),
        "pairs_per_second": {name: batch / course.median for name, course in found.items()},
        "losses": {name: course.losses for name, course in found.items()},
        "largest_relative_loss_difference": largest_difference(found, "DPOTrainer"),
    }  # fmt: skip


def missed(results: list[dict[str, Any]]) -> list[str]:
    """What was demanded and is not met."""
    found = []
    for r in results:
        if r["faster_than"]["TRL"] < 1:
            found.append(f"TRL at {r['vocab_size']:,}")
        if r["largest_relative_loss_difference"] > SAME:
            found.append(f"the same losses at {r['vocab_size']:,}")
    return found


def markdown(record: dict[str, Any]) -> str:
    """The table of a record."""
    body = []
    for r in record["runs"]:
        for name, rate in r["pairs_per_second"].items():
            body.append([f"{r['vocab_size']:,}", name, f"{rate:.2f}", f"{r['peak_mb'][name]:,.0f}", *beside(r, name)])
    return table(["vocabulary", "", "pairs / s", "peak MB", "ours is faster", "ours needs"], body)


def main() -> None:
    words = parser(__doc__, "dpo_step", steps=7)
    words.add_argument("--vocab_size", type=int, nargs="+", default=[6400, 32_000])
    words.add_argument("--batch", type=int, default=8)
    options = words.parse_args()
    results = [run(size, options.steps, options.batch) for size in options.vocab_size]
    record = {"note": options.note, "missed": missed(results), "runs": results}
    print(markdown(record))
    conclude("dpo_step", record, options.output)


if __name__ == "__main__":
    main()
