"""Turns as other projects write them, to messages: ShareGPT, Firefly, XTuner, and hh-rlhf's texts."""

from __future__ import annotations

import re
from typing import Any

from hf_sft.data.messages import FormatError, absent, as_list, check_text, from_json, show, show_keys

Messages = list[Any]  # not checked yet

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}


# Keys whose lists may come as JSON texts, from the columns of tables.
_LIST_KEYS = ("messages", "conversations", "conversation")


def with_lists(record: Any) -> Any:
    """The record with lists of turns where tables have their JSON texts, NumPy arrays or tuples."""
    if not isinstance(record, dict):
        return as_list(record)
    found = {}
    for key in _LIST_KEYS:
        item = record.get(key)
        if item is None or isinstance(item, list):
            continue
        if isinstance(item, str) and not item.lstrip().startswith("["):
            found[key] = item or None
        else:
            found[key] = as_list(from_json(item, key, "a list of messages"))
    return {**record, **found} if found else record


def pair(prompt: Any, answer: Any, names: tuple[str, str]) -> Messages:
    """A question and its answer; ``names`` are theirs in errors."""
    return [
        {"role": "user", "content": check_text(prompt, names[0])},
        {"role": "assistant", "content": check_text(answer, names[1])},
    ]


def read_turns(value: Any, where: str) -> Messages:
    """The messages of a list of turns, each in any of the known shapes.

    Raises:
        FormatError: no list, or a turn of another shape.
    """
    turns = as_list(value)
    if not isinstance(turns, list):
        raise FormatError(f"{where} is {show(turns)}, but it must be a list of turns")
    return [message for number, turn in enumerate(turns) for message in _turn(turn, f"turn {number} of {where}")]


def _turn(turn: Any, where: str) -> Messages:
    if not isinstance(turn, dict):
        raise FormatError(f"{where} is {show(turn)}, but it must be an object")
    marks = {key: turn[key] for key in ("train", "weight") if turn.get(key) is not None}
    if turn.get("role") is not None:
        return [turn]
    if "from" in turn and "value" in turn:
        speaker = turn["from"]
        if speaker == "function_call":
            return [{"role": "assistant", "content": None, "tool_calls": _tool_calls(turn["value"], where), **marks}]
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            known = ", ".join([*_SHAREGPT_ROLES, "function_call"])
            raise FormatError(f"{where} is from {show(repr(speaker))}; known are {known}")
        return [{"role": _SHAREGPT_ROLES[speaker], "content": turn["value"], **marks}]
    for question, answer in (("human", "assistant"), ("input", "output")):
        if question in turn and answer in turn:
            asked, told = pair(turn[question], turn[answer], (f"{question} of {where}", f"{answer} of {where}"))
            return with_system(turn.get("system"), [asked, {**told, **marks}])
    raise FormatError(
        f"{where} has {show_keys(turn)}; it needs from/value, role/content, human/assistant or input/output"
    )


def _tool_calls(value: Any, where: str) -> Messages:
    """A function call, or several, written as JSON: ``{"name": ..., "arguments": ...}``."""
    try:
        calls = as_list(from_json(value, "it", "it"))
    except FormatError:
        raise FormatError(f"{where} is a function_call that is no JSON: {show(value)}") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise FormatError(f"{where} is a function_call without a name: {show(value)}")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def with_system(text: Any, messages: Messages) -> Messages:
    """The messages behind the system prompt that stands beside them, if there is one.

    Raises:
        FormatError: they begin with another system prompt.
    """
    if absent(text) or not isinstance(messages, list):
        return messages
    check_text(text, "system")
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    if first.get("content") != text:
        raise FormatError(
            f"system is {show(text)}, but the turns begin with another system prompt, {show(first.get('content'))}; "
            "keep one of them"
        )
    return messages


def instruction_prompt(record: dict[str, Any]) -> Messages:
    """``instruction`` with its ``input`` on a line of its own, after ``history`` ([question, answer] pairs)."""
    history = as_list(from_json(record.get("history"), "history", "a list of [question, answer] pairs"))
    pairs = [as_list(item) for item in history] if isinstance(history, list) else history or []
    if not isinstance(pairs, list) or not all(isinstance(item, list) and len(item) == 2 for item in pairs):
        raise FormatError(f"history is {show(history)}, but it must be a list of [question, answer] pairs")
    turns: Messages = []
    for number, (question, answer) in enumerate(pairs):
        turns += pair(question, answer, (f"question {number} of history", f"answer {number} of history"))
    prompt = check_text(record["instruction"], "instruction")
    if not absent(record.get("input")):
        prompt = f"{prompt}\n{check_text(record['input'], 'input')}"
    return [*turns, {"role": "user", "content": prompt}]


# hh-rlhf: one text that holds a whole dialogue.
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \n]?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(text: Any) -> bool:
    """Whether a text is a dialogue as hh-rlhf writes it: a blank line, ``Human: ...``, a blank line, ``Assistant: ...``."""
    return isinstance(text, str) and bool(re.match(r"\s*Human:", text)) and "\n\nAssistant:" in text


def read_dialogue(text: str) -> Messages:
    """The messages of such a text."""
    speakers = list(_SPEAKER.finditer(text))
    ends = [following.start() for following in speakers[1:]] + [len(text)]
    return [
        {"role": _HH_ROLES[speaker[1]], "content": text[speaker.end() : end].strip()}
        for speaker, end in zip(speakers, ends, strict=True)
    ]
