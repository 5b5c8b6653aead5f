"""The files of a run as plain values. What is missing is empty; what is damaged is an error that names its place."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_sft.checkpoints.folders import LOG, PREDICTIONS, STOP_CHECK
from hf_sft.checkpoints.record import DEFAULTS
from hf_sft.jumps import LINES, jumped

STATE, ARGUMENTS = "trainer_state.json", "args.json"
_SIGNS = (LOG, STATE, ARGUMENTS)  # one of them is in every run's folder
_NOT_FINITE = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf}
_SUMMARY = "train_runtime"  # in the line that ends a training

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        name: of its folder; among several runs, unique.
        arguments: args.json: groups of plain values, and versions.
        data: data_report.json.
        state: trainer_state.json without its log.
        log: lines of training and evaluation, each step once, in their order.
        summary: the line that ended the training; empty: it has not ended, or not by itself.
        final: the evaluation of the final model, names without ``eval_``.
        predictions: answers to evaluation prompts, as predictions.jsonl has them.
        stop_check: stop_check.json.
        failure: the error that ended the run, behind which nothing was logged.
        remarks: what was left out while reading.
    """

    name: str
    folder: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    log: tuple[Line, ...] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    predictions: tuple[dict[str, Any], ...] = ()
    stop_check: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    remarks: tuple[str, ...] = ()

    def argument(self, name: str, default: Any = None) -> Any:
        """A value from whichever group has it, as it was given."""
        groups = (group for key, group in self.arguments.items() if key != "versions" and isinstance(group, Mapping))
        return next((group[name] for group in groups if group.get(name) is not None), default)

    def points(self, key: str) -> dict[int, float]:
        """Step -> the value that was logged there first under ``key``."""
        found: dict[int, float] = {}
        for line in self.log:
            if isinstance(value := line.get(key), (int, float)) and not isinstance(value, bool):
                found.setdefault(int(line["step"]), float(value))
        return found

    def logged(self) -> list[str]:
        """Everything that was logged as a number, in the order of its first appearance."""
        return list(dict.fromkeys(key for line in self.log for key, value in line.items() if _is_number(value)))

    @property
    def last_step(self) -> int:
        steps = [int(line["step"]) for line in (*self.log, self.summary) if "step" in line]
        return max(steps, default=int(self.state.get("global_step") or 0))

    @property
    def planned_steps(self) -> int | None:
        planned = self.argument("last_step") or self.state.get("max_steps")
        return int(planned) if planned and planned > 0 else None

    @property
    def diverged_at(self) -> int | None:
        """The first step whose loss is not finite."""
        return next((step for step, loss in self.points("loss").items() if not math.isfinite(loss)), None)

    @property
    def jump(self) -> tuple[int, float, float] | None:
        """The first step whose loss jumped (``jumps.jumped``), that loss, and the median of the lines before."""
        points = [(step, loss) for step, loss in self.points("loss").items() if math.isfinite(loss)]
        for place, (step, loss) in enumerate(points):
            middle = jumped(loss, [earlier for _, earlier in points[max(0, place - LINES) : place]])
            if middle is not None:
                return step, loss, middle
        return None

    @property
    def outcome(self) -> str:
        if self.failure and "diverged" not in self.failure:
            return "failed"
        if self.failure or self.diverged_at is not None:
            return "diverged"
        if not self.summary:  # a run with stop_on_divergence ends at the line that jumps
            return "diverged" if self.jump is not None and self.jump[0] == self.last_step else "not finished"
        early = self.planned_steps is not None and self.last_step < self.planned_steps
        return "stopped early" if early else "finished"


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """The runs in these folders, with names that tell them apart.

    Raises:
        ValueError: a folder that is none or holds no run, one that is named twice, a file that cannot be read.
    """
    paths = [Path(folder) for folder in folders]
    seen: dict[Path, Path] = {}
    for path in paths:
        _check_folder(path)
        if (real := path.resolve()) in seen:
            raise ValueError(f"{path} is named twice (also as {seen[real]}): name each run once")
        seen[real] = path
    return [read_run(path, name) for path, name in zip(paths, _names(list(seen)), strict=True)]


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} is {'a file' if path.exists() else 'not there'}: name the output_dir of a run")
    if not any((path / name).is_file() for name in _SIGNS):
        inside = sorted(each.name for each in path.iterdir() if any((each / name).is_file() for name in _SIGNS))
        shown = ", ".join(inside[:8]) + (f" and {len(inside) - 8} more" if len(inside) > 8 else "")
        hint = f"; runs in it: {shown}" if inside else ": name the output_dir of a run"
        raise ValueError(f"{path} is no run: it has none of {', '.join(_SIGNS)}{hint}")


def _names(paths: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells it from the others."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("paths that differ have names that differ")


def read_run(folder: str | os.PathLike[str], name: str | None = None) -> Run:
    """What the files in ``folder`` say; a file that is missing says nothing.

    Raises:
        ValueError: a file that cannot be read: its name, its line.
    """
    path, remarks = Path(folder), list[str]()
    state = _object(path / STATE)
    history = [_finite(line) for line in state.pop("log_history", []) if isinstance(line, dict)]
    lines = _lines(path / LOG, remarks) if (path / LOG).is_file() else history
    arguments = _object(path / ARGUMENTS)
    log, summary, final = _settled(
        lines, best_at_end=bool((arguments.get("training") or {}).get("load_best_model_at_end"))
    )
    results = _finite(_object(path / "eval_results.json"))
    if not final and results and results.get("epoch") == state.get("epoch"):
        final = results
        if log and not (arguments.get("training") or {}).get("load_best_model_at_end"):
            log.append({"step": state.get("global_step", log[-1]["step"]), **results})
    return Run(
        name=name or path.resolve().name or str(path),
        folder=path,
        arguments=arguments,
        data=_object(path / "data_report.json"),
        state=state,
        log=tuple(log),
        summary=summary,
        final={key.removeprefix("eval_"): value for key, value in final.items() if key.startswith("eval_")},
        predictions=tuple(_lines(path / PREDICTIONS, remarks)),
        stop_check=_object(path / STOP_CHECK),
        failure=str(lines[-1].get("error", "")) if lines else "",
        remarks=tuple(remarks),
    )


def _settled(lines: Sequence[Line], *, best_at_end: bool) -> tuple[list[Line], Line, Line]:
    """(the log without what a resumed run did again, the line that ended the training, the evaluation behind it).

    Args:
        best_at_end: what is evaluated behind the end is another model than that of the last step.
    """
    log: list[Line] = []
    summary: Line = {}
    final: Line = {}
    for line in lines:
        if not isinstance(line.get("step"), int):
            continue
        while log and log[-1]["step"] > line["step"]:  # done again by a run that went on from an earlier step
            log.pop()
            summary, final = {}, {}
        if _SUMMARY in line:
            summary, final = line, {}
            continue
        if "loss" in line:
            summary, final = {}, {}
            if log and log[-1]["step"] == line["step"] and "loss" in log[-1]:
                log.pop()
        elif summary and any(key.startswith("eval_") for key in line):
            final = line
            if best_at_end:
                continue
        log.append(line)
    return log, summary, final


# ---- files ----


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, is no JSON ({error.msg}): mend it, or take it away") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): mend it, or take it away") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a {type(value).__name__}, and a JSON object is wanted: mend it, or take it away"
        )
    return value


def _lines(path: Path, remarks: list[str]) -> list[Line]:
    """The JSON objects in the lines of a file; a last line that is cut off is left out and remarked upon."""
    if not path.is_file():
        return []
    try:
        texts = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): mend it, or take it away") from None
    found = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError("no JSON object")
        except ValueError as error:  # of JSON, and of UTF-8
            if number == len(texts):  # without a line break at its end
                remarks.append(f"The last line of {path.name} is cut off, as a kill leaves it, and is left out.")
                continue
            reason = getattr(error, "msg", None) or error
            raise ValueError(f"{path}, line {number}, is damaged ({reason}): mend it, or take the file away") from None
        found.append(_finite(value))
    return found


def _finite(line: Mapping[str, Any]) -> Line:
    """ "NaN", "inf" and "-inf", which JSON has no numbers for, as numbers."""
    return {key: _NOT_FINITE.get(value, value) if isinstance(value, str) and key not in _TEXTS else value
            for key, value in line.items()}  # fmt: skip


_TEXTS = ("prompt", "reference", "answer")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def generations(run: Run) -> dict[int, dict[tuple[str, int], dict[str, Any]]]:
    """Step -> the answers of that generation evaluation by (data set, row); of rows that were answered twice, the later."""
    found: dict[int, dict[tuple[str, int], dict[str, Any]]] = {}
    for each in run.predictions:
        if isinstance(each.get("step"), int) and isinstance(each.get("row"), int):
            found.setdefault(each["step"], {})[str(each.get("split") or ""), each["row"]] = each
    return {step: dict(sorted(rows.items())) for step, rows in sorted(found.items())}


def flat_arguments(run: Run) -> Iterator[tuple[str, str, Any]]:
    """(group, name, value) of everything in args.json but the defaults."""
    for group, values in run.arguments.items():
        if isinstance(values, Mapping) and group != DEFAULTS:
            yield from ((group, str(name), value) for name, value in values.items())
