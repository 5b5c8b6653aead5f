"""What a record of a data file is, how one is written as JSON, and the bytes of a file."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
MAX_DEPTH = 100  # levels of lists and objects in a record; what reads it later may recurse
EVAL_NAMES = (
    "validation",
    "valid",
    "val",
    "dev",
    "eval",
    "test",
)  # lists for evaluation; the first that is there counts


@dataclass(frozen=True)
class BadRecord:
    """Stands for a record that cannot be read; ``reason`` says why."""

    reason: str


class Record(NamedTuple):
    """One record of a data file.

    Args:
        number: its line in the file, or its position from 1, as ``unit`` says.
        value: a JSON value, or a :class:`BadRecord`.
        unit: line, record, row or document.
        file: the file's name inside a folder.
    """

    number: int
    value: Any
    unit: str = "line"
    file: str | None = None

    def where(self, name: Any) -> str:
        """Its place for messages: "chats.jsonl, line 3"; ``name`` is what was read."""
        place = name if self.file is None else f"{name}/{self.file}"
        return f"{place}, {self.unit} {self.number}"


# ---- JSON ----


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value; write a number, a string or null")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each of whose keys stands once: JSON does not say which of two values counts."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shorten(twice)!r} stands twice in one object; leave one of them")
    return value


decoder = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)
TOO_DEEP = f"nested too deeply: more than {MAX_DEPTH} lists and objects in each other"


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects stand more than ``MAX_DEPTH`` deep."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, (list, dict))]:
        depth += 1
        if depth > MAX_DEPTH:
            return True
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return False


def parse_json(data: bytes | str) -> Any:
    """The JSON value that the data are, or a :class:`BadRecord`."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = decoder.decode(text)
        deep = text.count("[") + text.count("{") > MAX_DEPTH and is_too_deep(value)
        return BadRecord(TOO_DEEP) if deep else value
    except UnicodeDecodeError as error:
        return BadRecord(
            f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}; save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        return BadRecord(f"no JSON: {error.msg} at column {error.colno}: {shorten(error.doc)}")
    except RecursionError:
        return BadRecord(TOO_DEEP)
    except ValueError as error:
        return BadRecord(f"no JSON: {error}")


def shorten(value: Any, width: int = 60) -> str:
    """The value on one line of at most ``width`` characters."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (RecursionError, ValueError):
        text = f"{type(value).__name__} that cannot be shown"
    cut = text[: 20 * width]  # the rest of a long text is not looked at
    line = re.sub(r"\s+", " ", cut)
    return line if len(line) <= width and len(cut) == len(text) else line[: width - 3] + "..."


# ---- bytes ----


def open_bytes(path: Path) -> BinaryIO:
    """The file's bytes as a stream, unpacked if they are compressed by gzip, whatever the file is called."""
    file = path.open("rb")
    if file.peek(len(GZIP))[: len(GZIP)] != GZIP:
        return file
    file.close()
    return cast(BinaryIO, io.BufferedReader(gzip.open(path, "rb")))


def ending(path: Path) -> str:
    """The ending that says what a file holds: ".jsonl" for data.JSONL.gz."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


# ---- data that hold several lists ----


def choose_list(sizes: Mapping[str, int], part: str | None, split: str | None, where: Any) -> str:
    """The name of the list that is read, of those that a file, a folder or a data set holds.

    Args:
        sizes: name -> how much it holds; an empty list is taken only if there is no other.
        part: ``eval`` takes the first of ``EVAL_NAMES``, or the only list there is; else ``train`` is taken.
        split: the name itself.

    Raises:
        ValueError: none of that name, or none that is meant for this.
    """
    if split is not None:
        if split in sizes:
            return split
        raise ValueError(f"{where} has no split {split!r}; it has {', '.join(sizes)}. Set split to one of them.")
    wanted = EVAL_NAMES if part == "eval" else ("train",)
    found = [name for name in wanted if name in sizes]
    if found:
        return next((name for name in found if sizes[name]), found[0])
    if len(sizes) == 1 and (part == "eval" or not sizes.keys() & set(EVAL_NAMES)):
        return next(iter(sizes))
    raise ValueError(
        f"{where} has no list {' or '.join(map(repr, wanted))}; it has {', '.join(sizes)}. Name one of them with split."
    )


def both_parts(sizes: Mapping[str, int]) -> frozenset[str]:
    """{"train", "eval"} if there are lists of both kinds that hold something, else nothing."""
    both = sizes.get("train") and any(sizes.get(name) for name in EVAL_NAMES)
    return frozenset({"train", "eval"}) if both else frozenset()


def in_list(records: Iterator[Record], name: str) -> Iterator[Record]:
    """The records, whose unit says in which list they stand."""
    return (record._replace(unit=f"{name} {record.unit}") for record in records)
