"""A folder that stands whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_folder(output_dir: str, what: str) -> Iterator[Path]:
    """A folder to write ``what`` to: it stands at ``output_dir`` if nothing fails, and nowhere otherwise.

    Raises:
        ValueError: something is there already.
    """
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output_dir {output_dir!r} is not empty; {what} is written to a new folder.")
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
            written = Path(beside) / "model"
            written.mkdir()
            yield written
            if target.exists():
                target.rmdir()  # empty, as checked; rename wants it gone on some systems
            os.replace(written, target)
    except BaseException:
        for parent in made:
            with suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise
