"""Preference pairs: a prompt with an answer that was chosen and one that was rejected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from hf_sft.data.messages import (
    FormatError,
    absent,
    as_list,
    check_template_kwargs,
    check_text,
    check_turns,
    show,
    show_keys,
    tools_of,
)
from hf_sft.data.records import BadRecord
from hf_sft.data.turns import (
    Messages,
    instruction_prompt,
    is_dialogue,
    read_dialogue,
    read_turns,
    with_lists,
    with_system,
)


@dataclass(frozen=True)
class PreferencePair:
    """Two continuations of a prompt, all of them messages as chat templates take them.

    Args:
        prompt: ends with a user's or a tool's message.
        chosen, rejected: begin and end with an assistant's message; they differ.
    """

    prompt: list[dict[str, Any]]
    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None


class _Side(NamedTuple):
    """One of the two: an answer alone, or a whole dialogue with the prompt in it."""

    messages: list[dict[str, Any]]
    whole: bool


def to_preference(value: Any) -> PreferencePair:
    """The preference pair that a record holds.

    ``chosen`` and ``rejected`` are texts, turns or lists of messages. The prompt stands beside them (``prompt``,
    ``conversations``, ``messages``, ``conversation``, ``instruction`` with ``input`` and ``history``, or ``question``;
    the first of these counts) or begins both of them: all messages before the first difference.

    Raises:
        FormatError: no pair, or one that nothing can be learned from: equal sides, an empty answer, prompts that differ
            or do not end with a question.
    """
    if isinstance(value, PreferencePair):
        return value
    if isinstance(value, BadRecord):
        raise FormatError(value.reason)
    try:
        return _pair(with_lists(value))
    except RecursionError:
        raise FormatError("the record is nested too deeply") from None


def _pair(record: Any) -> PreferencePair:
    _check_keys(record)
    texts = is_dialogue(record["chosen"]) and is_dialogue(record["rejected"])
    chosen, rejected = (_side(record, name, texts) for name in ("chosen", "rejected"))
    if chosen.whole != rejected.whole:
        one, other = ("chosen", "rejected") if chosen.whole else ("rejected", "chosen")
        raise FormatError(f"{one} begins with the prompt, and {other} with the answer; write both alike")
    if chosen.messages == rejected.messages:
        raise FormatError("chosen and rejected are the same, so there is no preference to learn; leave the record out")
    beside = _prompt_beside(record)
    if not chosen.whole:
        if beside is None:
            raise FormatError(
                f"a preference pair without its prompt (the record has {show_keys(record)}); write prompt, a text or a "
                "list of messages, or begin both chosen and rejected with it"
            )
        prompt = check_turns(with_system(record.get("system"), beside), " of the prompt")
        answers = chosen.messages, rejected.messages
    else:
        length = _shared_turns(chosen.messages, rejected.messages)
        inside, answers = chosen.messages[:length], (chosen.messages[length:], rejected.messages[length:])
        _check_same_prompt(inside, chosen.messages, beside, record.get("prompt"))
        prompt = check_turns(with_system(record.get("system"), inside), " of the prompt")
    _check_prompt(prompt)
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        _check_answer(name, answer)
    return PreferencePair(prompt, *answers, tools_of(record), check_template_kwargs(record.get("chat_template_kwargs")))


def _check_keys(record: Any) -> None:
    if not isinstance(record, dict):
        raise FormatError(f"{show(record)} is no preference pair, an object with prompt, chosen and rejected")
    missing = [key for key in ("chosen", "rejected") if record.get(key) is None]
    if missing:
        found = f"the record has {show_keys({key: 0 for key, item in record.items() if item is not None})}"
        way_out = "write both answers" if len(missing) == 1 else "a preference pair needs prompt, chosen and rejected"
        raise FormatError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: {found}; {way_out}")


def _side(record: dict[str, Any], name: str, texts: bool) -> _Side:
    """One side of the record; ``texts``: both are dialogues written as one text."""
    value = as_list(record[name])
    if isinstance(value, str):
        check_text(value, name)
        if not texts or _prompt_beside(record) is not None:
            return _Side([{"role": "assistant", "content": value}], whole=False)
        messages = read_dialogue(value)
    else:
        messages = read_turns([value] if isinstance(value, dict) else value, name)
    checked = check_turns(messages, f" of {name}")
    return _Side(checked, whole=checked[0]["role"] != "assistant")


def _prompt_beside(record: dict[str, Any]) -> Messages | None:
    """The prompt's messages if it stands in a field of its own."""
    for key in ("prompt", "conversations", "messages", "conversation"):
        value = as_list(record.get(key))
        if isinstance(value, str) and key == "prompt":
            if value:
                dialogue = read_dialogue(value) if is_dialogue(value) else []
                begun = (
                    bool(dialogue) and not dialogue[-1]["content"]
                )  # ends with "Assistant:", for the answer to follow
                return dialogue[:-1] if begun else [{"role": "user", "content": check_text(value, key)}]
        elif not absent(value) and value != []:
            return read_turns(value, key)
    if not absent(record.get("instruction")):
        return instruction_prompt(record)
    if not absent(record.get("question")):
        return [{"role": "user", "content": check_text(record["question"], "question")}]
    return None


def _shared_turns(chosen: Messages, rejected: Messages) -> int:
    """Number of messages before the first difference of two dialogues."""
    shorter = min(len(chosen), len(rejected))
    length = next((n for n in range(shorter) if chosen[n] != rejected[n]), shorter)
    if length == shorter:
        raise FormatError("one of chosen and rejected is the beginning of the other; they must differ in an answer")
    for dialogue in (chosen, rejected):
        if dialogue[length]["role"] != "assistant":
            where = f"message {length} ({dialogue[length]['role']})"
            raise FormatError(
                f"the prompts of chosen and rejected differ, in {where}; they must differ in an answer alone"
            )
    return length


def _check_same_prompt(inside: Messages, chosen: Messages, beside: Messages | None, text: Any) -> None:
    """The prompt in both sides and the one beside them must agree."""
    if beside is None:
        return
    if isinstance(text, str):
        if text.strip() in [(message["content"] or "").strip() for message in inside]:
            return
    else:
        known = check_turns(beside, " of the prompt")
        if known in (inside, chosen, [message for message in inside if message["role"] != "system"]):
            return
    raise FormatError(
        f"the prompt beside chosen and rejected ({show(beside[-1].get('content'))}) differs from the one that they begin "
        f"with ({show(inside[-1].get('content') if inside else 'none')}); keep one of them"
    )


def _check_prompt(prompt: list[dict[str, Any]]) -> None:
    role = prompt[-1]["role"]
    if role not in ("user", "tool"):
        raise FormatError(
            f"the prompt ends with a message of the role {role}, but a preference is between answers to a user or a tool; "
            "end it with one of theirs"
        )


def _check_answer(name: str, answer: list[dict[str, Any]]) -> None:
    for number in (0, -1):
        role = answer[number]["role"]
        if role != "assistant":
            raise FormatError(
                f"{name} {'ends' if number else 'begins'} with a message of the role {role}, not an answer"
            )
    for message in answer:
        empty = not (message["content"] or "").strip() and not message.get("tool_calls")
        if message["role"] == "assistant" and empty:
            raise FormatError(f"the answer of {name} is empty; write it, or leave the record out")
