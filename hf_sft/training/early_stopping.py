"""The end of a training that no longer improves."""

from __future__ import annotations

import logging
import math
from typing import Any

from transformers import TrainerCallback

from hf_sft.metrics import evaluated
from hf_sft.training_arguments import smaller_is_better

logger = logging.getLogger(__name__)


class EarlyStopping(TrainerCallback):
    """Ends the training when ``metric_for_best_model`` (by default the loss) has not improved in ``patience`` evaluations.

    It has no state but the log: a resumed run counts on, and one that had ended does not begin again.

    Args:
        patience: evaluations without an improvement.
        threshold: an improvement is a change by more than this.
    """

    def __init__(self, patience: int, threshold: float = 0.0) -> None:
        self.patience, self.threshold = patience, threshold

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._look(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._look(args, state, control)

    def _look(self, args: Any, state: Any, control: Any) -> None:
        metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
        greater = args.greater_is_better
        greater = not smaller_is_better(metric) if greater is None else greater
        best, best_step, since = None, 0, 0
        for step, value in evaluated(state.log_history, metric).items():
            gain = math.inf if best is None else (value - best if greater else best - value)
            if math.isfinite(value) and gain > self.threshold:
                best, best_step, since = value, step, 0
            else:
                since += 1
        if since >= self.patience and not control.should_training_stop:
            logger.info(
                "early stopping: %s has not improved in %d evaluations; its best, %.4g, was at step %d",
                metric, since, math.nan if best is None else best, best_step,
            )  # fmt: skip
            control.should_training_stop = True
