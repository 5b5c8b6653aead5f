"""A Trainer that evaluates and saves the moving average of its weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import TrainerCallback

from hf_sft.arguments import EMAArguments
from hf_sft.checkpoints.folders import step_of
from hf_sft.checks import check_values
from hf_sft.evaluation_checks import check_ema
from hf_sft.metrics import evaluated
from hf_sft.models.averages import WeightAverage, has_average, trained_parameters
from hf_sft.training.checkpoint_trainer import CheckpointTrainer

logger = logging.getLogger(__name__)


class AveragingTrainer(CheckpointTrainer):
    """Keeps an exponential moving average of what is trained, if ``ema_args`` has a decay.

    Evaluation, generation and the result in ``output_dir`` are of the average. A checkpoint holds the weights as training goes
    on with them, and the average beside them in ``ema.safetensors``. While the average is in use, the weights are kept aside.

    Args:
        ema_args: decay, first step and place of the average.

    Raises:
        ValueError: a decay out of (0, 1), or an engine that shards weights.
    """

    average: WeightAverage | None = None  # once it has begun
    _best_step: int | None = None  # of the checkpoint that has become the result

    def __init__(self, model: Any, args: Any, *rest: Any, ema_args: EMAArguments | None = None, **options: Any) -> None:
        self.ema_args = EMAArguments() if ema_args is None else ema_args
        engine = "DeepSpeed" if args.deepspeed else "FSDP" if args.fsdp else None
        if found := [*check_values(self.ema_args), *check_ema(self.ema_args, engine, set())]:
            raise ValueError("; ".join(found))
        super().__init__(model, args, *rest, **options)
        if self.ema_args.ema_decay is not None:
            self.add_callback(_Average(self))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model's weights are their average, if there is one."""
        if self.average is None:
            yield
            return
        with self.average.applied():
            yield

    def _begin_average(self) -> None:
        model = cast(nn.Module, self.accelerator.unwrap_model(self.model))
        place = "cpu" if self.ema_args.ema_cpu else None
        self.average = WeightAverage(trained_parameters(model), cast(float, self.ema_args.ema_decay), place)

    def _resume_average(self) -> None:
        """Called when training begins: the average of a new run, or what the checkpoint holds."""
        self.average = None
        step, first = self.state.global_step, self.ema_args.ema_start_step
        if step < first:
            return
        self._begin_average()
        if self._checkpoint is not None and has_average(self._checkpoint):
            cast(WeightAverage, self.average).load(self._checkpoint)
        elif step > first:
            logger.warning("%s holds no average of the weights: it begins at step %d", self._checkpoint, step)

    def _step_average(self) -> None:
        """Called after each optimizer step."""
        if self.average is not None:
            self.average.update()
        elif self.state.global_step >= self.ema_args.ema_start_step:
            self._begin_average()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``, with the average."""
        with self.averaged():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer``: the average; in a checkpoint the weights, with the average beside them."""
        if not _internal_call:
            with self.averaged():
                super().save_model(output_dir)
            return
        super().save_model(output_dir, _internal_call=True)
        if self.average is not None and self.args.should_save and output_dir is not None:
            self.average.save(output_dir)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._tell_best()
        best = str(self.state.best_model_checkpoint)
        if self.average is not None and has_average(best):
            self.average.load(best)
        else:  # the best one came before the average began
            self.average = None

    def _tell_best(self) -> None:
        """Which checkpoint has become the result, and whether its metric tells it from the others."""
        best, metric = Path(str(self.state.best_model_checkpoint)), str(self.args.metric_for_best_model)
        self._best_step = step_of(best)
        values = evaluated(self.state.log_history, metric)
        value = values.get(self._best_step, math.nan)
        logger.info(
            "the result is %s: %s is %.4g there, the best of %d evaluations", best.name, metric, value, len(values)
        )
        if len(values) > 1 and len(set(values.values())) == 1:
            logger.warning(
                "%s is the same in all evaluations: it chooses nothing, and the first checkpoint is taken", metric
            )


class _Average(TrainerCallback):
    def __init__(self, trainer: AveragingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._resume_average()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer._step_average()
