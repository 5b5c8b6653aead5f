"""Answers to evaluation prompts beside their references, and how they developed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_sft.pages import Details, Panel, Panels, Text
from hf_sft.reports.runs import Run, generations
from hf_sft.reports.words import listed

_OPEN, _FOLDED, _STEPS = 8, 24, 6  # prompts to see, further ones, earlier answers to one
_FIELDS = {
    "step",
    "row",
    "split",
    "prompt",
    "reference",
    "answer",
    "tokens",
    "forwards",
    "stopped",
}  # the rest are scores
_EARLIER_LETTERS = 400

Key = tuple[str, int]  # data set, row


def answers_blocks(runs: Sequence[Run]) -> list[Any]:
    """The last generation evaluation of each run, side by side; empty where no prompt was answered."""
    answered = [(run, found) for run in runs if (found := generations(run))]
    if not answered:
        return []
    step = list(answered[0][1])[-1]
    keys = list(answered[0][1][step])
    prompts = [_prompt(key, answered, name_runs=len(runs) > 1) for key in keys[: _OPEN + _FOLDED]]
    when = listed(
        [f"step {list(found)[-1]:,}" + (f" of {run.name}" if len(runs) > 1 else "") for run, found in answered]
    )
    blocks: list[Any] = [Text(f"The last generation evaluation: {len(keys):,} prompts at {when}."), *prompts[:_OPEN]]
    if prompts[_OPEN:]:
        blocks.append(Details(f"{len(prompts) - _OPEN:,} more prompts", prompts[_OPEN:], printed=False))
    if (left_out := len(keys) - len(prompts)) > 0:
        blocks.append(Text(f"{left_out:,} more are in predictions.jsonl."))
    return blocks


def _prompt(key: Key, answered: Sequence[tuple[Run, Mapping[int, Mapping[Key, Any]]]], *, name_runs: bool) -> Panels:
    """One prompt: its text, the reference, and the answer of each run that was asked the same."""
    first = list(answered[0][1].values())[-1][key]
    reference = first.get("reference")
    panels = [_panel("Prompt", first.get("prompt")), _panel("Reference", reference)]
    earlier: list[Any] = []
    for run, found in answered:
        last = list(found.values())[-1].get(key)
        if last is None or last.get("reference") != reference:
            continue
        panels.append(_panel(f"Answer of {run.name}" if name_runs else "Answer", last.get("answer"), _scores(last)))
        earlier += _development(run, key, found, name_runs)
    split, row = key
    return Panels(f"Row {row:,}" + (f" of {split}" if split else ""), panels, earlier)


def _development(run: Run, key: Key, found: Mapping[int, Mapping[Key, Any]], name_runs: bool) -> Iterator[Details]:
    """Earlier answers to the same prompt: of many, some that are evenly spread."""
    steps = [step for step, rows in found.items() if key in rows][:-1]
    if not steps:
        return
    chosen = (
        steps if len(steps) <= _STEPS else [steps[round(n * (len(steps) - 1) / (_STEPS - 1))] for n in range(_STEPS)]
    )
    panels = [
        _panel(f"Step {step:,}", found[step][key].get("answer"), _scores(found[step][key]), _EARLIER_LETTERS)
        for step in chosen
    ]
    of_run = f" of {run.name}" if name_runs else ""
    earlier = f"{len(chosen)} earlier step{'s' * (len(chosen) > 1)}"
    yield Details(f"How the answer{of_run} developed: {earlier}", [Panels("", panels)], printed=False)


def stop_check_blocks(run: Run) -> list[Any]:
    """The answers after training that show whether the model stops."""
    answers = [each for each in run.stop_check.get("answers") or [] if isinstance(each, dict)]
    if not answers:
        return []
    prompts = [
        Panels("", [_panel("Prompt", each.get("prompt")), _panel("Answer", each.get("answer"), _scores(each))])
        for each in answers[:_OPEN]
    ]
    told = f"{run.stop_check.get('stopped', 0):,} of {run.stop_check.get('checked', len(answers)):,}"
    return [Details(f"After training: {told} answers ended by themselves", prompts, printed=False)]


def _panel(title: str, text: Any, note: str = "", most: int = 500) -> Panel:
    text = "" if text is None else str(text)
    return Panel(title, text.strip("\n") if text.strip() else "(empty)", note, most)


def _scores(record: Mapping[str, Any]) -> str:
    """45 tokens, ended by itself, rougeL 0.12, ..."""
    parts = []
    if isinstance(tokens := record.get("tokens"), int):
        forwards = record.get("forwards")
        several = isinstance(forwards, int) and 0 < forwards < tokens
        parts.append(f"{tokens:,} tokens" + (f" in {forwards:,} forwards" if several else ""))
    if "stopped" in record:
        parts.append("ended by itself" if record["stopped"] else "did not end")
    scores = {name: value for name, value in record.items() if name not in _FIELDS}
    parts += [f"{name} {round(value, 3):g}" for name, value in scores.items() if isinstance(value, (int, float))]
    return ", ".join(parts)
