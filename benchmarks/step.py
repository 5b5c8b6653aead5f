"""What the Trainer adds to a training step: SFTTrainer against a plain loop over the same batches with the same maths.

    python benchmarks/step.py [--vocab_size 6400] [--steps 20] [--output results.json]

A Qwen3-like model (4 layers, 256 wide) takes packs of 2,048 tokens. Steps of the two alternate in one process, so that a slow
moment of the machine hits both; the figures are medians. The documents are gsm8k's lengths (seeded, from a table of quantiles),
their tokens random: a step's time does not depend on which tokens they are.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch
from records import write_record
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from hf_sft.arguments import DataArguments
from hf_sft.attention.backends import BACKENDS
from hf_sft.attention.layout import Layout
from hf_sft.training.trainer import SFTTrainer
from hf_sft.training_arguments import TrainingArguments

# Quantiles (0, 1/8 .. 1) of document lengths and supervised shares of gsm8k train under the Qwen2.5 tokenizer and template.
LENGTHS = [95, 142, 162, 181, 199, 222, 250, 292, 567]
SUPERVISED_SHARE = 0.58


def documents(count: int, vocabulary: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for length in np.interp(rng.random(count), np.linspace(0, 1, len(LENGTHS)), LENGTHS).astype(int):
        ids = rng.integers(0, vocabulary, length)
        rows.append(
            {"input_ids": ids, "labels": np.where(np.arange(length) < (1 - SUPERVISED_SHARE) * length, -100, ids)}
        )
    return rows


def make_model(vocabulary: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
        )
    )  # fmt: skip


class PlainLoop(TrainerCallback):
    """After each step of the Trainer, one step of the loop that anyone would write for the same maths."""

    def __init__(self, model: Qwen3ForCausalLM, batches: list[dict], learning_rate: float) -> None:
        self.model, self.batches = model, iter(batches)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
        self.backend = BACKENDS["segment"]
        self.backend.install(model)
        self.trainer_seconds: list[float] = []
        self.plain_seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # From the end of the last plain step: fetching, collating and logging count for the Trainer.
        self.trainer_seconds.append(time.perf_counter() - self.mark)
        start = time.perf_counter()
        self.step(next(self.batches))
        self.plain_seconds.append(time.perf_counter() - start)
        self.mark = time.perf_counter()

    def step(self, batch: dict) -> None:
        self.model.train()
        inputs = self.backend.inputs(self.model, Layout.from_batch(batch))
        hidden = self.model.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **inputs)[0][
            0
        ]
        logits = torch.nn.functional.linear(hidden[batch["logits_to_keep"]], self.model.lm_head.weight)
        loss = cross_entropy(logits.float(), batch["target_ids"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())


def run(vocabulary: int, steps: int, length: int) -> dict:
    rows = documents(steps * 14, vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=1, logging_steps=1, learning_rate=1e-4,
            lr_scheduler_type="constant", use_cpu=not torch.cuda.is_available(), save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            make_model(vocabulary), args, train_dataset=rows, data_args=DataArguments(max_seq_length=length),
            attention_backend="segment",
        )  # fmt: skip
        batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()][:steps]
        plain = PlainLoop(make_model(vocabulary).to(args.device), batches, args.learning_rate)
        trainer.add_callback(plain)
        trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    worst = max(abs(a - b) / b for a, b in zip(logged, plain.losses, strict=True))
    warm = slice(2, None)
    trainer_s, plain_s = statistics.median(plain.trainer_seconds[warm]), statistics.median(plain.plain_seconds[warm])
    return {
        "vocab_size": vocabulary, "steps": steps, "tokens_per_pack": length, "trainer_seconds": trainer_s,
        "plain_seconds": plain_s, "ratio": trainer_s / plain_s, "largest_relative_loss_difference": worst,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[6400])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--output", help="where to write the record; default: benchmarks/records/step.json")
    options = parser.parse_args()
    records = [run(vocabulary, options.steps, options.length) for vocabulary in options.vocab_size]
    print(f"{'vocabulary':>10} {'SFTTrainer s':>13} {'plain loop s':>13} {'ratio':>6} {'loss differs by':>16}")
    for r in records:
        print(
            f"{r['vocab_size']:>10} {r['trainer_seconds']:>13.3f} {r['plain_seconds']:>13.3f} {r['ratio']:>6.2f} "
            f"{r['largest_relative_loss_difference']:>16.1e}"
        )
    print(f"record: {write_record('step', records, options.output)}")


if __name__ == "__main__":
    main()
