"""Which of the logged values are drawn together, and how."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hf_sft.pages import Lines, Series
from hf_sft.reports.runs import Run

_UNCHARTED = ("epoch", "step", "time", "total_flos", "num_input_tokens_seen")
_UNCHARTED_ENDS = ("_runtime", "_per_second", "supervised_tokens", "_pairs", "_samples")
_RATIO = "eval_masked_loss_at_"
_WIDE = 50.0  # largest / smallest value from which the axis is logarithmic


@dataclass(frozen=True)
class Chart:
    """Values that are drawn together: (key, name) each; ``log``: on a logarithmic axis where they lie far apart."""

    title: str
    lines: tuple[tuple[str, str], ...]
    log: bool = False


_TRAINED, _EVALUATED = "training", "evaluation"
CHARTS: dict[str, tuple[Chart, ...]] = {"Loss": (
    Chart("Loss (nats)", (("loss", _TRAINED), ("eval_loss", _EVALUATED)), log=True),
    Chart("Masked and next-token loss, training", (("masked_loss", "masked"), ("next_token_loss", "next token")), log=True),
    Chart(
        "Masked loss, evaluation",
        (("eval_masked_loss", "mean over shares of masked tokens"), ("eval_any_order_bound", "any-order bound")),
    ),
    Chart("Perplexity, evaluation", (("eval_perplexity", _EVALUATED),), log=True),
    Chart(
        "Token accuracy",
        (
            ("token_accuracy", _TRAINED), ("eval_token_accuracy", _EVALUATED), ("masked_accuracy", "masked, training"),
            ("eval_masked_accuracy", "masked, evaluation"),
        ),
    ),
), "Preferences": (
    Chart(
        "Rewards, evaluation",
        (
            ("eval_rewards/chosen", "chosen"), ("eval_rewards/rejected", "rejected"),
            ("eval_rewards/margins", "margin"),
        ),
    ),
    Chart("Rewards, training", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ("rewards/margins", "margin"))),
    Chart(
        "Pairs whose chosen answer has the larger reward",
        (
            ("rewards/accuracies", _TRAINED), ("eval_rewards/accuracies", _EVALUATED),
            ("eval_rewards/accuracies_low", "95 % interval, low"), ("eval_rewards/accuracies_high", "95 % interval, high"),
        ),
    ),
    Chart(
        "Log-probability of an answer",
        (
            ("logps/chosen", "chosen, training"), ("logps/rejected", "rejected, training"),
            ("eval_logps/chosen", "chosen, evaluation"), ("eval_logps/rejected", "rejected, evaluation"),
        ),
    ),
    Chart("Loss of the chosen answers", (("chosen_loss", _TRAINED), ("eval_chosen_loss", _EVALUATED))),
), "Answers to evaluation prompts": (
    Chart("Answers that are right (share)", (("eval_final_answer", "final answer"), ("eval_exact_match", "exact match"))),
    Chart("BLEU and chrF (0 to 100)", (("eval_bleu", "BLEU"), ("eval_chrf", "chrF"))),
    Chart(
        "ROUGE and METEOR (0 to 1)",
        (("eval_rouge1", "ROUGE-1"), ("eval_rouge2", "ROUGE-2"), ("eval_rougeL", "ROUGE-L"), ("eval_meteor", "METEOR")),
    ),
    Chart(
        "Edit distance to the reference (0 is equal)",
        (("eval_edit_chars", "characters"), ("eval_edit_words", "words")),
    ),
    Chart("Answers that ended by themselves (share)", (("eval_stopped", "stopped"),)),
    Chart("Tokens of an answer (mean)", (("eval_answer_tokens", "tokens"),)),
    Chart("Tokens per forward", (("eval_tokens_per_forward", "tokens"),)),
), "Training": (
    Chart("Learning rate", (("learning_rate", "learning rate"),)),
    Chart("Gradient norm", (("grad_norm", "gradient norm"),), log=True),
    Chart("Tokens per second", (("tokens_per_second", "tokens per second"),)),
    Chart("Memory, peak (GiB)", (("memory_gib", "GiB"),)),
    Chart("Model FLOPs utilisation (share)", (("mfu", "MFU"),)),
    Chart("Supervised share of tokens", (("supervised_share", _TRAINED),)),
    Chart("Router loss", (("router_loss", _TRAINED),)),
)}  # fmt: skip
MORE = "More charts"  # the group of what is folded up
_LATER = {  # what is
    "Router loss", "Supervised share of tokens", "Log-probability of an answer", "Tokens per forward",
    "Loss of the chosen answers",
}  # fmt: skip
_OVERLAID = {  # of several runs these are not
    "loss", "eval_loss", "masked_loss", "next_token_loss", "eval_masked_loss", "eval_token_accuracy",
    "eval_rewards/margins", "eval_rewards/accuracies", "eval_final_answer", "eval_chrf", "eval_rougeL", "eval_stopped",
    "learning_rate", "grad_norm", "tokens_per_second", "memory_gib",
}  # fmt: skip
_ALONE = {  # titles of charts of several runs, where the title of the group and the name in it say too much
    "loss": "Training loss", "eval_loss": "Evaluation loss", "masked_loss": "Masked loss, training",
    "next_token_loss": "Next-token loss, training", "eval_masked_loss": "Masked loss, evaluation",
    "eval_any_order_bound": "Any-order bound, evaluation", "eval_final_answer": "Final answers that are right (share)",
    "eval_exact_match": "Answers equal to the reference (share)", "eval_bleu": "BLEU", "eval_chrf": "chrF",
    "eval_rouge1": "ROUGE-1", "eval_rouge2": "ROUGE-2", "eval_rougeL": "ROUGE-L", "eval_meteor": "METEOR",
    "eval_edit_chars": "Edit distance, characters", "eval_edit_words": "Edit distance, words",
}  # fmt: skip
_KNOWN = {key for group in CHARTS.values() for chart in group for key, _ in chart.lines}


def charts_of(runs: Sequence[Run]) -> dict[str, list[Lines]]:
    """Group -> its charts, the last group ``MORE``: of one run related values in one chart, of several runs a value in each."""
    found: dict[str, list[Lines]] = {**{name: [] for name in CHARTS}, MORE: []}
    for group, charts in CHARTS.items():
        for chart in charts:
            if len(runs) == 1:
                found[MORE if chart.title in _LATER else group] += _one(runs[0], chart)
            else:
                for key, name in chart.lines:
                    found[group if key in _OVERLAID else MORE] += _several(runs, chart, key, name)
            if chart.title.startswith("Masked loss"):
                found[group] += _by_ratio(runs)
    for key in dict.fromkeys(key for run in runs for key in run.logged() if _is_other(key)):
        found[MORE] += _several(runs, Chart(key, ((key, key),)), key, key)
    return {group: lines for group, lines in found.items() if lines}


def _is_other(key: str) -> bool:
    return not (key in _KNOWN or key in _UNCHARTED or key.endswith(_UNCHARTED_ENDS) or "masked_loss_at_" in key
                or "masked_accuracy_at_" in key)  # fmt: skip


def _one(run: Run, chart: Chart) -> Iterator[Lines]:
    series = [_series(run, key, name) for key, name in chart.lines]
    yield from _drawn(chart.title, [each for each in series if each is not None], run.last_step, chart.log)


def _several(runs: Sequence[Run], chart: Chart, key: str, name: str) -> Iterator[Lines]:
    """One value of all runs; a run has the same colour in all charts."""
    title = _ALONE.get(key) or (chart.title if len(chart.lines) == 1 else f"{chart.title}, {name}")
    series = [_series(run, key, run.name) or Series(run.name, [], []) for run in runs]
    yield from _drawn(title, series, max(run.last_step for run in runs), chart.log)


def _series(run: Run, key: str, name: str) -> Series | None:
    points = run.points(key)
    dots = key.startswith("eval_")
    return Series(name, list(points), list(points.values()), dots=dots) if points else None


def _drawn(title: str, series: list[Series], span: float, log: bool) -> Iterator[Lines]:
    """A chart, if there is more in it than one point."""
    if max((len(each.xs) for each in series), default=0) > 1:
        drawn = [y for each in series for y in each.ys if math.isfinite(y)]
        last = max((x for each in series for x in each.xs), default=0)
        yield Lines(title, series, log=log and _is_wide(drawn), span=(0, max(last, span)))


def _is_wide(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > _WIDE


def _by_ratio(runs: Sequence[Run]) -> Iterator[Lines]:
    """The masked loss by the share of tokens that are masked, where decoding begins (1.0) and goes on: of one run at its first
    and last evaluation, of several at the last."""
    series: list[Series] = []
    for run in runs:
        lines = [line for line in run.log if any(key.startswith(_RATIO) for key in line)]
        shown = lines[-1:] if len(runs) > 1 else lines[:: max(1, len(lines) - 1)][:2]
        for line in shown:
            points = sorted(
                (float(key.removeprefix(_RATIO)), value) for key, value in line.items() if key.startswith(_RATIO)
            )
            name = run.name if len(runs) > 1 else f"step {line['step']:,}"
            series.append(Series(name, [ratio for ratio, _ in points], [loss for _, loss in points], dots=True))
        if not shown and len(runs) > 1:
            series.append(Series(run.name, [], []))
    if any(each.xs for each in series):
        yield Lines("Masked loss by the share of masked tokens", series, x_label="share of masked tokens", whole=False)
