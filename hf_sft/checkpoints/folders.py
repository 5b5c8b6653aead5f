"""Checkpoint folders: which of them are complete, and what they say about the training so far."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from hf_sft.checkpoints.verifying import CheckpointError, count, tensor_shapes, weight_shapes

logger = logging.getLogger(__name__)

MARKER = "complete.json"  # written last: what the folder holds, and how much of it
PROGRESS = "progress.json"  # what of the data is behind
STATE = "trainer_state.json"
# What a run writes beside its checkpoints as it goes: its log, its answers, and whether its result stops by itself.
LOG, PREDICTIONS, STOP_CHECK = "log.jsonl", "predictions.jsonl", "stop_check.json"
_ARCHIVE = re.compile(r".*\.pth?|(optimizer|pytorch_model|adapter_model|scheduler)[^/]*\.bin")
_NUMBERED = re.compile(r"checkpoint-\d+")


def incomplete(checkpoint: str | os.PathLike[str]) -> str | None:
    """Why training cannot go on from ``checkpoint``, or None if it is complete.

    A folder of ours is judged by its marker: every file that it lists has its size and can be read. One without (by a plain
    Trainer) is judged by the files that a Trainer writes.
    """
    path = Path(checkpoint)
    if not path.is_dir():
        return "it is no folder"
    if (path / MARKER).is_file():
        return _against_marker(path)
    if (path / PROGRESS).exists():
        return f"{MARKER}, which is written last, is missing"
    if (reason := unreadable(path / STATE)) is not None:
        return reason
    try:
        if (path / "adapter_config.json").is_file():
            shapes = tensor_shapes(path / "adapter_model.safetensors")
        else:
            shapes = weight_shapes(path)
    except CheckpointError as error:
        return str(error)
    if not shapes or any(count(shape) == 0 for shape in shapes.values()):
        return "its weights are empty"
    random_states = sorted(path.glob("rng_state*.pth"))
    if not random_states:
        return "rng_state.pth is missing"
    files = [*random_states, path / "scheduler.pt", path / "optimizer.pt"]
    return next((reason for file in files if (reason := unreadable(file)) is not None), None)


def _against_marker(path: Path) -> str | None:
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        files = {str(name): int(size) for name, size in marker["files"].items()}
        resumable = marker["resumable"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MARKER} cannot be read ({error!r})"
    for name, size in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (held := (path / name).stat().st_size) != size:
            return f"{name} has {held} of {size} bytes"
    if (reason := next((found for name in files if (found := unreadable(path / name)) is not None), None)) is not None:
        return reason
    return None if resumable else "it holds the model alone (save_only_model)"


def unreadable(file: Path) -> str | None:
    """Why ``file`` is of no use, by its header (safetensors), its end (torch's archives) or as a whole (JSON); None if it is."""
    if not file.is_file():
        return f"{file.name} is missing"
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        try:
            tensor_shapes(file)
        except CheckpointError as error:
            return str(error)
    elif file.suffix == ".json":
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{file.name} ({size} bytes) cannot be read ({error})"
    elif _ARCHIVE.fullmatch(file.name) and not zipfile.is_zipfile(file):  # the end of an archive is written last
        return f"{file.name} ({size} bytes) was not written to its end"
    return None


def read_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``trainer_state.json`` of a checkpoint."""
    return dict(json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8")))


def steps_of(checkpoint: str | os.PathLike[str]) -> tuple[int, int]:
    """Optimizer steps that ``checkpoint`` has behind it, and those that its run was to take in all."""
    state = read_state(checkpoint)
    return int(state["global_step"]), int(state["max_steps"])


def step_of(path: Path) -> int:
    """N of ``checkpoint-N``."""
    return int(path.name.rpartition("-")[2])


def checkpoints_in(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Step -> ``checkpoint-N``, newest first, complete or not."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _NUMBERED.fullmatch(path.name)]
    return {step_of(path): path for path in sorted(found, key=step_of, reverse=True)}


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest ``checkpoint-N`` that training can go on from; what is skipped is logged with the reason."""
    for path in checkpoints_in(output_dir).values():
        reason = incomplete(path)
        if reason is None:
            return str(path)
        logger.warning("Checkpoint %s is skipped: %s.", path, reason)
    return None
