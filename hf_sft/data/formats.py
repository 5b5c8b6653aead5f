"""From records to conversations.

``FORMATS`` lists every shape of record that is known: a name, how it is recognised, how it becomes a conversation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from hf_sft.data.files import BadRecord, decoder, shorten

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
class Conversation:
    """Messages in the form that chat templates take, with the tools and template variables of this conversation."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        found = f"{type(value).__name__} {shorten(value)}"
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
        found = f"{type(message).__name__} {shorten(message)}"
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
        raise FormatError(f"tool_calls of {where} is {shorten(calls)}, but it must be a list of objects")
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
            f"messages is {type(messages).__name__} {shorten(messages)}, but it must be a list of messages"
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


def _alpaca(record: dict[str, Any]) -> list[Any]:
    """``instruction`` with its ``input`` on a line of its own, after ``system`` and ``history`` ([question, answer] pairs)."""
    turns = _system(record)
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise FormatError(f"history is {shorten(history)}, but it must be a list of [question, answer] pairs")
    for number, (question, answer) in enumerate(history):
        turns += _pair(question, answer, (f"question {number} of history", f"answer {number} of history"))
    prompt = _check_text(record["instruction"], "instruction")
    if record.get("input"):
        prompt = f"{prompt}\n{_check_text(record['input'], 'input')}"
    return turns + _pair(prompt, record["output"], ("instruction", "output"))


_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}


def _turns(key: str) -> Callable[[Any], list[Any]]:
    """Lists of turns as ShareGPT (from/value), Firefly (human/assistant) and XTuner (system/input/output) write them."""

    def messages(record: dict[str, Any]) -> list[Any]:
        turns = record[key]
        if not isinstance(turns, list):
            raise FormatError(f"{key} is {shorten(turns)}, but it must be a list of turns")
        found = _system(record)
        for number, turn in enumerate(turns):
            found += _turn(turn, f"turn {number} of {key}")
        return found

    return messages


def _turn(turn: Any, where: str) -> list[Any]:
    """The messages of one turn."""
    if not isinstance(turn, dict):
        raise FormatError(f"{where} is {shorten(turn)}, but it must be an object")
    marks = {"train": turn["train"]} if turn.get("train") is not None else {}
    if "role" in turn:
        return [turn]
    if "from" in turn and "value" in turn:
        speaker = turn["from"]
        if speaker == "function_call":
            return [{"role": "assistant", "content": None, "tool_calls": _tool_calls(turn["value"], where), **marks}]
        if speaker not in _SHAREGPT_ROLES:
            known = ", ".join([*_SHAREGPT_ROLES, "function_call"])
            raise FormatError(f"{where} is from {speaker!r}; known are {known}")
        return [{"role": _SHAREGPT_ROLES[speaker], "content": turn["value"], **marks}]
    if "human" in turn and "assistant" in turn:
        question, answer = _pair(turn["human"], turn["assistant"], (f"human of {where}", f"assistant of {where}"))
        return [question, {**answer, **marks}]
    if "input" in turn and "output" in turn:
        question, answer = _pair(turn["input"], turn["output"], (f"input of {where}", f"output of {where}"))
        return [*_system(turn), question, {**answer, **marks}]
    raise FormatError(f"{where} has {', '.join(map(repr, turn))}; it needs from/value, human/assistant or input/output")


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """A function call, or several, written as JSON: ``{"name": ..., "arguments": ...}``."""
    try:
        calls = decoder.decode(value) if isinstance(value, str) else value
    except ValueError as error:
        raise FormatError(f"{where} is a function_call that is no JSON ({error}): {shorten(value)}") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise FormatError(f"{where} is a function_call without a name: {shorten(value)}")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _system(record: dict[str, Any]) -> list[Any]:
    """The system prompt that stands beside the turns, if there is one."""
    text = record.get("system")
    return [{"role": "system", "content": _check_text(text, "system")}] if text else []


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
    Format("instruction/input/output", ("instruction", "output"), _alpaca),
    Format("conversations (ShareGPT)", ("conversations",), _turns("conversations")),
    Format("conversation (Firefly, XTuner)", ("conversation",), _turns("conversation")),
)


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = decoder.decode(value)
        except ValueError as error:
            raise FormatError(
                f"tools is a string that is no JSON ({error}); write a list of function schemas"
            ) from None
    if value in (None, "", []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise FormatError(f"tools is {shorten(value)}, but it must be a list of function schemas (objects)")
    return value


def check_template_kwargs(value: Any) -> dict[str, Any] | None:
    """Variables for the chat template, or None.

    Raises:
        FormatError: no object, or a name that hf_sft sets itself.
    """
    if value is None or value == {}:
        return None
    if not isinstance(value, dict):
        raise FormatError(f"chat_template_kwargs is {shorten(value)}, but it must be an object of template variables")
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
    "chosen": "a preference pair",
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
    found = f"an object with {', '.join(map(repr, value)) or 'no keys'}" if isinstance(value, dict) else shorten(value)
    known = ", ".join(row.name for row in FORMATS)
    for key, meaning in _OTHER_FORMATS.items():
        if isinstance(value, dict) and key in value:
            raise FormatError(f"{key!r} is {meaning}, which is not read in this version; write it as one of {known}")
    raise FormatError(f"no known format: {shorten(found, 120)}; known are {known}")
