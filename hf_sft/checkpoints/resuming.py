"""Whether a run may go on in a folder, from where, and what has changed since."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_sft.checkpoints.folders import PROGRESS, checkpoints_in, incomplete, last_complete_checkpoint
from hf_sft.checkpoints.record import ARGUMENTS_FILE, as_json, differences, read_record
from hf_sft.checkpoints.record import identity as identity_of

logger = logging.getLogger(__name__)

# What only a run that has ended leaves at the top of its folder.
_RESULTS = ("*.safetensors", "adapter_config.json", "config.json", "trainer_state.json", "*_results.json")


def resolve_resume(output_dir: str | os.PathLike[str], value: str | bool | None) -> str | None:
    """The checkpoint to go on from: none for None or false, the newest complete one for true or "auto", or the given path.

    Raises:
        ValueError: the given path is no complete checkpoint.
    """
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (None, False, "", "false", "none", "no"):
        return None
    if word in (True, "true", "auto", "yes"):
        found = last_complete_checkpoint(output_dir)
        logger.info("Resuming from %s.", found) if found else logger.info(
            "No complete checkpoint in %s; starting anew.", output_dir
        )
        return found
    if (reason := incomplete(str(value))) is not None:
        raise ValueError(
            f"resume_from_checkpoint {value!r} cannot be resumed: {reason}. Name a complete checkpoint-N folder, or set auto."
        )
    return str(value)


def check_output_dir(
    output_dir: str | os.PathLike[str], identity: Mapping[str, Any], resume: str | bool | None
) -> None:
    """Refuse a folder that cannot be written to, and another run's.

    Args:
        identity: the fields that make this run what it is, as :func:`identity` gives them.
        resume: the value of resume_from_checkpoint.

    Raises:
        ValueError: no folder can be there; or it holds a run and nothing is resumed, or one that differs in ``identity``, or one
            that is finished and left no checkpoint to go on from.
    """
    folder = Path(output_dir)
    _check_writable(folder)
    held = {
        sign: sorted(path.name for path in folder.glob(sign)) for sign in (ARGUMENTS_FILE, "checkpoint-*", *_RESULTS)
    }
    names = sorted({name for found in held.values() for name in found})
    if not names:
        return
    where = f"output_dir {str(folder)!r}"
    if resume is None or resume is False or str(resume).strip().lower() in ("", "false", "none", "no"):
        raise ValueError(
            f"{where} holds another run ({', '.join(names[:4])}). Set resume_from_checkpoint to auto to go on "
            "with it, or choose another output_dir."
        )
    if (folder / ARGUMENTS_FILE).is_file():
        _check_identity(where, identity_of(read_record(folder / ARGUMENTS_FILE)), identity)
    else:
        logger.warning(
            "%s is missing: whether the run to resume has the same settings is not known.", folder / ARGUMENTS_FILE
        )
    results = sorted({name for sign in _RESULTS for name in held[sign]})
    if results and all(incomplete(path) for path in checkpoints_in(folder).values()):
        raise ValueError(
            f"{where} holds a finished run ({', '.join(results[:4])}) and no complete checkpoint to go on from; starting anew "
            "would write over it. Choose another output_dir."
        )


def _check_writable(folder: Path) -> None:
    """The folder, or the nearest one above it that exists, must take new files."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        raise ValueError(f"output_dir {str(folder)!r} cannot be made: {str(place)!r} is a file; name another folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir {str(folder)!r}: {str(place)!r} cannot be written to; name another folder.")


def _check_identity(where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [name for name, value in now.items() if name in before and as_json(value) != before[name]]
    if not differing:
        return
    lines = "; ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in differing)
    raise ValueError(
        f"{where} holds a run with other settings, so it cannot be resumed: {lines}. "
        "Set them as they were, or choose another output_dir."
    )


def check_checkpoint(checkpoint: str | os.PathLike[str], record: Mapping[str, Any]) -> list[str]:
    """What of ``record`` has changed since ``checkpoint`` was written, one sentence for each value.

    Args:
        record: grouped values, as they go into args.json.

    Raises:
        ValueError: the checkpoint is of another model, data, objective or seed.
    """
    path = Path(checkpoint)
    found = next((place for place in (path, path.parent) if (place / ARGUMENTS_FILE).is_file()), None)
    if found is None:
        return []
    before = read_record(found / ARGUMENTS_FILE)
    _check_identity(f"checkpoint {str(path)!r}", identity_of(before), identity_of(record))
    lines = differences(before, record)
    if not (path / PROGRESS).is_file() and (batch := [line for line in lines if line.startswith("global_batch_size")]):
        raise ValueError(
            f"checkpoint {str(path)!r} counts steps and not what of the data is behind, and {batch[0]}: rows would be repeated "
            "or skipped. Set processes x per_device_train_batch_size x gradient_accumulation_steps as it was."
        )
    return lines
