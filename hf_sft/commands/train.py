"""``hf-sft train`` and ``train.py``: from a file of arguments to a checkpoint that loads."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_sft.imports import importing, spare_deepspeed

logger = logging.getLogger("hf_sft")

_MANY_LOST = 0.1  # of the records: above it the line of the log is a warning


def main(argv: Sequence[str]) -> int:
    """Train as the arguments say; returns 0. Raises ValueError for everything that a user can put right."""
    from hf_sft.legacy import enter_environment
    from hf_sft.parsing import parse_args
    from hf_sft.training.failures import ending_together

    arguments = parse_args(argv)
    spare_deepspeed()
    log_to_terminal(arguments.training.local_process_index)
    enter_environment(arguments.environment, arguments.training.report_to)
    for note in arguments.notes:
        logger.warning(note)
    with ending_together():
        return run(arguments)


def run(arguments: Any) -> int:
    """The road of the data, in its order."""
    with importing():
        from transformers import set_seed

        from hf_sft.attention.selfcheck import refuse_on_cpu
        from hf_sft.checkpoints import check_checkpoint, check_output_dir, identity, save_arguments, steps_of
        from hf_sft.data.prepared import write_data_report
        from hf_sft.models.loading import load_model
        from hf_sft.models.sharded import summary
        from hf_sft.tasks import build_trainer, packing_of, read_data_side, training_data
        from hf_sft.training.failures import meet
        from hf_sft.training.resuming_trainer import find_checkpoint
        from hf_sft.training.together import raised_together

    record = _record(arguments)
    training = arguments.training
    refuse_on_cpu(arguments.model.attention_backend, training.device)  # before data are read and a model is loaded
    with raised_together():
        if training.process_index == 0:  # the others could meet what this one has begun to write
            check_output_dir(training.output_dir, identity(record), training.resume_from_checkpoint)
    checkpoint = find_checkpoint(training, training.resume_from_checkpoint)
    if checkpoint is not None:
        for line in check_checkpoint(checkpoint, record):
            logger.info("changed since %s: %s", checkpoint, line)
    set_seed(training.seed)

    tokenizer, objective = read_data_side(arguments)
    prepared = training_data(arguments, tokenizer, objective)
    _tell_data(prepared)
    meet()
    read_only = [objective.mask_token_id] if objective.mask_token_id is not None else []
    model = load_model(arguments.model, arguments.lora, tokenizer=tokenizer, training=training, input_rows=read_only)
    meet()
    _warn_of_averages(arguments)
    logger.info(summary(model))

    with _no_empty_folder(training.output_dir):
        trainer = build_trainer(
            arguments, model, tokenizer, prepared["train"], prepared.get("eval"), objective.mask_token_id
        )

        def write_record() -> None:
            save_arguments(training.output_dir, {**record, **_came_of(record, arguments, trainer)})
            packing = {"train": packing_of(trainer.train_dataset), "eval": packing_of(trainer.eval_dataset)}
            reports = {split: part.report for split, part in prepared.items()}
            write_data_report(training.output_dir, reports, packing)

        trainer.add_callback(_when_training_begins(write_record))
        _tell_run(trainer, model)
        if checkpoint is not None:
            done, planned = steps_of(checkpoint)
            last = trainer.last_step(checkpoint)
            if done >= last:
                return _finish(trainer, checkpoint)
            if planned != last:
                logger.warning(
                    "The run was planned for %d steps and now takes %d: learning rates that depend on their number jump.",
                    planned, last,
                )  # fmt: skip
        result = trainer.train(resume_from_checkpoint=checkpoint)
    _refuse_divergence(trainer.state.log_history)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    _see_what_was_learned(trainer)
    logger.info("Saved to %s", training.output_dir)
    if arguments.model.train_mode != "full":
        _tell_added_rows(tokenizer)
    return 0


# ---- parts of the road ----


def _tell_data(prepared: Mapping[str, Any]) -> None:
    """A line per split: what was kept and what was not."""
    for split, part in prepared.items():
        report = part.report
        if "records" not in report:
            continue  # live data are told of as they are read
        lost = {name: count for name, count in report["dropped"].items() if count}
        lost |= {"bad": report["bad"]["count"]} if report["bad"]["count"] else {}
        reasons = f" ({', '.join(f'{name} {count:,}' for name, count in lost.items())})" if lost else ""
        many = sum(lost.values()) > _MANY_LOST * report["records"]
        logger.log(
            logging.WARNING if many else logging.INFO,
            "%s data: %s records, %s kept%s; %s tokens, %.0f %% of them supervised",
            split, f"{report['records']:,}", f"{report['kept']:,}", reasons, f"{report['tokens']:,}",
            100 * report["supervised_share"],
        )  # fmt: skip
        if "overlength" in lost and many:
            logger.warning(
                "%s are longer than max_seq_length and are left out: raise it, or set overlength to truncate%s",
                f"{lost['overlength']:,}",
                ", and max_prompt_length for long prompts" if report["formats"].get("preference") else "",
            )


def _warn_of_averages(arguments: Any) -> None:
    """A training goes on with weights, whatever their average would answer."""
    from hf_sft.models.averages import has_average

    for name in filter(None, (arguments.model.model_name_or_path, arguments.lora.adapter_name_or_path)):
        if has_average(name):
            logger.warning(
                "%s holds an average of its weights beside them, and training begins from the weights; to begin from the "
                "average, name the result of its run, or what hf-sft merge writes",
                name,
            )


def _tell_added_rows(tokenizer: Any) -> None:
    """Of an adapter that has rows for tokens which its base does not know."""
    from hf_sft.models.vocabulary import added_token_ids

    if added_token_ids(tokenizer):
        logger.info(
            "The adapter has rows for new tokens: merge it, or call resize_token_embeddings(len(tokenizer)) on its base"
        )


def _tell_run(trainer: Any, model: Any) -> None:
    """One line: processes, engine, device, precision, and what a step is."""
    args = trainer.args
    stage = args.deepspeed and args.deepspeed["zero_optimization"]["stage"]
    engine = (
        f"DeepSpeed ZeRO-{stage}" if stage else "FSDP2" if args.fsdp else "DDP" if args.world_size > 1 else "no engine"
    )
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no autocast"
    processes = f"{args.world_size} process{'es' * (args.world_size != 1)}"
    bins = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
    logger.info(
        "%s, %s, on %s; weights in %s, %s; steps of %d bin%s (%d x %d x %s)",
        processes, engine, args.device.type, str(model.dtype).removeprefix("torch."), precision, bins, "s" * (bins != 1),
        args.per_device_train_batch_size, args.gradient_accumulation_steps, processes,
    )  # fmt: skip


def _finish(trainer: Any, checkpoint: str) -> int:
    """No step is left to train: keep the results, or make them from the checkpoint."""
    from hf_sft.training.together import gathered

    folder = Path(trainer.args.output_dir)
    done = _has_results(folder, checkpoint, evaluated=trainer.eval_dataset is not None) and not trainer.owes_stop_check
    if gathered(done)[0]:  # all processes have looked before one of them writes
        logger.info("The run in %s is finished (%s); raise max_steps or num_train_epochs to go on.", folder, checkpoint)
        return 0
    logger.info("All steps are done in %s; what is left is to save and evaluate.", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    _refuse_divergence(trainer.state.log_history)
    trainer.save_model()
    trainer.save_state()
    _see_what_was_learned(trainer)
    logger.info("Saved to %s", folder)
    return 0


def _has_results(folder: Path, checkpoint: str, *, evaluated: bool) -> bool:
    """Whether the results in ``folder`` are those of ``checkpoint`` and were written to their end, the evaluation's last."""
    from hf_sft.checkpoints import read_state

    try:
        state = read_state(folder)
        results = json.loads((folder / "eval_results.json").read_text(encoding="utf-8")) if evaluated else None
    except (OSError, ValueError):
        return False
    before = read_state(checkpoint)
    history = before["log_history"]
    same = state["global_step"] == before["global_step"] and state["log_history"][: len(history)] == history
    return same and (results is None or results.get("epoch") == state["epoch"])


def _see_what_was_learned(trainer: Any) -> None:
    """The last evaluation, whether the model stops by itself, and the report."""
    from hf_sft.training.monitoring import keep_report

    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.check_stopping()
    if trainer.is_world_process_zero() and (page := keep_report(trainer.args.output_dir)) is not None:
        logger.info("Report: %s", page)


def _refuse_divergence(history: Iterable[Mapping[str, Any]]) -> None:
    """A model whose loss is NaN is not saved as a result."""
    for line in history:
        for name in ("loss", "train_loss"):
            if not math.isfinite(line.get(name, 0.0)):
                raise ValueError(
                    f"training has diverged: {name} is {line[name]} in the log of step {line['step']}, the first that is not "
                    "finite. No final model is saved. Lower learning_rate, raise warmup_steps or set max_grad_norm, and start in "
                    "a new output_dir or from a checkpoint before that step."
                )


# ---- the record of a run ----


def _record(arguments: Any) -> dict[str, Any]:
    """The given values, and what decides which rows each step sees."""
    from hf_sft.data.pipeline import files_hash

    training = arguments.training
    groups = {
        "model": asdict(arguments.model),
        "data": asdict(arguments.data),
        "training": training.to_dict(),
        "evaluation": asdict(arguments.evaluation),
        "ema": asdict(arguments.ema),
        "monitoring": asdict(arguments.monitoring),
        "run": {
            "train_file_hash": files_hash(arguments.data.train_file, streaming=arguments.data.streaming),
            "global_batch_size": training.world_size
            * training.per_device_train_batch_size
            * training.gradient_accumulation_steps,
            "processes": training.world_size,
        },
    }
    if arguments.model.train_mode != "full":
        groups["adapter"] = asdict(arguments.lora)
    if arguments.data.objective == "wedlm":
        groups["wedlm"] = asdict(arguments.wedlm)
    if arguments.data.task_type == "dpo":
        groups["preferences"] = asdict(arguments.dpo)
    return groups


def _came_of(record: Mapping[str, Any], arguments: Any, trainer: Any) -> dict[str, Any]:
    """What the given values came to on this machine and with this model, and what the defaults would have been."""
    from hf_sft.checkpoints import DEFAULTS, RESOLVED, other_defaults
    from hf_sft.models.loading import quantization_kind

    token = trainer.objective.mask_token_id
    return {
        RESOLVED: {
            "attention_backend": trainer.layout.name,
            "packing": trainer.layout.backend is not None,
            "dtype": str(trainer.model.config.dtype).removeprefix("torch."),
            "quantization": quantization_kind(arguments.model),
            **({} if token is None else {"mask_token_id": token}),
            **({"reference": trainer.reference_kind} if arguments.data.task_type == "dpo" else {}),
            "processes": trainer.args.world_size,
            "last_step": trainer.state.max_steps,
        },
        DEFAULTS: other_defaults(record),
    }


def _when_training_begins(action: Callable[[], None]) -> Any:
    """A callback for the main process: until then, loader, optimizer, scheduler and checkpoint may still be refused."""
    from transformers import TrainerCallback

    class WhenTrainingBegins(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                action()

    return WhenTrainingBegins()


# ---- the process ----


@contextmanager
def _no_empty_folder(output_dir: str) -> Iterator[None]:
    """Trainer makes the folder at once; if nothing came to stand in it, it goes again."""
    folder = Path(output_dir)
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):  # not empty, or not made
                folder.rmdir()
        raise


def log_to_terminal(local_process_index: int = 0) -> None:
    """Our lines on the terminal, from one process per machine; warnings from all."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if local_process_index == 0 else logging.WARNING)
