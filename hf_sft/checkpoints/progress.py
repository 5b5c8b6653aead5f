"""What of the data a checkpoint has behind it, and how a run goes on from there in optimizer steps of any size.

Trainer counts the steps of whole epochs only; bins are what a run must neither repeat nor lose.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from hf_sft.checkpoints.folders import PROGRESS


@dataclass(frozen=True)
class Progress:
    """Counters of a checkpoint, over all processes.

    Attributes:
        step: optimizer steps taken.
        epoch: the epoch (for a stream always 0) of which ``bins`` bins have been seen.
        bins_in_epoch: None for a stream.
        documents: seen in all, repetitions included; None where that is not known.
        global_batch: bins of an optimizer step.
        processes: number of processes.
        owes_evaluation: an evaluation that was due at this step has not been made yet.
        counters: what the trainer counts between two lines of the log.
    """

    step: int
    epoch: int
    bins: int
    bins_in_epoch: int | None
    documents: int | None
    global_batch: int
    processes: int
    owes_evaluation: bool = False
    counters: dict[str, list[float]] = field(default_factory=dict)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``progress.json``."""
        (Path(folder) / PROGRESS).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Progress | None:
        """Of a checkpoint of ours; None for one of a plain Trainer."""
        path = Path(folder) / PROGRESS
        if not path.is_file():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{entry.name: values[entry.name] for entry in fields(cls) if entry.name in values})


@dataclass(frozen=True)
class Continuation:
    """The rest of a run, in optimizer steps.

    Attributes:
        epoch: the first epoch.
        behind: steps of it that count as taken: what has been seen of it, in steps of the new size, the last perhaps not full.
        steps: of the first epoch, those included.
        epochs: number of the epoch at which the run ends.
        last: the step at which the run ends.
    """

    epoch: int
    behind: int
    steps: int
    epochs: int
    last: int


def go_on(progress: Progress, global_batch: int, *, epochs: float, max_steps: int) -> Continuation:
    """How a run goes on whose steps now take ``global_batch`` bins: with the rest of the epoch, then in whole epochs.

    Args:
        epochs: of the whole run; without meaning if there are ``max_steps``.
        max_steps: of the whole run, or not positive.

    Raises:
        ValueError: a stream that cannot be cut where it must go on.
    """
    bins = progress.bins_in_epoch
    if bins is None:
        if progress.bins % global_batch:
            raise ValueError(
                f"the stream goes on behind {progress.bins} bins, and a step now takes {global_batch} (it was "
                f"{progress.global_batch}): a stream is counted in whole steps. Choose processes, per_device_train_batch_size "
                f"and gradient_accumulation_steps so that their product divides {progress.bins}."
            )
        behind = progress.bins // global_batch
        return Continuation(0, behind, behind + max_steps - progress.step, 1, max_steps)
    behind = math.ceil(progress.bins / global_batch)
    steps = behind + math.ceil((bins - progress.bins) / global_batch)
    whole = math.ceil(bins / global_batch)
    if max_steps > 0:
        last = max_steps
    else:
        rest = math.ceil(epochs * whole) - progress.epoch * whole
        last = progress.step + (steps - behind + rest - whole if rest >= whole else max(0, rest - behind))
    left = last - progress.step - (steps - behind)
    return Continuation(progress.epoch, behind, steps, progress.epoch + 1 + math.ceil(max(0, left) / whole), last)
