"""The key figures of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

from hf_sft.reports.runs import Run
from hf_sft.reports.words import count, date, duration, figure, percent

Figure = tuple[str, str, str]  # its name, its value, a word on it

_ANSWERS = (  # scores of answers: name -> how it is called
    ("final_answer", "final answers right"), ("exact_match", "answers equal to the reference"), ("bleu", "BLEU"),
    ("chrf", "chrF"), ("rougeL", "ROUGE-L"), ("meteor", "METEOR"),
)  # fmt: skip


def title_line(run: Run) -> str:
    """Model, mode, task, steps, date, outcome."""
    task, objective = run.argument("task_type"), run.argument("objective")
    task = {"sft": "supervised fine-tuning", "dpo": "preference learning", "pretrain": "pretraining"}.get(
        str(task), task
    )
    parts = [
        model_name(run),
        {"full": "full fine-tuning of all weights", "lora": "LoRA", "qlora": "QLoRA"}.get(
            str(run.argument("train_mode"))
        ),
        task if objective in (None, "causal") or not task else f"{task} with objective {objective}",
        steps_of(run),
        _date(run),
        run.outcome,
    ]
    return ", ".join(str(part) for part in parts if part)


def model_name(run: Run) -> str | None:
    name = run.argument("model_name_or_path") or run.argument("config_name_or_path")
    if name is None:
        return None
    name = str(name).rstrip("/\\")
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    return name.replace("\\", "/").rsplit("/", 1)[-1] if local else name


def steps_of(run: Run) -> str:
    planned = run.planned_steps
    if planned is not None and run.last_step != planned:
        return f"{run.last_step:,} of {planned:,} steps"
    return f"{run.last_step:,} steps"


def _times(run: Run) -> list[float]:
    """Seconds since 1970 of the lines of the log, where it has them."""
    return [float(line["time"]) for line in run.log if isinstance(line.get("time"), (int, float))]


def _date(run: Run) -> str:
    times = _times(run)
    return date(times[0]) if times else ""


def lowest(run: Run, key: str) -> tuple[int, float] | None:
    """(step, value) of the lowest finite value."""
    points = [(step, value) for step, value in run.points(key).items() if math.isfinite(value)]
    return min(points, key=lambda point: point[1]) if points else None


def key_figures(run: Run) -> list[Figure]:
    """What there is to know first."""
    return [*_losses(run), *_preferences(run), *_answers(run), *_effort(run)]


def _losses(run: Run) -> Iterator[Figure]:
    evaluated, best = final_value(run, "loss"), lowest(run, "eval_loss")
    if evaluated is not None:
        measured = run.points("eval_loss")
        word = f"lowest: {figure(best[1])} at step {best[0]:,}" if best and len(measured) > 1 else ""
        if word and best and best[0] == max(measured) and best[1] == evaluated:
            word = f"the lowest of {len(measured):,}"
        yield "evaluation loss", figure(evaluated), word
    if (perplexity := final_value(run, "perplexity")) is not None:
        yield "perplexity", figure(perplexity), "of evaluation tokens"
    if (accuracy := final_value(run, "token_accuracy")) is not None:
        yield "token accuracy", percent(accuracy), "of evaluation tokens"
    if (masked := final_value(run, "masked_loss")) is not None:
        yield "masked loss", figure(masked), "in evaluation"
    if points := run.points("loss"):
        first, last = (list(points.values())[place] for place in (0, -1))
        yield "training loss", figure(last), f"{figure(first)} at step {min(points):,}" if len(points) > 1 else ""


def final_value(run: Run, name: str) -> float | None:
    """Of the last evaluation: that of the final model, where there is one."""
    if name in run.final:
        return run.final[name]
    return next(reversed(run.points(f"eval_{name}").values()), None)


def _preferences(run: Run) -> Iterator[Figure]:
    if (share := final_value(run, "rewards/accuracies")) is not None:
        low, high = (final_value(run, f"rewards/accuracies_{end}") for end in ("low", "high"))
        word = "" if low is None or high is None else f"{100 * low:.0f} to {100 * high:.0f} % (95 % interval)"
        yield "chosen answer preferred", percent(share), word
    if (margin := final_value(run, "rewards/margins")) is not None:
        yield "reward margin", figure(margin), "in evaluation"


def _answers(run: Run) -> Iterator[Figure]:
    for name, called in _ANSWERS:
        if (value := final_value(run, name)) is not None:
            share = name in ("final_answer", "exact_match")
            yield called, percent(value) if share else f"{value:.2f}", ""
    if (forwards := final_value(run, "tokens_per_forward")) is not None and forwards > 1.0005:
        yield "tokens per forward", figure(forwards), ""
    if checked := run.stop_check.get("checked"):
        yield (
            "answers that ended by themselves",
            f"{run.stop_check.get('stopped', 0):,} of {checked:,}",
            "after training",
        )
    elif (stopped := final_value(run, "stopped")) is not None:
        yield "answers that ended by themselves", percent(stopped), ""


def _effort(run: Run) -> Iterator[Figure]:
    epoch = run.log[-1].get("epoch") if run.log else None
    yield (
        "steps",
        f"{run.last_step:,}",
        f"{epoch:.3g} epoch{'' if epoch == 1 else 's'}" if isinstance(epoch, (int, float)) else "",
    )
    if (tokens := tokens_seen(run)) is not None:
        yield "tokens seen", count(tokens), ""
    speeds = [value for value in run.points("tokens_per_second").values() if math.isfinite(value)]
    if speeds:
        yield "tokens per second", count(statistics.median(speeds)), "median"
    if (used := _last(run, "mfu")) is not None:
        yield "MFU", percent(used), "of the device's peak"
    if memory := run.points("memory_gib"):
        yield "peak memory", f"{max(memory.values()):.3g} GiB", ""
    if (seconds := wall_time(run)) is not None:
        yield "training time", duration(seconds), "since it was resumed" if _was_resumed(run) else ""


def _last(run: Run, key: str) -> float | None:
    return next(reversed(run.points(key).values()), None)


def tokens_seen(run: Run) -> float | None:
    """Tokens of an epoch times epochs; None where the length of an epoch is not known."""
    packing: dict[str, Any] = (run.data.get("packing") or {}).get("train") or {}
    tokens = packing.get("tokens") or (run.data.get("train") or {}).get("tokens")
    epoch = run.log[-1].get("epoch") if run.log else None
    return tokens * epoch if tokens and isinstance(epoch, (int, float)) else None


def _was_resumed(run: Run) -> bool:
    """Whether the log is older than the training that the last summary measured."""
    times, ended, runtime = _times(run), run.summary.get("time"), run.summary.get("train_runtime")
    return bool(times) and ended is not None and runtime is not None and times[0] < ended - runtime - 1.0


def wall_time(run: Run) -> float | None:
    """Seconds: what Trainer measured, unless the run was interrupted; then from the first line of the log to the last."""
    times = _times(run)
    measured = run.summary.get("train_runtime")
    return float(measured) if measured is not None else max(times) - min(times) if len(times) > 1 else None
