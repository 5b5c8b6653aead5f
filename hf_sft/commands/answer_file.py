"""Answers in a file, as they come: a run that was stopped goes on where it was.

While ``FILE`` is not complete, its lines stand in ``FILE.partial``, which becomes ``FILE`` with the last one. ``FILE.run.json``
says what the answers are of.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_sft.checkpoints.writing import flush
from hf_sft.data.cache import write_file


class AnswerFile:
    """A file of JSON lines that is gone on with by the run that began it, and by no other.

    Args:
        path: where the lines stand in the end; its folder is made.
        run: what makes the lines what they are: plain values under names that a user knows.
        step: lines come in so many at a time, and a file is gone on with at a multiple of it.

    Attributes:
        done: lines that are there already.
        is_complete: all of them are.

    Raises:
        ValueError: the file is of something else, or of another run.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any], step: int = 1) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.record = self.path.with_name(f"{self.path.name}.run.json")
        self.run, self.is_complete, self.done = run, self.path.exists(), 0
        there = next((file for file in (self.path, self.partial) if file.exists()), None)
        if there is not None:
            self._check(there, run)
        if not self.is_complete:
            self.done = self._keep_whole_lines(step)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write lines that survive the end of this process."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        if not self.partial.exists():
            write_file(self.record, json.dumps(self.run, indent=2, ensure_ascii=False) + "\n")
        with self.partial.open("a", encoding="utf-8") as file:
            file.write(lines)

    def complete(self) -> None:
        """Give the file its name."""
        if self.path.exists():
            raise ValueError(
                f"output {str(self.path)!r} has come into being meanwhile, and nothing is overwritten; the answers are in "
                f"{str(self.partial)!r}"
            )
        flush(self.partial)
        os.replace(self.partial, self.path)

    def _check(self, there: Path, run: Mapping[str, Any]) -> None:
        way_out = f"nothing is overwritten; name a new file, or remove {str(there)!r}"
        if not self.record.is_file():
            raise ValueError(f"output {str(there)!r} exists, and {way_out}")
        try:
            before = dict(json.loads(self.record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"output {str(there)!r} exists, {self.record} cannot be read ({error}), and {way_out}"
            ) from error
        now = json.loads(json.dumps(run))
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if changed:
            what = "; ".join(_difference(name, before.get(name), now.get(name)) for name in changed)
            raise ValueError(f"output {str(there)!r} exists and is of another run ({what}), and {way_out}")

    def _keep_whole_lines(self, step: int) -> int:
        """Drop the end of a file that was being written to; returns the number of lines left."""
        if not self.partial.exists():
            return 0
        lines = self.partial.read_bytes().splitlines(keepends=True)
        whole = len(lines)
        if lines and not lines[-1].endswith(b"\n"):
            whole -= 1
        whole -= whole % step
        os.truncate(self.partial, sum(map(len, lines[:whole])))
        return whole


def _difference(name: str, before: Any, now: Any) -> str:
    is_hash = re.fullmatch("[0-9a-f]{32,}", str(before)) or re.fullmatch("[0-9a-f]{32,}", str(now))
    return f"{name} differ" if is_hash else f"{name} was {before!r} and is {now!r}"
