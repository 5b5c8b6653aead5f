"""``hf-sft train`` and ``train.py``: from a file of arguments to a checkpoint that loads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

logger = logging.getLogger("hf_sft")


def main(argv: Sequence[str]) -> int:
    """Train as the arguments say; returns 0. Raises ValueError for everything that a user can put right."""
    from hf_sft.parsing import parse_args

    arguments = parse_args(argv)
    _log_to_terminal(arguments.training)
    for note in arguments.notes:
        logger.warning(note)
    return run(arguments)


def run(arguments: Any) -> int:
    """The road of the data, in its order."""
    from transformers import set_seed

    from hf_sft.checkpoints import check_output_dir, identity, resolve_resume, save_arguments
    from hf_sft.data.pipeline import prepare_dataset, write_data_report
    from hf_sft.data.templates import resolve_template
    from hf_sft.models.adapters import summary
    from hf_sft.models.loading import load_model, load_tokenizer
    from hf_sft.tasks import build_trainer, packing_of

    record = _record(arguments)
    training, data = arguments.training, arguments.data
    if training.process_index == 0:  # the others could meet what this one has begun to write
        check_output_dir(training.output_dir, identity(record), training.resume_from_checkpoint)
    checkpoint = resolve_resume(training.output_dir, training.resume_from_checkpoint)
    set_seed(training.seed)

    tokenizer = load_tokenizer(arguments.model)
    tokenizer.chat_template = resolve_template(tokenizer, data.chat_template)
    prepared = {"train": prepare_dataset(data.train_file, tokenizer, data=data, split="train")}
    if data.eval_file is not None:
        prepared["eval"] = prepare_dataset(data.eval_file, tokenizer, data=data, split="eval")
    model = load_model(arguments.model, arguments.lora, tokenizer=tokenizer, training=training)
    logger.info(summary(model))

    trainer = build_trainer(arguments, model, tokenizer, prepared["train"], prepared.get("eval"))
    if trainer.is_world_process_zero():
        save_arguments(training.output_dir, record)
        packing = {"train": packing_of(trainer.train_dataset), "eval": packing_of(trainer.eval_dataset)}
        write_data_report(training.output_dir, {split: part.report for split, part in prepared.items()}, packing)

    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if "eval" in prepared:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    logger.info("Saved to %s", training.output_dir)
    return 0


def _record(arguments: Any) -> dict[str, Any]:
    groups = {
        "model": asdict(arguments.model),
        "data": asdict(arguments.data),
        "training": arguments.training.to_dict(),
    }
    return groups if arguments.model.train_mode == "full" else {**groups, "adapter": asdict(arguments.lora)}


def _log_to_terminal(training: Any) -> None:
    """Our lines on the terminal, from one process per machine; warnings from all."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if training.local_process_index == 0 else logging.WARNING)
