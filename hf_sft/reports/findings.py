"""What needs attention in a run. A check is sure of what it says, or says nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from hf_sft.inspection.findings import SEVERITIES, of
from hf_sft.pages import Notice
from hf_sft.reports.figures import lowest, steps_of
from hf_sft.reports.runs import Run, generations
from hf_sft.reports.words import figure, listed

_RISE = 0.02  # of the lowest evaluation loss: more is no noise
_MANY_LOST = 0.1  # of the records
_FEW_LINES = 8  # of the log: fewer say nothing about the course of a loss


def find_problems(run: Run) -> list[Notice]:
    """Everything that was found, the worst first."""
    found = [notice for check in _CHECKS for notice in check(run)]
    return sorted(found, key=lambda notice: SEVERITIES.index(notice.severity))


def _stopping(run: Run) -> Iterator[Notice]:
    checked, stopped = run.stop_check.get("checked") or 0, run.stop_check.get("stopped") or 0
    limit, when = run.stop_check.get("max_new_tokens"), "after training"
    if not checked and (answered := generations(run)):
        step, rows = list(answered.items())[-1]
        checked, stopped = len(rows), sum(bool(each.get("stopped")) for each in rows.values())
        limit, when = run.argument("generation_max_new_tokens"), f"at step {step:,}"
    if not checked or 2 * stopped >= checked:
        return
    within = f" within {limit:,} tokens" if isinstance(limit, int) else ""
    yield Notice(
        "warning" if stopped else "error",
        f"{stopped:,} of {checked:,} answers ended by themselves{within} ({when})"
        + ("." if stopped else ": the model does not stop."),
        "Look whether the end of turn is learned (hf-sft inspect says so), whether answers fit into this limit, and whether "
        "the model was trained long enough.",
    )


def _divergence(run: Run) -> Iterator[Notice]:
    losses = run.points("loss")
    do = "Lower learning_rate, raise warmup_steps or set max_grad_norm; begin in a new output_dir or before that step."
    if (step := run.diverged_at) is not None:
        yield Notice("error", f"Training has diverged: the loss is {figure(losses[step])} at step {step:,}.", do)
        return
    if run.jump is not None:
        step, loss, middle = run.jump
        severity = "error" if run.outcome == "diverged" else "warning"
        before = f"the median of the lines before is {figure(middle)}"
        yield Notice(severity, f"The loss jumped to {figure(loss)} at step {step:,}; {before}.", do)
    wrong = [step for step, norm in run.points("grad_norm").items() if not math.isfinite(norm)]
    if wrong:
        where = f"{len(wrong):,} line{'s' * (len(wrong) > 1)} of the log, first at step {wrong[0]:,}"
        scaled = bool(run.argument("fp16"))
        yield Notice(
            "note" if scaled else "warning",
            f"The gradient norm is not finite in {where}.",
            "fp16 skips such steps while it looks for its scale."
            if scaled
            else "Lower learning_rate, or look at these rows.",
        )


def _overfitting(run: Run) -> Iterator[Notice]:
    points, best = run.points("eval_loss"), lowest(run, "eval_loss")
    if best is None or best[1] <= 0:
        return
    after = [value for step, value in points.items() if step > best[0]]
    if len(after) < 2 or min(after[-2:]) <= best[1] * (1 + _RISE):
        return
    if best[0] == 0:
        yield Notice(
            "warning",
            f"The evaluation loss has not fallen: {figure(best[1])} before the training, {figure(after[-1])} at step "
            f"{max(points):,}.",
            "Lower learning_rate, and look whether the evaluation data are of the same kind as the training data.",
        )
        return
    kept = bool((run.arguments.get("training") or {}).get("load_best_model_at_end"))
    yield Notice(
        "note" if kept else "warning",
        f"The evaluation loss was lowest at step {best[0]:,} ({figure(best[1])}) and is {figure(after[-1])} at step "
        f"{max(points):,}: later steps may have fitted the training rows more than the task."
        + (" The model of the best evaluation is the one that was kept." if kept else ""),
        "" if kept else "Train for fewer steps, with a lower learning_rate, or set load_best_model_at_end.",
    )


def _no_progress(run: Run) -> Iterator[Notice]:
    losses = list(run.points("loss").values())
    part = len(losses) // 4
    if len(losses) < _FEW_LINES or not all(map(math.isfinite, losses)):
        return
    begin, end = (sum(each) / part for each in (losses[:part], losses[-part:]))
    if end >= begin:
        yield Notice(
            "warning",
            f"The training loss has not fallen: {figure(begin)} in the first quarter of the log, {figure(end)} in the last.",
            "Look at learning_rate, and with hf-sft inspect at what is learned.",
        )


def _left_out(run: Run) -> Iterator[Notice]:
    for split in ("train", "eval"):
        report = run.data.get(split)
        if not isinstance(report, dict) or not report.get("records"):
            continue
        dropped, bad = report.get("dropped") or {}, (report.get("bad") or {}).get("count") or 0
        reasons = {
            "longer than max_seq_length": dropped.get("overlength") or 0,
            "nothing to learn in them": dropped.get("no_supervised_token") or 0,
            "they cannot be used": bad,
        }
        lost = {reason: number for reason, number in reasons.items() if number}
        if lost:
            many = sum(lost.values()) > _MANY_LOST * report["records"]
            why = next(iter(lost)) if len(lost) == 1 else listed([f"{why}: {n:,}" for why, n in lost.items()])
            yield Notice(
                "warning" if many or bad else "note",
                f"{split}: {of(sum(lost.values()), report['records'], 'records')} were left out ({why}).",
                "Raise max_seq_length, or set overlength to truncate (raw texts: split)."
                if dropped.get("overlength") and many
                else "",
            )


def _result(run: Run) -> Iterator[Notice]:
    """What the result is, where it is not the weights of the last step."""
    training = run.arguments.get("training") or {}
    best = str(run.state.get("best_model_checkpoint") or "")
    if run.summary and training.get("load_best_model_at_end") and best:
        metric, value = training.get("metric_for_best_model") or "loss", run.state.get("best_metric")
        shown = f" ({figure(value)})" if isinstance(value, (int, float)) else ""
        yield Notice(
            "note", f"The result is {Path(best).name}, the best by {metric}{shown}; later steps are not in it."
        )
    if (decay := run.argument("ema_decay")) is not None:
        yield Notice("note", f"Evaluations and the result are of the average of the weights (ema_decay {decay:g}).")


def _ending(run: Run) -> Iterator[Notice]:
    if run.failure:
        yield Notice("error", f"The run ended with an error after {steps_of(run)}: {run.failure}")
    elif run.outcome == "not finished" and run.log:
        yield Notice(
            "note",
            f"The log ends after {steps_of(run)}, and the training has not ended there: it is going on, or was interrupted.",
            "Resume it with --resume_from_checkpoint auto." if run.arguments else "",
        )
    for remark in run.remarks:
        yield Notice("note", remark)


_CHECKS: tuple[Callable[[Run], Iterator[Notice]], ...] = (
    _stopping, _divergence, _overfitting, _no_progress, _left_out, _result, _ending,
)  # fmt: skip
