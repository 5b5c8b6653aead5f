"""From records to conversations.

``FORMATS`` lists every shape of record that is known: a name, how it is recognised, how it becomes messages. The first row
that a record fits counts, so a record with ``messages``, ``chosen`` and ``rejected`` is a preference pair, and one with
``messages``, ``question`` and ``answer`` is messages. A declared format (``data_format``) counts before any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hf_sft.data.messages import (
    Conversation,
    FormatError,
    absent,
    as_list,
    check_messages,
    check_template_kwargs,
    check_text,
    show,
    show_keys,
    tools_of,
)
from hf_sft.data.preferences import to_preference
from hf_sft.data.records import BadRecord
from hf_sft.data.turns import Messages, instruction_prompt, pair, read_turns, with_lists, with_system

DATA_FORMATS = (
    "auto", "messages", "prompt_generation", "prompt_completion", "question_answer", "alpaca", "sharegpt", "firefly", "xtuner",
    "preference", "text",
)  # fmt: skip


class Format(NamedTuple):
    """A shape of record.

    Args:
        name: the value of ``data_format`` that declares it.
        title: its name in messages.
        keys: what it has; a bare list has none.
        messages: makes messages of a record, not checked yet.
        turn: key of the first turn, for formats whose records have the same key.
        not_turn: key that the first turn lacks.
    """

    name: str
    title: str
    keys: tuple[str, ...]
    messages: Callable[[Any], Any]
    turn: str | None = None
    not_turn: str | None = None

    def matches(self, record: Any) -> bool:
        if self.keys:
            if not isinstance(record, dict) or any(record.get(key) is None for key in self.keys):
                return False
        elif not isinstance(record, list):
            return False
        if self.turn is None and self.not_turn is None:
            return True
        turns: Any = record[self.keys[0]] if self.keys else record
        first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
        return (self.turn is None or first.get(self.turn) is not None) and first.get(self.not_turn) is None


def _two_texts(first: str, second: str) -> Callable[[Any], Messages]:
    return lambda record: pair(record[first], record[second], (first, second))


def _list_of(key: str) -> Callable[[Any], Messages]:
    return lambda record: read_turns(record[key], key)


def _array(record: list[Any]) -> Messages:
    return read_turns(record, "the record")


def _prompt_completion(record: dict[str, Any]) -> Messages:
    """Two texts, or a prompt of messages whose completion alone is learned: a text, or messages as well."""
    prompt, completion = as_list(record["prompt"]), as_list(record["completion"])
    if isinstance(prompt, list):
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if isinstance(completion, list):
            return _unlearned(prompt) + completion
    if isinstance(prompt, list) or isinstance(completion, list):
        raise FormatError(
            f"prompt is {type(prompt).__name__} and completion {type(completion).__name__}, but they must both be strings or "
            "both be lists of messages, or a list and a string"
        )
    return pair(prompt, completion, ("prompt", "completion"))


def _unlearned(messages: list[Any]) -> Messages:
    return [
        {**turn, "train": False} if isinstance(turn, dict) and turn.get("role") == "assistant" else turn
        for turn in messages
    ]


def _alpaca(record: dict[str, Any]) -> Messages:
    answer = {"role": "assistant", "content": check_text(record["output"], "output")}
    return [*instruction_prompt(record), answer]


def _preference(record: dict[str, Any]) -> Messages:
    """The prompt and the chosen answer, which alone is learned."""
    preference = to_preference(record)
    return _unlearned(preference.prompt) + preference.chosen


def _text(record: Any) -> Messages:
    raise FormatError(
        "'text' is plain text, which task_type pretrain reads; task_type sft needs questions and answers: write messages"
    )


# The first row that matches counts.
FORMATS: tuple[Format, ...] = (
    Format("preference", "chosen/rejected", ("chosen", "rejected"), _preference),
    Format("sharegpt", "array of {from, value}", (), _array, turn="from"),
    Format("messages", "array of {role, content}", (), lambda record: record, not_turn="from"),
    Format("sharegpt", "messages of {from, value}", ("messages",), _list_of("messages"), turn="from"),
    Format("messages", "messages", ("messages",), lambda record: record["messages"], not_turn="from"),
    Format("prompt_generation", "prompt/generation", ("prompt", "generation"), _two_texts("prompt", "generation")),
    Format("prompt_completion", "prompt/completion", ("prompt", "completion"), _prompt_completion),
    Format("question_answer", "question/answer", ("question", "answer"), _two_texts("question", "answer")),
    Format("alpaca", "instruction/input/output", ("instruction", "output"), _alpaca),
    Format("messages", "conversations of {role, content}", ("conversations",), _list_of("conversations"), turn="role"),
    Format("sharegpt", "conversations (ShareGPT)", ("conversations",), _list_of("conversations")),
    Format("firefly", "conversation of {human, assistant}", ("conversation",), _list_of("conversation"), turn="human"),
    Format("xtuner", "conversation of {input, output}", ("conversation",), _list_of("conversation"), turn="input"),
    Format("messages", "conversation of {role, content}", ("conversation",), _list_of("conversation"), turn="role"),
    Format("sharegpt", "conversation of {from, value}", ("conversation",), _list_of("conversation"), turn="from"),
    Format("text", "text", ("text",), _text),
)
_TITLES = ", ".join(row.title for row in FORMATS)


def to_conversation(value: Any, data_format: str = "auto") -> Conversation:
    """The conversation that a record holds.

    Of a preference pair it is the prompt and the chosen answer, and only the chosen answer is learned.

    Args:
        data_format: the name of the format that the record must be in, or ``auto``: the first of ``FORMATS`` that fits.

    Raises:
        FormatError: not in the format, or not well formed; the text says what was found, the rule and the way out.
        ValueError: no such format.
    """
    if data_format not in DATA_FORMATS:
        raise ValueError(f"data_format is {data_format!r}; it must be one of {', '.join(DATA_FORMATS)}")
    if isinstance(value, Conversation):
        return value
    if isinstance(value, BadRecord):
        raise FormatError(value.reason)
    try:
        record = with_lists(value)
        row = _row(record, data_format)
        fields = record if isinstance(record, dict) else {}
        _refuse_media(fields)
        messages = row.messages(record)
        if row.name != "preference":  # which has put it into the prompt
            messages = with_system(fields.get("system"), as_list(messages))
        kwargs = check_template_kwargs(fields.get("chat_template_kwargs"))
        return Conversation(check_messages(messages), tools_of(fields), kwargs, row.name)
    except RecursionError:
        raise FormatError("the record is nested too deeply") from None


def _refuse_media(fields: dict[str, Any]) -> None:
    """Raise for a record with pictures or sounds beside its text, which would be learned without them."""
    for key in ("image", "images", "video", "videos", "audio", "audios"):
        if not absent(fields.get(key)) and fields[key] != []:
            raise FormatError(f"the record has {key}, and texts alone are learned here; take such records out")


def _row(record: Any, data_format: str) -> Format:
    """The row of ``FORMATS`` that the record is in.

    Raises:
        FormatError: none, or another one than was declared.
    """
    declared = [row for row in FORMATS if data_format in ("auto", row.name)]
    row = next((row for row in declared if row.matches(record)), None)
    if row is not None:
        return row
    if isinstance(record, dict):
        _refuse_null(record, declared)
    found = f"an object with {show_keys(record)}" if isinstance(record, dict) else show(record)
    if data_format != "auto":
        title = " or ".join(row.title for row in declared)
        fit = next((row.name for row in FORMATS if row.matches(record)), None)
        other = f", as in {fit}: set data_format to {fit} or auto" if fit else ""
        raise FormatError(
            f"data_format is {data_format} ({title}), but the record is {found}{other or '; set data_format to auto'}, or "
            "mend the record"
        )
    half = next((key for key in ("chosen", "rejected") if isinstance(record, dict) and key in record), None)
    if half is not None:
        missing = "rejected" if half == "chosen" else "chosen"
        raise FormatError(f"a preference pair with {half} and without {missing}; write both")
    raise FormatError(f"no known format: {show(found, 120)}; known are {_TITLES}")


def _refuse_null(record: dict[str, Any], rows: list[Format]) -> None:
    """Raise for a record that would be in one of these formats if a value were not null."""
    rows = [row for row in rows if row.keys and record.keys() >= set(row.keys)]
    if rows:
        row = max(rows, key=lambda row: sum(not absent(record[key]) for key in row.keys))
        empty = [key for key in row.keys if record[key] is None]
        if not empty:
            return
        verb = "is" if len(empty) == 1 else "are"
        raise FormatError(
            f"{' and '.join(empty)} {verb} null, but {row.title} needs a text or messages there; write them"
        )
