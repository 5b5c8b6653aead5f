"""A Trainer whose checkpoints are whole or not there.

They are written beside, verified, brought to the disk and renamed in one step (``hf_sft.checkpoints.writing``). Where several
processes write, none goes on before all have: what one raises, all raise. SIGTERM stops with a checkpoint (``preemption``).
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from hf_sft.checkpoints import ARGUMENTS_FILE, CheckpointError, SaveError, checkpoints_in
from hf_sft.checkpoints.folders import STATE, unreadable
from hf_sft.checkpoints.progress import Progress
from hf_sft.checkpoints.writing import (
    RESULT,
    beside,
    clear_leftovers,
    flush,
    link,
    move_result,
    publish,
    rotate,
    seal,
    set_aside,
)
from hf_sft.data.bins import Bins, BinSampler
from hf_sft.data.cache import write_file
from hf_sft.metrics import evaluated
from hf_sft.training.preemption import Preempted, Preemption
from hf_sft.training.resuming_trainer import ResumingTrainer, find_checkpoint
from hf_sft.training.together import ElsewhereError, gathered, raised_together

logger = logging.getLogger(__name__)

_ARCHIVE_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")  # what torch calls a disk that is full


class CheckpointTrainer(ResumingTrainer):
    """Saves, stops and resumes."""

    _ended_step = -1  # the last step whose end has come
    _saved_step = -1
    _epoch_ended = False
    _stopping = _stopped = False  # by SIGTERM
    _can_link = True

    def __init__(self, model: Any, args: Any, *rest: Any, **options: Any) -> None:
        # What transformers does under this name, later and with a handler of its own, is always done here.
        wanted, args.enable_jit_checkpoint = getattr(args, "enable_jit_checkpoint", False), False
        super().__init__(model, args, *rest, **options)
        args.enable_jit_checkpoint = wanted

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """``Trainer.train``; True or ``auto`` resumes from the newest complete checkpoint, if there is one.

        Raises:
            ValueError: a checkpoint that does not fit, or a disk that processes do not share as the arguments say.
            SaveError: a checkpoint cannot be written; the one before is whole.
            Preempted: SIGTERM came and the checkpoint is written: a ``SystemExit`` with code 143.
        """
        _check_disk(self.args)
        checkpoint = find_checkpoint(self.args, resume_from_checkpoint)
        self._go_on_from(checkpoint)
        self._stopping = self._stopped = False
        self._ended_step = self._saved_step = -1
        at_start = self.args.eval_on_start
        self.args.eval_on_start = at_start and checkpoint is None  # that of the whole run, not of what is left of it
        try:
            with Preemption(self.args.ddp_timeout) as self._preemption:
                output = super().train(checkpoint, *args, **kwargs)
        finally:
            self.args.eval_on_start = at_start
        if self._stopped:
            raise Preempted
        return cast(TrainOutput, output)

    # ---- stopping ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Called at the end of each step and, for the same step again, of each epoch."""
        if self._stopped:
            return
        self._epoch_ended = self._ended_step == self.state.global_step
        self._ended_step = self.state.global_step
        self._stopping = self._preemption.agreed()
        if self._stopping:
            self._owes_evaluation, self.control.should_evaluate = self.control.should_evaluate, False
            self.control.should_save = self._saved_step != self.state.global_step
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._stopping:
            self._preemption.saved()
            self._stopped = self.control.should_training_stop = True
            logger.warning(
                "stopped by SIGTERM at step %d; resume with resume_from_checkpoint auto", self.state.global_step
            )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        limit, best = self.args.save_total_limit, self.args.load_best_model_at_end
        # Of a limit of one Trainer would remove the newest checkpoint here, and a finished run would look unfinished.
        self.args.save_total_limit = None
        self.args.load_best_model_at_end = best and not self._stopped
        try:
            return cast(TrainOutput, super()._finalize_training(*args, **kwargs))
        finally:
            self.args.save_total_limit, self.args.load_best_model_at_end = limit, best

    # ---- checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """``checkpoint-N``: written beside by all processes, then named by the one that writes on this disk."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        folder, step, writes = Path(self._get_output_dir(trial)), self.state.global_step, self.args.should_save
        target = folder / f"checkpoint-{step}"
        written = beside(target)
        with _whole(written, target, writes):
            with raised_together():
                if writes:
                    clear_leftovers(folder)
                    written.mkdir(parents=True)
            with raised_together():
                self.save_model(str(written), _internal_call=True)
            resumable = not self.args.save_only_model or self._stopping
            with raised_together():
                if resumable:
                    self._save_optimizer_and_scheduler(str(written))
                    self._save_scaler(str(written))
                    self._save_rng_state(str(written))
                    # Below everything is brought to the disk by one machine; this one may have been written by another.
                    for file in written.glob(f"rng_state_{self.args.process_index}.pth"):
                        flush(file)
            self._choose_best(folder, target)
            counters = self._counters()
            with raised_together():
                if writes:
                    self._save_counters(folder, written, counters)
                    seal(written, {"step": step, "processes": self.args.world_size, "resumable": resumable})
            with raised_together():
                if writes:
                    publish(written, target)
        self._saved_step = step
        with raised_together():
            self._tidy(target)

    def _tidy(self, newest: Path) -> None:
        """Remove checkpoints beyond the limit and set the links."""
        if not self.args.should_save:
            return
        best = Path(self.state.best_model_checkpoint) if self.state.best_model_checkpoint else None
        rotate(newest, self.args.save_total_limit, [best] if best else [])
        for name, target in (("last", newest), ("best", best)):
            if target is not None and self._can_link and (reason := link(newest.parent, name, target)) is not None:
                self._can_link = False
                logger.warning("no links to checkpoints are made: %s", reason)

    def _tidy_resumed(self, checkpoint: str) -> None:
        """What a kill left undone is done when the run goes on."""
        path = Path(checkpoint)
        if path.parent.resolve() != Path(str(self.args.output_dir)).resolve():
            return  # a branch of another run
        self._choose_best(path.parent)
        with raised_together():
            if self.args.should_save:
                set_aside(path.parent, self.state.global_step)
                clear_leftovers(path.parent)
            self._tidy(path)

    def _evaluate_late(self, how: dict[str, Any]) -> None:
        super()._evaluate_late(how)
        self._tidy_resumed(str(self._checkpoint))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        where = super()._init_training_state(*args, **kwargs)
        if self._checkpoint is not None:
            self._tidy_resumed(self._checkpoint)
        return where

    def _save_counters(self, folder: Path, written: Path, counters: dict[str, list[float]]) -> None:
        """The trainer's state, what of the data is behind, and the arguments of the run."""
        states: dict[str, list[Any]] = {}
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                states.setdefault(type(part).__name__, []).append(part.state())
        self.state.stateful_callbacks = cast(
            Any, {name: found if len(found) > 1 else found[0] for name, found in states.items()}
        )
        self.state.save_to_json(str(written / STATE))
        epoch, bins = self._bins_seen()
        by_epoch = self.args.eval_strategy == IntervalStrategy.EPOCH and self.args.eval_delay <= epoch
        Progress(
            step=self.state.global_step,
            epoch=epoch,
            bins=bins,
            bins_in_epoch=self._bins_in_epoch,
            documents=self._documents(epoch, bins),
            global_batch=self._global_batch,
            processes=self.args.world_size,
            owes_evaluation=self._owes_evaluation or (by_epoch and bins == 0 and not self._epoch_ended),
            counters=counters,
        ).write(written)
        if (folder / ARGUMENTS_FILE).is_file():
            shutil.copy(folder / ARGUMENTS_FILE, written)

    def _documents(self, epoch: int, bins: int) -> int | None:
        """Documents seen so far."""
        data = self.train_dataset
        if not isinstance(data, Bins):
            return None
        whole = epoch * len(data.lengths)
        if data.capacity is None or bins == 0:
            return whole + bins
        seed = None if self.args.train_sampling_strategy == "sequential" else self._seed
        order = BinSampler(len(data), len(data), seed=seed)
        order.set_epoch(epoch)
        return whole + sum(len(data.bins[number]) for _, number in next(iter(order))[:bins])

    def _choose_best(self, folder: Path, *new: Path) -> None:
        """Of the checkpoints that are there, the one whose evaluation gave the best value; the earlier of two alike."""
        metric = self.args.metric_for_best_model
        if metric is None:
            return
        there = {path.name: path for path in (*new, *checkpoints_in(folder).values())}
        measured = [
            (-value if self.args.greater_is_better else value, step)
            for step, value in evaluated(self.state.log_history, metric).items()
            if f"checkpoint-{step}" in there and math.isfinite(value)
        ]
        if measured:
            self.state.best_model_checkpoint = str(there[f"checkpoint-{min(measured)[1]}"])

    # ---- the result ----

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """``Trainer.save_metrics``: ``SPLIT_results.json`` and, with ``combined``, ``all_results.json``, each written at once.

        An ``all_results.json`` that a kill has cut off begins anew.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        files = {f"{split}_results.json": metrics}
        if combined:
            try:
                known = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                known = {}
            files["all_results.json"] = {**known, **metrics}
        for name, values in files.items():
            write_file(folder / name, json.dumps(values, indent=4, sort_keys=True))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer``, but written beside, verified and moved in file by file.

        Raises:
            SaveError: it cannot be written; what was there before is as it was.
        """
        if _internal_call and output_dir is not None:  # a folder that gets its name when it is whole
            with _written_by(self.accelerator.unwrap_model(self.model), self.args):
                super().save_model(output_dir, _internal_call=True)
            return
        target = Path(str(self.args.output_dir if output_dir is None else output_dir))
        written, writes = target / RESULT, self.args.should_save
        with _whole(written, target, writes):
            if writes:
                target.mkdir(parents=True, exist_ok=True)
                clear_leftovers(target)
                written.mkdir()
            CheckpointTrainer.save_model(self, str(written), _internal_call=True)
            if writes:
                move_result(written, target)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


@contextmanager
def _written_by(model: Any, args: Any) -> Iterator[None]:
    """``save_pretrained`` writes in the first process alone, without a word in the others; under ``save_on_each_node`` the first
    of each machine has to."""
    if not (args.save_on_each_node and args.should_save):
        yield
        return
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank


@contextmanager
def _whole(written: Path, target: Path, writes: bool) -> Iterator[None]:
    """Whatever fails inside, what was begun is removed; a failure of the disk is told as such.

    Raises:
        SaveError: what was written is not whole.
    """
    try:
        yield
    except Exception as error:
        begun = [path.name for path in written.rglob("*") if path.is_file() and unreadable(path)] if writes else []
        if writes:
            shutil.rmtree(written, ignore_errors=True)
        if not _is_of_the_disk(error):
            raise
        place = target if target.is_dir() else target.parent
        left = f" ({shutil.disk_usage(place).free / 2**30:.1f} GiB are free there)" if place.is_dir() else ""
        reason = ": ".join([*begun[:1], str(error).splitlines()[0].rstrip(".")])
        raise SaveError(
            f"{target} cannot be written{left}: {reason}. What had been saved before is as it was. Make room, or lower "
            "save_total_limit, and go on with resume_from_checkpoint auto."
        ) from error


def _is_of_the_disk(error: Exception) -> bool:
    """Torch tells of failed writes as a RuntimeError of its archive writer."""
    if isinstance(error, (OSError, SafetensorError, CheckpointError, ElsewhereError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _ARCHIVE_WRITER)


def _check_disk(args: Any) -> None:
    """All processes see one output folder, or each node its own, as ``save_on_each_node`` says.

    Raises:
        ValueError: it is not so.
    """
    if args.world_size == 1 or args.save_strategy == "no":
        return
    folder = Path(str(args.output_dir))
    name = gathered(f".shared-{uuid.uuid4().hex}")[0]
    with raised_together():
        if args.process_index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    found = gathered((folder / name).exists())
    if args.process_index == 0:
        (folder / name).unlink()
    writers = gathered(args.should_save)
    if args.save_on_each_node:
        if any(seen and writes for seen, writes in list(zip(found, writers, strict=True))[1:]):
            raise ValueError(
                f"save_on_each_node is true, and the nodes share output_dir {str(folder)!r}: set it to false"
            )
    elif not all(found):
        raise ValueError(
            f"rank {found.index(False)} does not see output_dir {str(folder)!r} of rank 0: choose a folder on a disk that all "
            "nodes share, or set save_on_each_node to true"
        )
