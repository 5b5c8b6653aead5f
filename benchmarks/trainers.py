"""The same packs through four trainers: ours, TRL's, transformers' own, and the plain loop, the limit of the same arithmetic."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from turns import Turn
from workloads import Row, make_model, tokens

LEARNING_RATE = 1e-4


def settings(folder: str, steps: int, accumulation: int = 1) -> dict[str, Any]:
    """What all trainers are told; the rest are their defaults."""
    return dict(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=1, per_device_eval_batch_size=1, logging_steps=1,
        gradient_accumulation_steps=accumulation, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", save_strategy="no",
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True, report_to="none", train_sampling_strategy="sequential",
    )  # fmt: skip


def quiet() -> None:
    """Of libraries and of the lines of the log; errors stay."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Trainers print their log


def logged(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def steps_of(turn: Turn, steps: int, make: Callable[[dict[str, Any]], Any], accumulation: int = 1) -> list[float]:
    """``steps`` steps of the trainer that ``make`` builds of ``settings``; the losses of its log."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(settings(folder, steps, accumulation))
        trainer.add_callback(turn.of_trainer(steps))
        trainer.train()
        return logged(trainer)


# ---- the ways ----


def ours(
    turn: Turn, steps: int, packs: list[list[Row]], vocabulary: int, accumulation: int = 1, **how: Any
) -> list[float]:
    """SFTTrainer."""
    return steps_of(turn, steps, lambda values: our_trainer(packs, vocabulary, values, **how), accumulation)


def wedlm(turn: Turn, steps: int, packs: list[list[Row]], vocabulary: int, block_size: int = 32) -> list[float]:
    """SFTTrainer with objective wedlm; the mask token has row ``vocabulary``, the last of ``vocabulary + 1``."""
    from hf_sft import WeDLMArguments

    how = {"model": make_model(vocabulary + 1), "objective": "wedlm"}
    own = WeDLMArguments(mask_token_id=vocabulary, block_size=block_size)
    return ours(turn, steps, packs, vocabulary, wedlm_args=own, **how)


def our_trainer(packs: list[list[Row]], vocabulary: int, values: dict[str, Any], **how: Any) -> Any:
    """SFTTrainer on these packs, in their order."""
    from hf_sft import DataArguments, SFTTrainer, TrainingArguments

    data = DataArguments(max_seq_length=max(map(tokens, packs)), objective=how.pop("objective", "causal"))
    rows = [row for pack in packs for row in pack]
    trainer = SFTTrainer(
        how.pop("model", None) or make_model(vocabulary), TrainingArguments(**values), train_dataset=rows, eval_dataset=rows,
        data_args=data, attention_backend=how.pop("attention_backend", "segment"), **how,
    )  # fmt: skip
    ends = np.cumsum([len(pack) for pack in packs])
    for bins in (trainer.train_dataset, trainer.eval_dataset):
        bins.bins = [list(range(end - len(pack), end)) for pack, end in zip(packs, ends, strict=True)]
    return trainer


def trl(
    turn: Turn, steps: int, packs: list[list[Row]], vocabulary: int, accumulation: int = 1, **how: Any
) -> list[float]:
    """TRL's SFTTrainer with its packing (bfd, which keeps documents apart); activation checkpointing is off, as in ours."""
    return steps_of(turn, steps, lambda values: trl_trainer(packs, vocabulary, values, **how), accumulation)


def trl_trainer(packs: list[list[Row]], vocabulary: int, values: dict[str, Any], **how: Any) -> Any:
    """TRL's trainer on packs that are tokenised and packed already: only its steps are compared here."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    longest = max(map(tokens, packs))
    mine = {"bf16": False, "gradient_checkpointing": False, "packing": True, "max_length": longest}
    config = SFTConfig(**{**values, **mine, **how.pop("config", {})})
    model = how.pop("model", None) or make_model(vocabulary)
    first = Dataset.from_list([{"text": "a b c"}])
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=first, eval_dataset=first, processing_class=words_tokenizer(), **how
    )
    joined = [
        {
            "input_ids": np.concatenate([row["input_ids"] for row in pack]),
            "labels": np.concatenate([row["labels"] for row in pack]),
            "seq_lengths": [len(row["input_ids"]) for row in pack],
        }
        for pack in packs
    ]
    trainer.train_dataset = trainer.eval_dataset = Dataset.from_list(joined)
    return trainer


def words_tokenizer() -> Any:
    """For what TRL tokenises while it is built."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "</s>": 3}, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


def hf(turn: Turn, steps: int, packs: list[list[Row]], vocabulary: int, accumulation: int = 1) -> list[float]:
    """transformers' Trainer with its flattening collator, which packs documents into one row with positions from 0."""
    return steps_of(turn, steps, lambda values: hf_trainer(packs, vocabulary, values), accumulation)


def hf_trainer(packs: list[list[Row]], vocabulary: int, values: dict[str, Any]) -> Any:
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    flatten = DataCollatorWithFlattening()
    examples = [[{name: values.tolist() for name, values in row.items()} for row in pack] for pack in packs]
    args = TrainingArguments(**values, remove_unused_columns=False)
    return Trainer(
        make_model(vocabulary), args, train_dataset=examples, eval_dataset=examples,
        data_collator=lambda batch: flatten([row for pack in batch for row in pack]),
    )  # fmt: skip


def plain(
    turn: Turn, steps: int, packs: list[list[Row]], vocabulary: int, accumulation: int = 1, fast: bool = False
) -> list[float]:
    """The loop that anyone would write for the same arithmetic: segments, the head on scored rows, fused AdamW.

    Args:
        fast: with the products of ``hf_sft.products``, as ours.
    """
    from hf_sft.products import fast_products

    quiet()
    loop = PlainLoop(packs, vocabulary)
    losses = []
    with fast_products() if fast else nullcontext():
        for step in range(steps):
            turn.begin()
            losses.append(loop.step(step * accumulation, accumulation))
            turn.end()
    return losses


class PlainLoop:
    """Batches are made before the clock runs."""

    def __init__(self, packs: list[list[Row]], vocabulary: int) -> None:
        from hf_sft.attention.backends import BACKENDS
        from hf_sft.collators import CausalCollator

        self.model = make_model(vocabulary).train()
        self.backend = BACKENDS["segment"]
        self.backend.install(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        collator = CausalCollator(True, 0)
        self.batches = [collator([pack]) for pack in packs]

    def loss(self, batch: dict[str, Any], count: int) -> Tensor:
        """Of one micro-batch: its rows' share of ``count``."""
        from hf_sft.attention.layout import Layout

        inputs = self.backend.inputs(self.model, Layout.from_batch(batch))
        hidden = self.model.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **inputs)[0][
            0
        ]
        logits = linear(hidden[batch["logits_to_keep"]], self.model.lm_head.weight)
        return cross_entropy(logits, batch["target_ids"], reduction="sum") / count

    def step(self, first: int, accumulation: int = 1) -> float:
        batches = [self.batches[number % len(self.batches)] for number in range(first, first + accumulation)]
        count = sum(len(batch["target_ids"]) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self.loss(batch, count)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total
