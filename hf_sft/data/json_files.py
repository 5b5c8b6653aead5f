"""Files of JSON: one record per line, one array of records, or one object with lists for training and evaluation.

Everything is read in blocks: only the record at hand is in memory, however large the file is.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hf_sft.data.records import (
    BOM,
    EVAL_NAMES,
    MAX_DEPTH,
    TOO_DEEP,
    BadRecord,
    Record,
    choose_list,
    decoder,
    in_list,
    is_too_deep,
    open_bytes,
    parse_json,
    shorten,
)

_BLOCK = 1 << 18  # bytes
_WAY_OUT = 'Write each record on one line (JSON lines), or all records in one array, "[...]".'
_LISTS = ("train", *EVAL_NAMES)
_OBJECT = "object with lists for training and evaluation"
_SPACE = re.compile(r"[ \t\n\r]*")
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
# Finds the end of a value that is JSON but not one of ours: NaN, a key that stands twice, an endless number.
_lenient = json.JSONDecoder(parse_constant=lambda name: None, parse_int=lambda digits: 0, parse_float=lambda digits: 0)


class JsonLayout(NamedTuple):
    """How a file is built: "lines", "array", or "lists" with the number of items of each list of its object."""

    kind: str
    sizes: dict[str, int]


def read_json(path: Path, part: str | None = None, split: str | None = None) -> Iterator[Record]:
    """The records of a file of JSON, in UTF-8 with or without BOM; see ``files.read_records``.

    Raises:
        ValueError: a broken array, an object over several lines, text that is no JSON; a split that there is not.
    """
    layout = json_layout(path)
    if layout.kind == "lists":
        name = choose_list(layout.sizes, part, split, path)
        yield from in_list(_read_list(path, name), name)
    elif split is not None:
        raise ValueError(f"{path} is one list and has no split {split!r}; leave split out")
    elif layout.kind == "array":
        with open_bytes(path) as file:
            text = _Text(file, path, "array")
            for number, value in enumerate(text.items(), 1):
                yield Record(number, value, "record")
            text.expect_end()
    else:
        with open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                line = (line.removeprefix(BOM) if number == 1 else line).strip()
                if line:
                    yield Record(number, parse_json(line))


def _read_list(path: Path, name: str) -> Iterator[Record]:
    with open_bytes(path) as file:
        text = _Text(file, path, _OBJECT)
        for key in text.fields():
            values = text.items() if text.peek() == "[" else iter([text.value()])
            for number, value in enumerate(values, 1):
                if key == name:
                    yield Record(number, value, "record")
            if key == name:
                return


# ---------------------------------------------------------------------------------------------------------------------
# What kind of file it is


def json_layout(path: Path) -> JsonLayout:
    """Look at the beginning of a file; an object with lists is read through.

    Raises:
        ValueError: an object over several lines, or text that is no JSON.
    """
    lines, whole = _first_lines(path)
    if not lines:
        return JsonLayout("lines", {})
    first, second = lines[0], lines[1] if len(lines) > 1 else None
    value = parse_json(first) if whole else BadRecord("the line goes on")
    if first.startswith(b"["):
        return JsonLayout("array" if _is_array(path, value, whole, first, second) else "lines", {})
    if first.startswith(b"{"):
        return JsonLayout("lines", {}) if isinstance(value, dict) and second else _object_layout(path)
    values = [parse_json(line) for line in lines]
    if not any(isinstance(value, (dict, list)) for value in values) and not all(isinstance(v, str) for v in values):
        shown = shorten(first.decode("utf-8", "replace"))
        raise ValueError(
            f"{path} holds no JSON: it begins with {shown!r}, like CSV or plain text. {_WAY_OUT} A table is read if its name "
            "ends in .csv or .tsv, a plain text under task_type pretrain if it ends in .txt."
        )
    return JsonLayout("lines", {})


def _first_lines(path: Path) -> tuple[list[bytes], bool]:
    """The first two lines that are not blank, at most a block of each; and whether the first is whole."""
    lines: list[bytes] = []
    whole, begun = True, False
    with open_bytes(path) as file:
        while len(lines) < 2 and whole and (block := file.readline(_BLOCK)):
            line = (block if begun else block.removeprefix(BOM)).strip()
            begun = True
            if line:
                whole = bool(lines) or len(block) < _BLOCK
                lines.append(line)
    return lines, whole


def _is_array(path: Path, value: Any, whole: bool, first: bytes, second: bytes | None) -> bool:
    """Whether a file whose first line begins with "[" is one array of records; else it has an array on each line."""
    if isinstance(value, list):
        return second is None and not _is_message(value[0] if value else None)
    if first == b"[":
        return True
    with open_bytes(path) as file:
        try:
            item = next(_Text(file, path, "array").items(), None)
        except ValueError:
            item = BadRecord("broken")
    if whole and (isinstance(item, BadRecord) or _is_message(item)):
        next_is_record = second is not None and isinstance(parse_json(second), (dict, list))
        return not next_is_record  # else they are lines, the first of them broken
    return not _is_message(item)


def _is_message(item: Any) -> bool:
    """The first item of a conversation, not of an array of records."""
    return isinstance(item, dict) and "role" in item


def _object_layout(path: Path) -> JsonLayout:
    """The layout of a file that begins with an object, which may go on over several lines."""
    sizes: dict[str, int] = {}
    others: set[str] = set()
    with open_bytes(path) as file:
        text = _Text(file, path, _OBJECT)
        try:
            text.peek()
            begun = text.place()[0]
            for key in text.fields():
                if text.peek() != "[":
                    if text.value() is not None or key not in _LISTS:  # null stands for no list
                        others.add(key)
                    continue
                sizes[key] = 0
                for _ in text.items():
                    sizes[key] += 1
            over_several = text.place()[0] != begun
            rest = text.peek()
        except ValueError:
            # Broken, but surely such an object: its items do not become records line by line.
            if sizes.keys() & set(_LISTS) and text.place()[0] > begun + 1:
                raise
            return JsonLayout("lines", {})
    lists = {name: count for name, count in sizes.items() if name in _LISTS}
    if not rest and ("train" in lists or (lists and len(lists) == len(sizes) + len(others))):
        if wrong := sorted(others & set(_LISTS)):
            raise ValueError(f"{path} has a list of training records, but its {wrong[0]!r} is no list; make it one")
        return JsonLayout("lists", lists)
    if over_several:
        found = "begins with a JSON object" if rest else "is one JSON object"
        raise ValueError(f"{path} {found} over several lines, and JSON lines or a JSON array are wanted. {_WAY_OUT}")
    return JsonLayout("lines", {})


# ---------------------------------------------------------------------------------------------------------------------
# JSON in blocks


class _Text:
    """The text of a JSON file, read in blocks and parsed value by value."""

    def __init__(self, file: BinaryIO, path: Path, wanted: str) -> None:
        self.file, self.path, self.wanted = file, path, wanted
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.text, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 1  # of the first character of the text

    def fields(self) -> Iterator[str]:
        """The keys of an object; the caller takes the value behind each before the next."""
        self._take("{")
        seen: set[str] = set()
        while self.peek() != "}" or seen:
            key = self.value()
            if not isinstance(key, str) or key in seen:
                raise self.error("Expecting property name, each once")
            seen.add(key)
            self._take(":")
            yield key
            if self.peek() == "}":
                break
            self._take(",")
        self._take("}")

    def items(self) -> Iterator[Any]:
        """The values of an array; one that is JSON but none that can be used is a BadRecord."""
        self._take("[")
        first = True
        while self.peek() != "]" or not first:
            first = False
            yield self.value()
            if self.peek() == "]":
                break
            self._take(",")
        self._take("]")

    def value(self) -> Any:
        """The value that begins here, or a BadRecord; the text goes on behind it."""
        self.peek()
        while True:
            end: int | None
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                self._refuse(error)
                value, end = None, None
            except RecursionError:
                value, end = BadRecord(TOO_DEEP), self._behind_brackets()
            except ValueError as error:
                value, end = BadRecord(f"no JSON: {error}"), self._behind_value()
            # A number at the end of the text may go on in the next block.
            if end is None or (self.text[end - 1] not in '"]}' and end + 4 > len(self.text)):
                if self._more():
                    continue
                if end is None:
                    raise self.error("Unterminated value")
            if self._brackets(end) > MAX_DEPTH and is_too_deep(value):
                value = BadRecord(TOO_DEEP)
            self.at = end
            return value

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def expect_end(self) -> None:
        if self.peek():
            raise self.error("Extra data")

    def place(self, at: int | None = None) -> tuple[int, int]:
        """Line and column of a position in the text, from 1."""
        at = self.at if at is None else at
        lines = self.text.count("\n", 0, at)
        return self.line + lines, (at - self.text.rfind("\n", 0, at) if lines else self.column + at)

    def error(self, message: str, at: int | None = None) -> ValueError:
        line, column = self.place(at)
        message = message.removesuffix(" at")
        return ValueError(
            f"{self.path}, line {line}: the file begins as a JSON {self.wanted} and is none: {message} at column "
            f"{column}. Mend it, or write one record per line (JSON lines), where bad_records: skip leaves bad lines out."
        )

    def _take(self, char: str) -> None:
        if self.peek() != char:
            raise self.error(f"Expecting {char!r}")
        self.at += 1

    def _brackets(self, end: int) -> int:
        return self.text.count("[", self.at, end) + self.text.count("{", self.at, end)

    def _more(self) -> bool:
        """Forget what is parsed and read on, at least as much again as is left: a long value is parsed a few times only."""
        if self.ended:
            return False
        data = self.file.read(max(_BLOCK, len(self.text) - self.at))
        self.line, self.column = self.place()
        try:
            self.text = self.text[self.at :] + self.decode(data, not data)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.at) + error.object.count(b"\n", 0, error.start)
            raise ValueError(
                f"{self.path}, line {line}: invalid UTF-8 in a JSON {self.wanted.split()[0]}. Save the file as UTF-8."
            ) from None
        self.at, self.ended = 0, not data
        return True

    def _refuse(self, error: json.JSONDecodeError) -> None:
        """Raise, unless the value may only be cut off at the end of the text."""
        cut = error.msg.startswith("Unterminated string") or error.pos + 16 > len(self.text)
        if self.ended or not cut:
            raise self.error(error.msg, error.pos) from None

    def _behind_value(self) -> int | None:
        """Where a value ends that is JSON but none of ours; None if that is behind the text."""
        try:
            return _lenient.raw_decode(self.text, self.at)[1]
        except json.JSONDecodeError as error:
            self._refuse(error)
            return None
        except RecursionError:
            return self._behind_brackets()

    def _behind_brackets(self) -> int | None:
        """The same by its brackets, for values too deep to parse."""
        depth = 0
        for match in _STRING_OR_BRACKET.finditer(self.text, self.at):
            char = match.group()
            depth += (char in "[{") - (char in "]}")
            if depth == 0:
                return match.end()
        return None
