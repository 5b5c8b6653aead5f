"""From files to records: JSON lines, or one JSON array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class BadRecord:
    """Stands for a record that cannot be read; ``reason`` says why."""

    reason: str


class Record(NamedTuple):
    """One record of a file: its line number (in an array: its position, from 1) and its value, or a BadRecord."""

    number: int
    value: Any
    unit: str = "line"


_FOREIGN = {  # first bytes of files that are something else
    b"\x80": "a pickle, which can run code when it is opened",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "compressed by gzip",
    b"PK\x03\x04": "a zip archive (or a PyTorch checkpoint)",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value; write a number, a string or null")


decoder = json.JSONDecoder(parse_constant=_refuse_constant)


def _parse(line: bytes) -> Any:
    """The JSON value of a line, or a BadRecord."""
    try:
        return decoder.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(
            f"invalid UTF-8: byte 0x{line[error.start]:02x} at position {error.start}; save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        return BadRecord(f"no JSON: {error.msg} at column {error.colno}: {shorten(error.doc)}")
    except RecursionError:
        return BadRecord("no JSON that can be read: nested too deeply")
    except ValueError as error:
        return BadRecord(f"no JSON: {error}")


def _is_array_of_records(value: Any) -> bool:
    """True for an array file; false for one conversation, itself an array of messages."""
    return isinstance(value, list) and not (value and isinstance(value[0], dict) and "role" in value[0])


def _refuse_other_text(path: Path, lines: list[bytes]) -> None:
    """Raise for a file whose first lines show that no line of it will be a record."""
    if any(isinstance(_parse(line), (dict, list)) for line in lines):
        return  # JSON lines, one of them perhaps broken
    way_out = 'Write each record on one line (JSON lines), or all records in one array, "[...]".'
    if not lines[0].startswith(b"{"):
        first = shorten(lines[0].decode("utf-8", "replace"))
        raise ValueError(f"{path} holds no JSON: it begins with {first!r}, like CSV or plain text. {way_out}")
    try:
        text = path.read_bytes().decode("utf-8-sig").lstrip()
        _, end = decoder.raw_decode(text)
    except (ValueError, RecursionError):
        return
    if "\n" in text[:end]:
        whole = "begins with a JSON object" if text[end:].strip() else "is one JSON object"
        raise ValueError(f"{path} {whole} over several lines, and JSON lines or a JSON array are wanted. {way_out}")


def _read_array(path: Path) -> list[Any] | None:
    """The items if the whole file is one JSON array of records, None if it is JSON lines."""
    with path.open("rb") as file:
        lines = [line for line in (file.readline().removeprefix(b"\xef\xbb\xbf").strip() for _ in range(2)) if line]
        while not lines:
            line = file.readline()
            if not line:
                return None
            lines = [line.strip()] if line.strip() else []
    if not lines[0].startswith(b"["):
        _refuse_other_text(path, lines)
        return None
    first = _parse(lines[0])
    if not isinstance(first, BadRecord):  # a line that is complete: an array file only if nothing follows it
        if not _is_array_of_records(first):
            return None
        whole = _parse(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        return None if isinstance(whole, BadRecord) else whole
    if len(lines[0]) > 1 and len(lines) > 1 and not isinstance(_parse(lines[1]), BadRecord):
        return None  # JSON lines whose first line is broken
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return decoder.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line_number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line_number}: invalid UTF-8 in a JSON array. Save the file as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: the file begins as a JSON array and is none: {error.msg} at column "
            f"{error.colno}. Mend it, or write one record per line (JSON lines), where bad_records: skip leaves bad "
            "lines out."
        ) from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: the file begins as a JSON array and is none: {error}. Mend it.") from None


def check_file(path: str | Path) -> Path:
    """The path, if it names a file that can hold JSON records.

    Raises:
        ValueError: no such file, a folder, an empty file, or a file of another kind, such as a pickle.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but a data file is wanted. Name one file of JSON lines or a JSON array.")
    if not path.is_file():
        raise ValueError(f"{path}: no such data file. Check the path; a relative one starts at {Path.cwd()}.")
    way_out = "Write the records as JSON lines in UTF-8, one per line."
    if path.suffix.lower() in _PICKLES:
        raise ValueError(f"{path} is {_FOREIGN[bytes([128])]}; such files are not read. {way_out}")
    with path.open("rb") as file:
        head = file.read(8)
    for magic, kind in _FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {kind}; such files are not read. {way_out}")
    if not head:
        raise ValueError(f"{path} is empty (0 bytes), but at least one record is needed. {way_out}")
    return path


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a file of JSON lines (blank lines are skipped) or of one JSON array, in UTF-8 with or without BOM.

    A record that cannot be read is a :class:`BadRecord`; the caller decides whether to stop.

    Raises:
        ValueError: see :func:`check_file`; also a file without any record, a broken JSON array, an object over several
            lines, and text that is no JSON.
    """
    path = check_file(path)
    items = _read_array(path)
    number = 0
    if items is not None:
        for number, value in enumerate(items, 1):
            yield Record(number, value, "record")
    else:
        with path.open("rb") as file:
            for line_number, line in enumerate(file, 1):
                if line_number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                line = line.strip()
                if line:
                    number += 1
                    yield Record(line_number, _parse(line))
    if not number:
        raise ValueError(f"{path} holds no record, only blank text. Write the records as JSON lines, one per line.")


def shorten(value: Any, width: int = 60) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = re.sub(r"\s+", " ", text)
    return text if len(text) <= width else text[: width - 3] + "..."
