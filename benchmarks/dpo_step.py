"""Learning from preference pairs: DPOTrainer against TRL's on the same pairs, model, reference and number of pairs per step.

    python benchmarks/dpo_step.py [--vocab_size 6400 32000] [--repeats 3] [--output results.json]

A Qwen3-like model (4 layers, 256 wide) and a copy of it as the reference see pairs whose prompts and answers have the lengths of
real ones (seeded, from a table of quantiles), their tokens random. Passes over the pairs alternate in one process; a figure is
the median of the passes, its first step left out. TRL's settings are its defaults, but for activation checkpointing, which is off
in both.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from records import write_record
from step import make_model
from transformers import TrainerCallback

from hf_sft.arguments import DataArguments, DPOArguments
from hf_sft.training.dpo import DPOTrainer
from hf_sft.training_arguments import TrainingArguments

# Quantiles (0, 1/8 .. 1) of LLaMA-Factory's dpo_en_demo under the Qwen2.5 tokenizer, prompts cut to their last 128 tokens and
# answers to 384.
PROMPTS = [35, 54, 74, 107, 128, 128, 128, 128, 128]
ANSWERS = [3, 57, 135, 237, 314, 384, 384, 384, 384]


def pairs(count: int, vocabulary: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)

    def ids(quantiles: list[int]) -> list[int]:
        length = int(np.interp(rng.random(), np.linspace(0, 1, len(quantiles)), quantiles))
        return rng.integers(2, vocabulary, length).tolist()

    return [
        {"prompt_ids": ids(PROMPTS), "chosen_ids": ids(ANSWERS), "rejected_ids": ids(ANSWERS)} for _ in range(count)
    ]


class Clock(TrainerCallback):
    """Seconds from the end of the first step to the end of the last."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if state.global_step == 1:
            self.start = now
        self.seconds = now - self.start


def settings(folder: str, batch: int) -> dict[str, Any]:
    return dict(
        output_dir=folder, num_train_epochs=1, per_device_train_batch_size=batch, learning_rate=1e-5, logging_steps=1,
        use_cpu=not torch.cuda.is_available(), save_strategy="no", disable_tqdm=True, report_to="none", seed=0,
    )  # fmt: skip


def ours(data: list[dict], vocabulary: int, batch: int) -> tuple[float, list[float]]:
    """One document per row of a bin is one pair: so a step has as many pairs as TRL's."""
    model, clock = make_model(vocabulary), Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model, TrainingArguments(**settings(folder, batch)), ref_model=copy.deepcopy(model), train_dataset=data,
            data_args=DataArguments(task_type="dpo", max_seq_length=512), dpo_args=DPOArguments(), callbacks=[clock],
        )  # fmt: skip
        # A bin for each pair: the steps of both trainers then have the same number of pairs.
        trainer.train_dataset.bins = [[number] for number in range(len(data))]
        trainer.train()
    return clock.seconds, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def theirs(data: list[dict], vocabulary: int, batch: int) -> tuple[float, list[float]]:
    import trl
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    model, clock = make_model(vocabulary), Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(**settings(folder, batch), bf16=False, gradient_checkpointing=False)
        trainer = trl.DPOTrainer(
            model=model, ref_model=copy.deepcopy(model), args=config, train_dataset=Dataset.from_list(TEXT),
            processing_class=_tokenizer(), callbacks=[clock], data_collator=DataCollatorForPreference(pad_token_id=0),
        )  # fmt: skip
        trainer.train_dataset = Dataset.from_list(data)  # tokenised already
        trainer.train()
    return clock.seconds, [line["loss"] for line in trainer.state.log_history if "loss" in line]


TEXT = [{"prompt": "a", "chosen": "b", "rejected": "c"}]  # what TRL tokenises while it is built


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "</s>": 3}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


def run(vocabulary: int, count: int, batch: int, repeats: int) -> dict[str, Any]:
    data = pairs(count, vocabulary)
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    first = {}
    for _ in range(repeats):
        for name, passes in (("ours", ours), ("trl", theirs)):
            took, losses = passes(data, vocabulary, batch)
            seconds[name].append(took)
            first[name] = losses[0]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    later = count - batch
    return {
        "vocab_size": vocabulary, "pairs": count, "pairs_per_step": batch,
        "tokens": sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in data),
        "seconds": seconds, "ours_pairs_per_second": later / medians["ours"], "trl_pairs_per_second": later / medians["trl"],
        "ratio": medians["trl"] / medians["ours"], "first_losses": first,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[6400, 32000])
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", help="what else there is to say of the conditions")
    parser.add_argument("--output", help="where to write the record; default: benchmarks/records/dpo_step.json")
    options = parser.parse_args()
    results = [run(size, options.pairs, options.batch, options.repeats) for size in options.vocab_size]
    print(f"{'vocabulary':>10} {'DPOTrainer pairs/s':>19} {'TRL pairs/s':>12} {'ratio':>6}")
    for r in results:
        print(
            f"{r['vocab_size']:>10} {r['ours_pairs_per_second']:>19.2f} {r['trl_pairs_per_second']:>12.2f} {r['ratio']:>6.2f}"
        )
    print(f"record: {write_record('dpo_step', {'note': options.note, 'runs': results}, options.output)}")


if __name__ == "__main__":
    main()
