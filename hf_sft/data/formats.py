"""From files to records, and from records to conversations.

``FORMATS`` lists every shape of record that is known: a name, how it is recognised, how it becomes a conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROLES = ("system", "developer", "user", "assistant", "tool")
# Texts of a message that a template may write, beside its content. Templates disagree on the name.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Arguments of apply_chat_template that are ours to set.
_RESERVED_KWARGS = frozenset(
    "conversation messages tools documents chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)


class FormatError(ValueError):
    """A record that is no conversation in any known format."""


@dataclass(frozen=True)
class BadRecord:
    """Stands for a record that cannot be read; ``reason`` says why."""

    reason: str


class Record(NamedTuple):
    """One record of a file: its line number (in an array: its position, from 1) and its value, or a BadRecord."""

    number: int
    value: Any
    unit: str = "line"


@dataclass(frozen=True)
class Conversation:
    """Messages in the form that chat templates take, with the tools and template variables of this conversation."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Files


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


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)


def _parse(line: bytes) -> Any:
    """The JSON value of a line, or a BadRecord."""
    try:
        return _decoder.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(
            f"invalid UTF-8: byte 0x{line[error.start]:02x} at position {error.start}; save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        return BadRecord(f"no JSON: {error.msg} at column {error.colno}: {_shorten(error.doc)}")
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
        first = _shorten(lines[0].decode("utf-8", "replace"))
        raise ValueError(f"{path} holds no JSON: it begins with {first!r}, like CSV or plain text. {way_out}")
    try:
        text = path.read_bytes().decode("utf-8-sig").lstrip()
        _, end = _decoder.raw_decode(text)
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
        return _decoder.decode(data.decode("utf-8"))
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


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def _shorten(value: Any, width: int = 60) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = re.sub(r"\s+", " ", text)
    return text if len(text) <= width else text[: width - 3] + "..."


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        found = f"{type(value).__name__} {_shorten(value)}"
        raise FormatError(f"{where} is {found}, but it must be a string; images and other parts are not supported")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise FormatError(
            f"{where} holds half of a surrogate pair (U+{code:04X}), which is no text; remove it"
        ) from None
    return value


def _check_message(index: int, message: Any) -> dict[str, Any]:
    where = f"message {index}"
    if not isinstance(message, dict):
        found = f"{type(message).__name__} {_shorten(message)}"
        raise FormatError(f"{where} is {found}, but it must be an object with role and content")
    # Arrow fills keys that a message lacks with None.
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    role = message.get("role")
    if role not in ROLES:
        raise FormatError(f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
    for key in REASONING_KEYS:
        if key in message:
            _check_text(message[key], f"{key} of {where}")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise FormatError(f"tool_calls of {where} is {_shorten(calls)}, but it must be a list of objects")
    content = message.get("content")
    if content is None:
        if role != "assistant" or not (calls or any(key in message for key in REASONING_KEYS)):
            raise FormatError(
                f"{where} ({role}) has no content; only an assistant's tool call or reasoning may do without"
            )
        message["content"] = None
    else:
        _check_text(content, f"content of {where}")
    if "train" in message and (not isinstance(message["train"], bool) or (message["train"] and role != "assistant")):
        raise FormatError(
            f"train of {where} ({role}) is {message['train']!r}; it must be true or false, and only assistant turns "
            "are trained"
        )
    return message


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A checked copy of the messages, without keys that are None.

    Raises:
        FormatError: no messages, no assistant turn, an unknown role, content that is no string. ``content`` may be None
            only in an assistant's message that has ``tool_calls`` or reasoning.
    """
    if not isinstance(messages, (list, tuple)):
        raise FormatError(
            f"messages is {type(messages).__name__} {_shorten(messages)}, but it must be a list of messages"
        )
    if not messages:
        raise FormatError("the conversation has no messages; at least one assistant turn is needed")
    checked = [_check_message(index, message) for index, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message in checked):
        raise FormatError("the conversation has no assistant turn, so there is nothing to learn; add one")
    return checked


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def _pair(prompt: Any, answer: Any, names: tuple[str, str]) -> list[Any]:
    return [
        {"role": "user", "content": _check_text(prompt, names[0])},
        {"role": "assistant", "content": _check_text(answer, names[1])},
    ]


def _two_texts(first: str, second: str) -> Callable[[Any], list[Any]]:
    return lambda record: _pair(record[first], record[second], (first, second))


def _prompt_completion(record: dict[str, Any]) -> list[Any]:
    """Two strings, or two lists of messages of which only the completion is learned."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise FormatError("prompt and completion must both be strings or both be lists of messages")
    if not isinstance(prompt, list):
        return _pair(prompt, completion, ("prompt", "completion"))
    past = [
        {**turn, "train": False} if isinstance(turn, dict) and turn.get("role") == "assistant" else turn
        for turn in prompt
    ]
    return past + completion


class Format(NamedTuple):
    """A shape of record: its name, the keys that it has (a list has none), and the messages in it."""

    name: str
    keys: tuple[str, ...]
    messages: Callable[[Any], Any]

    def matches(self, record: Any) -> bool:
        if not self.keys:
            return isinstance(record, list)
        return isinstance(record, dict) and all(record.get(key) is not None for key in self.keys)


# The first row that matches counts.
FORMATS: tuple[Format, ...] = (
    Format("array of {role, content}", (), lambda record: record),
    Format("messages", ("messages",), lambda record: record["messages"]),
    Format("prompt/generation", ("prompt", "generation"), _two_texts("prompt", "generation")),
    Format("prompt/completion", ("prompt", "completion"), _prompt_completion),
    Format("question/answer", ("question", "answer"), _two_texts("question", "answer")),
)


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = _decoder.decode(value)
        except ValueError as error:
            raise FormatError(
                f"tools is a string that is no JSON ({error}); write a list of function schemas"
            ) from None
    if value in (None, "", []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise FormatError(f"tools is {_shorten(value)}, but it must be a list of function schemas (objects)")
    return value


def check_template_kwargs(value: Any) -> dict[str, Any] | None:
    """Variables for the chat template, or None.

    Raises:
        FormatError: no object, or a name that hf_sft sets itself.
    """
    if value is None or value == {}:
        return None
    if not isinstance(value, dict):
        raise FormatError(f"chat_template_kwargs is {_shorten(value)}, but it must be an object of template variables")
    taken = sorted(_RESERVED_KWARGS & value.keys())
    if taken:
        raise FormatError(f"chat_template_kwargs sets {', '.join(taken)}, which cannot be changed here; remove it")
    return value


def _refuse_null(record: dict[str, Any]) -> None:
    """Raise for a record that would be in a known format if a value were not null."""
    rows = [row for row in FORMATS if row.keys and record.keys() >= set(row.keys)]
    if rows:
        row = max(rows, key=lambda row: sum(record[key] is not None for key in row.keys))
        empty = [key for key in row.keys if record[key] is None]
        verb = "is" if len(empty) == 1 else "are"
        raise FormatError(
            f"{' and '.join(empty)} {verb} null, but {row.name} needs a text or messages there; write them"
        )


# What records of other formats are known by, to say so.
_OTHER_FORMATS = {
    "conversations": "ShareGPT's list of turns (from/value become role/content)",
    "chosen": "a preference pair",
    "instruction": "Alpaca's question (with its input it becomes the prompt, and output the completion)",
    "text": "plain text, as pretraining reads it",
}


def to_conversation(value: Any) -> Conversation:
    """The conversation that a record holds, in whichever of ``FORMATS`` it is.

    Raises:
        FormatError: no known format, or not well formed; the text says what was found, the rule and the way out.
    """
    if isinstance(value, Conversation):
        return value
    if isinstance(value, BadRecord):
        raise FormatError(value.reason)
    for row in FORMATS:
        if row.matches(value):
            extra = value if isinstance(value, dict) else {}
            return Conversation(
                check_messages(row.messages(value)),
                _tools(extra.get("tools")),
                check_template_kwargs(extra.get("chat_template_kwargs")),
            )
    if isinstance(value, dict):
        _refuse_null(value)
    found = f"an object with {', '.join(map(repr, value)) or 'no keys'}" if isinstance(value, dict) else _shorten(value)
    known = ", ".join(row.name for row in FORMATS)
    for key, meaning in _OTHER_FORMATS.items():
        if isinstance(value, dict) and key in value:
            raise FormatError(f"{key!r} is {meaning}, which is not read in this version; write it as one of {known}")
    raise FormatError(f"no known format: {_shorten(found, 120)}; known are {known}")
