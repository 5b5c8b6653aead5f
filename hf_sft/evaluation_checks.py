"""Checks of what is measured while a model trains, and of what follows from it: metrics, answers, averages, the profile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hf_sft.arguments import DataArguments, EMAArguments, EvaluationArguments, MonitoringArguments

METRICS = ("loss", "perplexity", "token_accuracy", "supervised_tokens")  # of an evaluation by train.py
PAIR_METRICS = (  # of task_type dpo
    "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected",
    "rewards/accuracies_low", "rewards/accuracies_high",
)  # fmt: skip
WEDLM_METRICS = ("any_order_bound", "masked_loss", "masked_accuracy")  # and these of objective wedlm
_AT_RATIO = r"masked_(loss|accuracy)_at_(0\.[1-9]|1\.0)"
ANSWER_METRICS: dict[str, tuple[str, ...]] = {  # of generation_metrics: the names that each is logged under
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "meteor": ("meteor",),
    "edit_distance": ("edit_chars", "edit_words"),
    "exact_match": ("exact_match",),
    "final_answer": ("final_answer",),
}
DECODING_METRICS = ("stopped", "answer_tokens", "tokens_per_forward")  # measured whenever answers are


def check_metric(training: Any, data: DataArguments, evaluation: EvaluationArguments) -> Iterator[str]:
    """The metric that chooses the best checkpoint is one that train.py measures."""
    metric = (training.metric_for_best_model or "").removeprefix("eval_")
    known: tuple[str, ...] = PAIR_METRICS if data.task_type == "dpo" else METRICS
    known += WEDLM_METRICS if data.objective == "wedlm" else ()
    of_answers = tuple(name for names in ANSWER_METRICS.values() for name in names) + DECODING_METRICS
    if metric in of_answers:
        if evaluation.generation_eval_steps is None:
            yield f"metric_for_best_model is {metric}, which is measured on answers: set generation_eval_steps"
        if evaluation.max_generation_seconds is not None:
            yield (
                f"metric_for_best_model is {metric} and max_generation_seconds is {evaluation.max_generation_seconds:g}: which "
                "prompts are answered, and so which checkpoint is best, would depend on the speed; leave one of them out"
            )
        if asked := evaluation.generation_metrics:
            measured = {name for kind in asked for name in ANSWER_METRICS.get(kind, ())} | set(DECODING_METRICS)
            if metric not in measured:
                kind = next(kind for kind, names in ANSWER_METRICS.items() if metric in names)
                yield f"metric_for_best_model is {metric}, and generation_metrics leaves it out: add {kind} there"
        return
    at_ratio = data.objective == "wedlm" and re.fullmatch(_AT_RATIO, metric)
    if metric and metric not in known and not at_ratio:
        yield (
            f"metric_for_best_model is {training.metric_for_best_model!r}, which train.py does not measure; choose one of "
            f"{', '.join(known)}, or with generation_eval_steps {', '.join(of_answers)} (with or without eval_ before it)"
        )
    elif not metric and _plain(training.save_strategy) == "best" and not training.load_best_model_at_end:
        yield f"save_strategy is best and metric_for_best_model is not set: choose one of {', '.join(known)}"


def check_evaluation(
    evaluation: EvaluationArguments, data: DataArguments, training: Any, given: set[str], evaluated: bool
) -> Iterator[str]:
    """Answers to evaluation prompts, early stopping, evaluations within an epoch.

    Args:
        evaluated: whether there are, or may be, evaluation data.
    """
    strategy = _plain(training.eval_strategy)
    yield from _check_answers(evaluation, data, given, evaluated)
    if (count := evaluation.evals_per_epoch) is not None:
        if count < 1:
            yield f"evals_per_epoch is {count}: use at least 1, or leave it out"
        if strategy != "epoch":
            yield f"evals_per_epoch is {count} and eval_strategy is {strategy}: set eval_strategy to epoch"
        if data.streaming:
            yield f"evals_per_epoch is {count} and streaming is true, where no epoch ends: set eval_strategy to steps"
    if (patience := evaluation.early_stopping_patience) is not None:
        if patience < 1:
            yield f"early_stopping_patience is {patience}: use at least 1 evaluation, or leave it out"
        if strategy == "no":
            yield f"early_stopping_patience is {patience} and eval_strategy is no: set eval_strategy to steps or epoch"
    elif "early_stopping_threshold" in given:
        yield "early_stopping_threshold belongs to early_stopping_patience, which is not set: set it, or leave both out"
    if evaluation.early_stopping_threshold < 0:
        yield f"early_stopping_threshold is {evaluation.early_stopping_threshold:g}: use 0 or more"


def _check_answers(
    evaluation: EvaluationArguments, data: DataArguments, given: set[str], evaluated: bool
) -> Iterator[str]:
    steps = evaluation.generation_eval_steps
    for name in ("generation_eval_samples", "generation_batch_size", "generation_max_new_tokens"):
        if getattr(evaluation, name) < 1:
            yield f"{name} is {getattr(evaluation, name)}: use at least 1"
    if evaluation.stop_check_samples < 0:
        yield f"stop_check_samples is {evaluation.stop_check_samples}: use 0 (no check) or more"
    limit = evaluation.max_generation_seconds
    if limit is not None and not limit > 0:
        yield f"max_generation_seconds is {limit:g}: use a positive number, or leave it out"
    if unknown := [name for name in evaluation.generation_metrics if name not in ANSWER_METRICS]:
        yield f"generation_metrics has {', '.join(unknown)}; choose from {', '.join(ANSWER_METRICS)}"
    if steps is None:
        for name in ("generation_eval_samples", "max_generation_seconds", "generation_metrics"):
            if name in given:
                yield f"{name} is set and generation_eval_steps is not: say after how many steps prompts are answered"
        return
    if steps < 0:
        yield f"generation_eval_steps is {steps}: use a number of steps, or 0 for every evaluation"
    if data.task_type == "pretrain":
        yield f"generation_eval_steps is {steps} and task_type is pretrain: raw texts have no prompts and answers"
    if not evaluated:
        yield f"generation_eval_steps is {steps}, and eval_file is not set: name the evaluation data, or leave it out"


def check_ema(ema: EMAArguments, engine_shards: str | None, given: set[str]) -> Iterator[str]:
    """The average of the weights.

    Args:
        engine_shards: the engine that shards weights or optimizer states, in words.
    """
    if ema.ema_decay is None:
        for name in ("ema_start_step", "ema_cpu"):
            if name in given:
                yield f"{name} belongs to an average of the weights, and ema_decay is not set: set it, or leave {name} out"
        return
    if not 0 < ema.ema_decay < 1:
        yield f"ema_decay is {ema.ema_decay:g}: it lies between 0 and 1, and 0.999 is usual for thousands of steps"
    if ema.ema_start_step < 0:
        yield f"ema_start_step is {ema.ema_start_step}: use 0 or more"
    if engine_shards:
        yield (
            f"ema_decay is {ema.ema_decay:g} and {engine_shards} is in use, which keeps weights and their updates in parts: "
            "leave ema_decay out, or train with plain processes (DDP)"
        )


def check_monitoring(monitoring: MonitoringArguments) -> Iterator[str]:
    if monitoring.profile_steps is not None:
        try:
            profiled_steps(monitoring.profile_steps)
        except ValueError as error:
            yield str(error)


def profiled_steps(text: str) -> tuple[int, int]:
    """First and last of the steps that ``profile_steps`` names, counted from 1.

    Raises:
        ValueError: it names none.
    """
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"profile_steps is {text!r}: it must be FIRST:LAST, two numbers of steps from 1 on, such as 5:7"
        )
    return first, last


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))
