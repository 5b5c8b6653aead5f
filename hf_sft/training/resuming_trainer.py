"""A Trainer that goes on where a checkpoint was: same bins, same random numbers, and the values that are asked for now.

What of the data is behind is counted in bins (``hf_sft.checkpoints.progress``), so that a run can go on in steps of another size.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import set_seed

from hf_sft.checkpoints import incomplete, resolve_resume
from hf_sft.checkpoints.folders import step_of
from hf_sft.checkpoints.progress import Continuation, Progress, go_on
from hf_sft.data.bins import Bins
from hf_sft.data.live import StreamBins
from hf_sft.training.sharded_trainer import ShardedTrainer, check_engine_of
from hf_sft.training.together import gathered, raised_together

logger = logging.getLogger(__name__)


class ResumingTrainer(ShardedTrainer):
    """Continues runs; call :meth:`_go_on_from` before ``Trainer.train``."""

    _checkpoint: str | None = None  # what the run goes on from
    _progress: Progress | None = None  # what that checkpoint says of the data
    _continued: Continuation | None = None  # and what follows from it
    _epoch_began: tuple[int, int, int] = (0, 0, 0)  # epoch, its bins that were behind, the step then
    _owes_evaluation = False
    _kept_random: tempfile.TemporaryDirectory[str] | None = None

    def last_step(self, checkpoint: str | None = None) -> int:
        """Optimizer steps of the whole run, if it goes on from ``checkpoint``."""
        args = self.args
        if args.max_steps > 0:
            return int(args.max_steps)
        progress = None if checkpoint is None else Progress.read(checkpoint)
        if progress is not None:
            return self._continuation(progress).last
        return math.ceil(args.num_train_epochs * (len(self.get_train_dataloader()) // args.gradient_accumulation_steps))

    @property
    def _global_batch(self) -> int:
        """Bins of an optimizer step."""
        return int(self.args.world_size * self._train_batch_size * self.args.gradient_accumulation_steps)

    @property
    def _bins_in_epoch(self) -> int | None:
        """None for a stream."""
        return None if isinstance(self.train_dataset, StreamBins) else len(cast(Bins, self.train_dataset))

    def _continuation(self, progress: Progress) -> Continuation:
        if self._bins_in_epoch != progress.bins_in_epoch:
            raise ValueError(
                f"the checkpoint was written on {_bins(progress.bins_in_epoch)}, and the data are {_bins(self._bins_in_epoch)}: "
                "a run goes on with its own data. To train on others, start a new run from the checkpoint's weights "
                "(model_name_or_path or adapter_name_or_path)."
            )
        return go_on(
            progress, self._global_batch, epochs=self.args.num_train_epochs, max_steps=int(self.args.max_steps)
        )

    def _go_on_from(self, checkpoint: str | None) -> None:
        """Set what the methods below look at; None for a run from the start."""
        self._checkpoint = checkpoint
        self._progress = None if checkpoint is None else Progress.read(checkpoint)
        self._continued = None if self._progress is None else self._continuation(self._progress)
        self._owes_evaluation = self._progress is not None and self._progress.owes_evaluation
        self._resumed_bins = None
        if self._progress is not None and self._progress.bins_in_epoch is not None:
            self._resumed_bins = (self._progress.epoch, self._progress.bins)
        if self._progress is not None and self._progress.counters:
            self._set_counters(self._progress.counters)

    def _counters(self) -> dict[str, list[float]]:
        """What a subclass counts between lines of the log, over all processes; all call this."""
        return {}

    def _set_counters(self, counters: dict[str, list[float]]) -> None:
        """Go on from what :meth:`_counters` gave."""

    # ---- steps and epochs ----

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """As ``Trainer``; the end of a resumed run is counted from its bins."""
        values = super().set_initial_training_values(args, dataloader)
        if self._continued is None:
            return values
        return (self._continued.epochs, *values[1:-1], self._continued.last)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        where = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # as asked for now, not as in the checkpoint
        if self._continued is None:
            return where
        if self.args.max_steps <= 0:
            self.state.num_train_epochs = math.ceil(self.args.num_train_epochs)
        return self._continued.epoch, self._continued.behind * self.args.gradient_accumulation_steps

    def _run_epoch(self, **how: Any) -> None:  # type: ignore[override]  # Trainer gives each by its name
        steps = how["steps_trained_in_current_epoch"] // self.args.gradient_accumulation_steps
        behind = steps * self._global_batch if how["epoch"] == how["epochs_trained"] else 0
        self._epoch_began = (how["epoch"], behind, self.state.global_step)
        continued, progress = self._continued, self._progress
        if continued is not None and progress is not None and continued.epoch == how["epoch"]:
            self._epoch_began = (how["epoch"], progress.bins, self.state.global_step)
            accumulation = self.args.gradient_accumulation_steps
            how |= {"num_update_steps_per_epoch": continued.steps, "steps_in_epoch": continued.steps * accumulation}
            if (
                progress.bins_in_epoch is not None and continued.behind
            ):  # its sampler has cut off what Trainer will skip
                loader = how["train_dataloader"]
                sampler = _Behind(loader.batch_sampler, continued.behind * accumulation)
                how["train_dataloader"] = self._bin_loader(loader.dataset, evaluation=False, batch_sampler=sampler)
            if self._owes_evaluation:
                self._evaluate_late(how)
        if self.state.global_step >= self.state.max_steps:  # Trainer looks only after a step
            self.control.should_training_stop = True
        if self.control.should_training_stop:  # or a callback has said so before the first one
            return
        super()._run_epoch(**how)

    def _evaluate_late(self, how: dict[str, Any]) -> None:
        """The evaluation that was due when the checkpoint was written, as the undisturbed run made it."""
        self._owes_evaluation = False
        logger.info("evaluating after step %d, which the run was stopped before", self.state.global_step)
        self._load_rng_state(self._checkpoint)
        self.control.should_evaluate, self.control.should_log, self.control.should_save = True, False, False
        names = ("trial", "epoch", "ignore_keys_for_eval", "start_time")
        super()._maybe_log_save_evaluate(self._tr_loss, None, how["model"], **{name: how[name] for name in names})
        self.control.should_evaluate = False
        self._kept_random = tempfile.TemporaryDirectory()
        self._save_rng_state(self._kept_random.name)

    def _bins_seen(self) -> tuple[int, int]:
        """(epoch, bins of it that all processes together have seen); a whole epoch is the beginning of the next."""
        epoch, behind, step = self._epoch_began
        seen, whole = behind + (self.state.global_step - step) * self._global_batch, self._bins_in_epoch
        return (epoch, seen) if whole is None or seen < whole else (epoch + 1, 0)

    # ---- optimizer and random numbers ----

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As ``Trainer``; what the optimizer was made with is kept, because the checkpoint's values will replace it."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self._asked = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in _groups(self)]
        return scheduler

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            self._ask_again()
        return prepared

    def _ask_again(self) -> None:
        """Another learning rate, weight decay or beta than the checkpoint's counts from here on."""
        groups = _groups(self)
        if len(groups) != len(self._asked):
            return
        for group, asked in zip(groups, self._asked, strict=True):
            before, now = group.get("initial_lr"), asked.get("initial_lr")
            if before and now is not None and before != now:
                group["lr"] = group["lr"] * (now / before)
            group.update(asked)
        scheduler: Any = self.lr_scheduler
        scheduler = getattr(scheduler, "scheduler", scheduler)  # as accelerate wraps it
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in groups]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As ``Trainer``; a rank that the checkpoint does not know draws anew."""
        if self._kept_random is not None:
            with self._kept_random as folder:
                super()._load_rng_state(folder)
            self._kept_random = None
            return
        if checkpoint is None:
            return
        single, rank = self.args.world_size == 1, self.args.process_index
        name, other = f"rng_state_{rank}.pth", "rng_state.pth"
        name, other = (other, name) if single else (name, other)
        if (Path(checkpoint) / name).is_file():
            super()._load_rng_state(checkpoint)
            return
        logger.warning(
            "%s was written by another number of processes: dropout and what else is random in the model differs from here on",
            checkpoint,
        )
        if rank == 0 and (Path(checkpoint) / other).is_file():
            with tempfile.TemporaryDirectory() as folder:
                shutil.copy(Path(checkpoint) / other, Path(folder) / name)
                super()._load_rng_state(folder)
            return
        set_seed(int(np.random.SeedSequence([self.args.seed, self.state.global_step, rank]).generate_state(1)[0]))


class _Behind:
    """A batch sampler behind so many empty batches, which Trainer counts as taken and skips."""

    def __init__(self, sampler: Any, batches: int) -> None:
        self.sampler, self.batches = sampler, batches

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[Any]]:
        return chain(repeat([], self.batches), self.sampler)


def find_checkpoint(args: Any, value: str | bool | None) -> str | None:
    """As :func:`hf_sft.checkpoints.resolve_resume`, with one answer for all processes; all must call this.

    The processes that write look. On nodes with disks of their own, a kill may have come between two nodes: what all have counts.

    Raises:
        ValueError: no complete checkpoint is there where one is named.
    """
    found = None
    with raised_together():
        if args.should_save:
            found = resolve_resume(str(args.output_dir), value)
            if found is not None:
                check_engine_of(found, args)
    newest = [found for writes, found in gathered((args.should_save, found)) if writes]
    if None in newest:
        return None
    oldest = min(cast(list[str], newest), key=lambda path: step_of(Path(path)))
    with raised_together():
        if oldest != found and args.should_save and (reason := incomplete(oldest)) is not None:
            raise ValueError(f"the nodes have no checkpoint in common: {oldest} is not whole on all of them ({reason})")
    return oldest


def _groups(trainer: Any) -> list[dict[str, Any]]:
    return list(trainer.optimizer.param_groups)


def _bins(number: int | None) -> str:
    return "a stream" if number is None else f"{number} bins"
