"""Watching a run: progress on the terminal, ``log.jsonl``, and evaluations within an epoch."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import has_length

from hf_sft.arguments import MonitoringArguments
from hf_sft.checkpoints.folders import LOG, PREDICTIONS, STOP_CHECK
from hf_sft.data.cache import write_file
from hf_sft.evaluation_checks import profiled_steps
from hf_sft.training.profiling import ProfileSteps

logger = logging.getLogger(__name__)

_LONGEST = 100  # letters of a value on the terminal


def install_monitoring(trainer: Trainer, monitoring: MonitoringArguments) -> None:
    """Give ``trainer`` the callbacks of this module; transformers' own bar or printer goes, a user's stays.

    Raises:
        ValueError: ``profile_steps`` names no steps.
    """
    callbacks = trainer.callback_handler.callbacks
    ours: dict[type, type[TrainerCallback]] = {ProgressCallback: ProgressBars, PrinterCallback: LinePrinter}
    callbacks[:] = [ours[type(each)]() if type(each) in ours else each for each in callbacks]
    trainer.add_callback(JSONLog())
    if monitoring.profile_steps is not None:
        trainer.add_callback(ProfileSteps(*profiled_steps(monitoring.profile_steps)))


# ---- the terminal ----


def progress_bar(total: int | None, what: str, args: Any, **how: Any) -> tqdm:
    """A bar on a terminal, in the main process, unless ``disable_tqdm`` is set; elsewhere one that shows nothing."""
    silent = args.disable_tqdm or args.process_index != 0
    return tqdm(total=total, desc=what, dynamic_ncols=True, disable=True if silent else None, **how)


def log_line(logs: Mapping[str, Any], state: Any, seconds_left: float | None = None) -> str:
    """A line of the log as words ``name=value``, with few digits."""
    words: dict[str, Any] = {"step": f"{state.global_step}/{state.max_steps}"}
    words |= {name: _short(value) for name, value in logs.items() if name not in ("step", "total_flos")}
    if seconds_left is not None:
        words["left"] = timedelta(seconds=round(seconds_left))
    return " ".join(f"{name}={value}" for name, value in words.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class _Clock:
    """Estimates the time that a training still takes, evaluations and checkpoints included."""

    def __init__(self) -> None:
        self.began, self.step = time.perf_counter(), 0

    def begin(self, step: int) -> None:
        self.began, self.step = time.perf_counter(), step

    def left(self, state: Any) -> float | None:
        """Seconds; None before the first step and at the end."""
        done, rest = state.global_step - self.step, state.max_steps - state.global_step
        return (time.perf_counter() - self.began) / done * rest if done > 0 and rest > 0 else None


class LinePrinter(PrinterCallback):
    """Prints the lines of the log, from the main process."""

    def __init__(self) -> None:
        self._clock = _Clock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.begin(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            print(log_line(logs, state, self._clock.left(state) if "loss" in logs else None), flush=True)


class ProgressBars(ProgressCallback):
    """Bars for training (with loss, tokens per second and time left) and evaluation, and the lines of the log between them."""

    training_bar: tqdm | None
    prediction_bar: tqdm | None

    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.begin(state.global_step)
        self.current_step = state.global_step
        if state.is_world_process_zero:
            # What was done before a resume does not count in the time left.
            how = {"initial": state.global_step, "unit": "step"}
            self.training_bar = progress_bar(state.max_steps, "training", args, **how)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.prediction_bar is None:
                how = {"leave": self.training_bar is None, "unit": "batch"}
                self.prediction_bar = progress_bar(len(eval_dataloader), "evaluation", args, **how)
            self.prediction_bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        of_training = "loss" in logs
        self.training_bar.write(log_line(logs, state, self._clock.left(state) if of_training else None))
        if of_training:
            speed = f", {logs['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in logs else ""
            self.training_bar.set_postfix_str(f"loss {_short(logs['loss'])}{speed}")


# ---- how a run has ended ----


def note_failure(folder: str | os.PathLike[str], step: int, error: Exception) -> None:
    """Write what ended a run behind its log, for the report."""
    file = Path(folder) / LOG
    if file.is_file():
        line = {"time": time.time(), "step": step, "error": str(error)}
        with suppress(OSError), file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line, ensure_ascii=False) + "\n")


def keep_report(folder: str | os.PathLike[str]) -> Path | None:
    """Write the report of the run in ``folder``; None, with a warning, where that fails: a page must not cost a training."""
    try:
        from hf_sft.reports import write_report

        return write_report(folder)
    except Exception as error:
        logger.warning("no report is written: %s: %s", type(error).__name__, error)
        return None


# ---- log.jsonl ----


class JSONLog(TrainerCallback):
    """Writes each line of the log to ``log.jsonl`` at once, as ``{"time": seconds since 1970, "step", "epoch", ...}``.

    A run that goes on keeps the lines that its checkpoint knows, and the answers up to its step. One that begins gives these
    files of an earlier run in the same folder other names.
    """

    def __init__(self) -> None:
        self.path: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG
        if state.global_step:
            known = sum(line.get("step") == state.global_step for line in state.log_history)
            drop_later_lines(self.path, state.global_step, known)
            drop_later_lines(folder / PREDICTIONS, state.global_step)
            (folder / STOP_CHECK).unlink(missing_ok=True)  # of a model that is trained on; made again at the end
        else:
            for name in (LOG, PREDICTIONS, STOP_CHECK):
                _set_aside(folder / name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.path is None:
            return
        line = {**(logs or {}), **(state.log_history[-1] if state.log_history else {})}  # other callbacks change logs
        first = {"time": time.time(), "step": state.global_step, "epoch": line.get("epoch")}
        values = {name: _as_json(value) for name, value in {**first, **line}.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")


def _as_json(value: Any) -> Any:
    """Numbers as they are; what is not finite, which JSON has no number for, as "NaN", "inf" or "-inf"."""
    if hasattr(value, "item"):
        with suppress(ValueError, RuntimeError):  # more than one number
            value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, float, str, list, dict)) else str(value)


def drop_later_lines(path: str | os.PathLike[str], step: int, known: int | None = None) -> None:
    """Keep the lines of a JSON-lines file up to ``step``; those that cannot be read, as a kill leaves one, go.

    Args:
        path: each line an object with a ``step``; may be missing.
        known: keep so many lines of ``step`` itself, the first ones; by default all.
    """
    file = Path(path)
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8", errors="replace")
    kept, at_step = [], 0
    for line in text.split("\n"):  # JSON may hold what else ends a line
        number = _step_of(line)
        if number is None or number > step:
            continue
        at_step += number == step
        if known is None or number < step or at_step <= known:
            kept.append(f"{line}\n")
    if (whole := "".join(kept)) != text:
        write_file(file, whole)


def _step_of(line: str) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _set_aside(path: Path) -> None:
    if not path.is_file() or not path.stat().st_size:
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.replace(aside)
    logger.info("%s is of an earlier run: now %s", path, aside.name)


# ---- evaluation ----


class EvaluateWithinEpochs(TrainerCallback):
    """With ``eval_strategy`` epoch: evaluate ``times`` per epoch, at the steps that end its equal parts.

    Nothing is remembered between steps, so a run that goes on evaluates where the undisturbed one does. An epoch of fewer steps
    is evaluated after each.
    """

    def __init__(self, times: int) -> None:
        self.times = times
        self._before = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = state.epoch or 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ends = state.epoch >= math.floor(self._before + _ROUNDING) + 1 - _ROUNDING
        if (
            ends
            or state.global_step >= state.max_steps
            or control.should_training_stop
            or args.eval_delay > state.epoch
        ):
            return  # the evaluation at the end of the epoch is due
        if self._parts(state.epoch) > self._parts(self._before):
            control.should_evaluate = True

    def _parts(self, epoch: float) -> int:
        return math.floor(epoch * self.times + _ROUNDING)


_ROUNDING = 1e-9
