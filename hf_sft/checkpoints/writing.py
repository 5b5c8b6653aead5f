"""Folders are written beside and moved into place whole: a kill or a full disk leaves what was there before.

Only names that this module makes are ever cleared away: ``.checkpoint-N.writing``, ``.checkpoint-N.removing``,
``.result.writing``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hf_sft.checkpoints.folders import MARKER, checkpoints_in, incomplete, step_of, unreadable
from hf_sft.checkpoints.verifying import CheckpointError

logger = logging.getLogger(__name__)

RESULT = ".result.writing"
_OURS = re.compile(r"\.checkpoint-\d+\.(writing|removing)|\.result\.writing")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_INDEX = "model.safetensors.index.json"


class SaveError(ValueError):
    """Something could not be written; what was there before is as it was. The message names the place and the way out."""


def beside(target: Path) -> Path:
    """Where ``target`` is written before it gets its name."""
    return target.with_name(f".{target.name}.writing")


def set_aside(folder: Path, step: int) -> None:
    """Give checkpoints of later steps than ``step``, from which the run does not go on, names that no resume takes."""
    for later, path in checkpoints_in(folder).items():
        if later > step:
            aside = path.with_name(f"left-behind-{path.name}")
            number = 2
            while aside.exists():
                aside, number = path.with_name(f"left-behind-{path.name}.{number}"), number + 1
            os.replace(path, aside)
            logger.warning("%s lies ahead of step %d, from which the run goes on: now %s", path, step, aside.name)


def clear_leftovers(folder: Path) -> None:
    """Remove what a run that was killed while it wrote or removed has left in ``folder``.

    A sealed checkpoint whose older namesake is gone already gets its name instead.
    """
    for path in sorted(folder.glob(".checkpoint-*.writing")):
        target = folder / path.name.removeprefix(".").removesuffix(".writing")
        if (path / MARKER).is_file() and not target.exists() and incomplete(path) is None:
            os.replace(path, target)
    for path in folder.glob(".*"):
        if _OURS.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            logger.info("%s, left over from a run that was stopped while it wrote, is removed", path)
            shutil.rmtree(path)


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Check that every file can be read, bring all to the disk, and write the marker last.

    Args:
        facts: go into the marker, beside the files with their sizes.

    Raises:
        CheckpointError: a file cannot be read back.
        OSError: as the disk says.
    """
    files = _files(folder)
    for name in files:
        if (reason := unreadable(folder / name)) is not None:
            raise CheckpointError(f"{folder / name} was written and cannot be read back: {reason}")
        flush(folder / name)
    sizes = {name: (folder / name).stat().st_size for name in files}
    marker = folder / MARKER
    marker.write_text(json.dumps({**facts, "files": sizes}, indent=2) + "\n", encoding="utf-8")
    for path in (marker, *sorted({(folder / name).parent for name in files}), folder):
        flush(path)


def publish(written: Path, target: Path) -> None:
    """Give a sealed folder its name, in one step; an older one of that name (not complete, or of a branch left behind) goes."""
    old = target.with_name(f".{target.name}.removing")
    there = target.exists()
    if there:
        os.replace(target, old)
    try:
        os.replace(written, target)
    except OSError:
        if there:
            os.replace(old, target)
        raise
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def rotate(newest: Path, limit: int | None, keep: Collection[Path] = ()) -> None:
    """Remove the oldest ``checkpoint-N`` up to ``newest`` until ``limit`` are left, never that one nor those in ``keep``.

    Those ahead of it, from which a run did not go on, stay until it comes to them.
    """
    if limit is None or limit <= 0:
        return
    folder, kept = newest.parent, {newest.name, *(path.name for path in keep)}
    found = [path for path in reversed(checkpoints_in(folder).values()) if step_of(path) <= step_of(newest)]
    excess = len(found) - max(limit, len(kept))
    for path in [path for path in found if path.name not in kept][: max(0, excess)]:
        hidden = path.with_name(f".{path.name}.removing")  # so that half a checkpoint never stands under its name
        os.replace(path, hidden)
        flush(folder)
        shutil.rmtree(hidden, ignore_errors=True)  # what stays is cleared before the next is written


def link(folder: Path, name: str, target: Path) -> str | None:
    """Make ``folder/name`` a link to ``target`` beside it, in one step; returns why that is impossible, or None."""
    path, new = folder / name, folder / f".{name}.linking"
    if path.exists() and not path.is_symlink():
        return f"{path} is a file or folder of somebody's"
    try:
        new.unlink(missing_ok=True)
        new.symlink_to(target.name, target_is_directory=True)
        os.replace(new, path)
    except OSError as error:
        return str(error)
    return None


def move_result(written: Path, target: Path) -> None:
    """Move the files of a verified model or adapter into ``target``, each in one step, over those of the same name.

    Of weights in several files the index goes first and comes back last: a mixture of two models never looks like one.
    """
    files = sorted(_files(written), key=lambda name: (name == _INDEX, name))
    for name in files:
        flush(written / name)
    if _INDEX in files:
        for name in ("model.safetensors", _INDEX):
            (target / name).unlink(missing_ok=True)
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(written / name, target / name)
    if any(_WEIGHTS.fullmatch(name) for name in files):
        for path in target.iterdir():
            if path.name not in files and (path.name == _INDEX or _WEIGHTS.fullmatch(path.name)):
                path.unlink()  # of an older result in another number of files
    flush(target)
    shutil.rmtree(written, ignore_errors=True)


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
