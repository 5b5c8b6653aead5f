"""Task -> trainer: the one table."""

from __future__ import annotations

from typing import Any

from hf_sft.data.bins import Bins
from hf_sft.data.pipeline import packing_report
from hf_sft.parsing import Arguments
from hf_sft.training.trainer import SFTTrainer

TRAINERS: dict[str, type[SFTTrainer]] = {"sft": SFTTrainer}


def build_trainer(arguments: Arguments, model: Any, tokenizer: Any, train: Any, evaluation: Any | None) -> SFTTrainer:
    """The trainer of ``arguments.data.task_type`` over token rows.

    Raises:
        ValueError: as ``SFTTrainer``.
    """
    return TRAINERS[arguments.data.task_type](
        model,
        arguments.training,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        data_args=arguments.data,
        attention_backend=arguments.model.attention_backend,
    )


def packing_of(dataset: Any) -> dict[str, Any] | None:
    """Bins, capacity and fill of a trainer's data set, for the data report; None where nothing is packed."""
    if not isinstance(dataset, Bins) or dataset.capacity is None:
        return None
    return packing_report(len(dataset), dataset.capacity, sum(dataset.lengths))
