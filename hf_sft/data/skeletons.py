"""Skeletons: rendered conversations in which every text is replaced by a sentinel, so that nothing is searched for in texts.

    messages   user: "Hi"   assistant: "Hello"
    skeleton   <|im_start|>user\\n(0)<|im_end|>\\n<|im_start|>assistant\\n(1)<|im_end|>\\n

Whitespace around a text and tags that the template knows (``</think>``) stay in the skeleton, so what the template
strips or splits off is seen there too.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_sft.data.messages import REASONING_KEYS

# Noncharacters, which Unicode sets aside for a program's inner use: no template, tokenizer or data gives them a meaning, and
# no strip() removes them. Two for sentinels, two for special tokens that are hidden, two for template tags.
MARKS = tuple(map(chr, range(0xFDD0, 0xFDD6)))
SENTINEL = f"{MARKS[0]}{{}}{MARKS[1]}"
SLOT = re.compile(f"{MARKS[0]}(\\d+){MARKS[1]}")
_TEXT_KEYS = ("content", *REASONING_KEYS)

Messages = list[dict[str, Any]]
# (messages, add_generation_prompt) -> text
Render = Callable[[Messages, bool], str]


class EncodingError(ValueError):
    """A conversation whose supervised tokens are not certain; it must be left out or mended."""


class TemplateRefusal(EncodingError):
    """A chat template that raises an error for a conversation; ``kind`` is the name of the error's class."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


def refuse_marks(text: str) -> None:
    """Raise EncodingError for a rendered text that holds one of the marks."""
    if any(mark in text for mark in MARKS):
        raise EncodingError("a text holds a noncharacter of U+FDD0 to U+FDD5, which are used inside; remove it")


def without_sentinels(text: str) -> str:
    """A message for users, which may quote a skeleton."""
    return re.sub(f"[{''.join(MARKS)}]", "", SLOT.sub("...", text))


@dataclass(frozen=True)
class Markers:
    """What has a meaning in rendered text.

    Args:
        special: the special tokens, one of which ends a turn.
        border: where a prompt may end: behind a special or added token, or whitespace.
        tags: tags that the template's code knows, as one group; None if there are none.
        openers: special tokens that begin any turn and end none.
    """

    special: re.Pattern[str]
    border: re.Pattern[str]
    tags: re.Pattern[str] | None
    openers: frozenset[str] = frozenset()

    def opens(self, text: str) -> bool:
        """Whether there is an opener in the text."""
        return not self.openers.isdisjoint(self.special.findall(text))


def template_tags(template: str) -> re.Pattern[str] | None:
    """The tags that a template mentions, ``<think>`` or ``[/THINK]``: it may cut texts at them."""
    tags = sorted(set(re.findall(r"</?[\w:.-]+>|\[/?[A-Z_]+\]", template)), key=lambda tag: (-len(tag), tag))
    return re.compile("(" + "|".join(map(re.escape, tags)) + ")") if tags else None


@dataclass(frozen=True)
class Slot:
    """A text of a message: its content, or what follows the last tag in it (``answer``), must be written; the name of a tool
    call (``name``) may be written again with the tool's result."""

    message: int
    answer: bool = False
    name: bool = False


@dataclass
class Masked:
    """Messages with sentinels in place of texts: ``texts[n]`` and ``slots[n]`` belong to sentinel n."""

    messages: Messages
    texts: list[str] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    empties: bool = False  # whether blank contents are masked

    @classmethod
    def of(cls, messages: Messages, tags: re.Pattern[str] | None, *, everything: bool, empties: bool = False) -> Masked:
        """Mask all texts and names of tool calls, or the assistant's texts alone.

        Args:
            empties: mask blank contents too, so that their places are seen.
        """
        masked = cls([])
        for index, message in enumerate(messages):
            if everything or message["role"] == "assistant":
                message = dict(message)
                for key in _TEXT_KEYS:
                    if isinstance(message.get(key), str):
                        message[key] = masked._mask_text(message[key], tags, index, key == "content")
                if empties and message.get("content") is not None and not message.get("tool_calls"):
                    message["content"] = masked._mask_blank(message["content"], index)
                if everything and message.get("tool_calls"):
                    message["tool_calls"] = [masked._mask_name(call, index) for call in message["tool_calls"]]
            masked.messages.append(message)
        return masked

    def _mask_text(self, text: str, tags: re.Pattern[str] | None, index: int, content: bool) -> str:
        parts = tags.split(text) if tags else [text]
        first = len(self.texts)
        for n in range(0, len(parts), 2):  # the odd ones are tags
            part = parts[n]
            core = part.strip()
            if core:
                begin = 0 if len(core) == len(part) else part.index(core)
                parts[n] = part[:begin] + self._add(core, Slot(index)) + part[begin + len(core) :]
        if content and len(self.texts) > first:
            self.slots[-1] = Slot(index, answer=True)
        return "".join(parts)

    def _mask_blank(self, content: str, index: int) -> str:
        if content.strip():
            return content
        self.empties = True
        return content + self._add("", Slot(index, answer=True))

    def _mask_name(self, call: dict[str, Any], index: int) -> dict[str, Any]:
        """The tool call with a sentinel for its name: templates write the turn's text before it in several ways."""
        function = call.get("function")
        if isinstance(function, dict):
            return {**call, "function": self._mask_name(function, index)}
        if not isinstance(call.get("name"), str):
            return call
        return {**call, "name": self._add(call["name"], Slot(index, name=True))}

    def _add(self, text: str, slot: Slot) -> str:
        """The sentinel of a text."""
        self.texts.append(text)
        self.slots.append(slot)
        return SENTINEL.format(len(self.texts) - 1)


class Skeleton:
    """The render of masked messages.

    Args:
        text: the render.
        masked: what was rendered.
    """

    def __init__(self, text: str, masked: Masked) -> None:
        self.text, self.masked = text, masked
        pieces = SLOT.split(text)
        self.literals = pieces[0::2]  # the fixed pieces
        self.numbers = [int(number) for number in pieces[1::2]]  # of the sentinels between them
        self.begins = [0]  # of each literal
        self.places: dict[int, list[tuple[int, int]]] = {}  # of each sentinel
        for match in SLOT.finditer(text):
            self.places.setdefault(int(match[1]), []).append(match.span())
            self.begins.append(match.end())
        self._of_message: dict[int, list[int]] = {}
        for n, slot in enumerate(masked.slots):
            self._of_message.setdefault(slot.message, []).append(n)

    def locate(self, at: int) -> tuple[int, int]:
        """A position as a literal and the offset in it; a sentinel's begin and what lies behind the end count with the literal
        before."""
        n = bisect.bisect_right(self.begins, at) - 1
        return n, at - self.begins[n]

    def own(self, turn: int) -> list[int]:
        """The sentinels of a message that are written."""
        return [n for n in self._of_message.get(turn, ()) if n in self.places]

    def together(self, turn: int) -> tuple[int, int] | None:
        """The literals before and behind the texts of a message; None unless these follow one another and stand nowhere else."""
        own = self.own(turn)
        if not own or any(len(self.places[n]) > 1 for n in own):
            return None
        first = self.locate(self.places[own[0]][0][0])[0]
        behind = first + len(own)
        return (first, behind) if self.numbers[first:behind] == own else None

    def first_own(self, turn: int) -> int:
        """Where the first text of a message begins; the end if none is written."""
        return min((self.places[n][0][0] for n in self.own(turn)), default=len(self.text))

    def last_own(self, turn: int, start: int, alone: str | None) -> int:
        """Where the last text of a message ends; ``start`` if none is written.

        Args:
            alone: the render up to this message, which tells whether a name that is written again belongs to it; None if the
                template refuses that. The skeleton itself if the message is the last.

        Raises:
            EncodingError: it cannot be told.
        """
        end = start
        for n in self.own(turn):
            places = self.places[n]
            count = len(places) if len(places) == 1 or alone is None else alone.count(SENTINEL.format(n))
            if not 0 < count <= len(places) or (alone is None and count > 1):
                raise EncodingError(
                    f"the chat template writes the name of a tool call of message {turn} several times, so where the turn "
                    "ends is not certain"
                )
            end = max(end, places[count - 1][1])
        return end

    def unwritten(self) -> dict[int, list[int]]:
        """The messages of other roles than the assistant's of whose texts none is written, and these."""
        return {
            turn: numbers
            for turn, numbers in self._of_message.items()
            if self.masked.messages[turn]["role"] != "assistant" and not self.own(turn)
        }

    def check(self, turn: int) -> None:
        """Raise EncodingError if a text of the turn is written twice, or its answer not at all."""
        for n in self._of_message.get(turn, ()):
            slot = self.masked.slots[n]
            count = len(self.places.get(n, ()))
            if count > 1 and not slot.name:
                raise EncodingError(
                    f"the chat template writes a text of message {turn} {count} times; which one is learned is unclear"
                )
            if not count and slot.answer:
                raise EncodingError(
                    f"the chat template leaves out the content of the assistant's message {turn}; mend the message, or "
                    "mark it with train: false"
                )


def not_written(message: int, role: str) -> EncodingError:
    other = ", or write it as a system message" if role == "developer" else ""
    return EncodingError(
        f"the chat template does not write message {message} ({role}), so the model would not see it; use another "
        f"chat_template{other}, or remove the message"
    )


def check_influence(render: Render, text: str, messages: Messages) -> None:
    """For templates that change texts: raise EncodingError for a message of another role than the assistant's that is not in
    the render ``text``, and on which nothing in it depends."""
    for n, message in enumerate(messages):
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, str) or not content.strip() or content in text:
            continue
        try:
            other = render([*messages[:n], {**message, "content": f"x {content} x"}, *messages[n + 1 :]], False)
        except TemplateRefusal:
            continue
        if other == text:
            raise not_written(n, message["role"])


def sentinels_in(text: str, start: int, end: int) -> set[int]:
    return {int(number) for number in SLOT.findall(text, start, end)}


def shared_length(one: str, other: str) -> int:
    """Length of the common beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def anchors(one: str, other: str, before: int) -> tuple[int, int, int]:
    """Ends of the last sentinel that both texts hold once, in ``one`` before ``before``, and its number; (0, 0, -1) if there
    is none."""
    for match in reversed(list(SLOT.finditer(one, 0, before))):
        if one.count(match[0]) == 1 and other.count(match[0]) == 1:
            return match.end(), other.index(match[0]) + len(match[0]), int(match[1])
    return 0, 0, -1


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing at all if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))) or r"(?!)")


def assistant_turns(messages: Sequence[dict[str, Any]]) -> list[int]:
    return [n for n, message in enumerate(messages) if message["role"] == "assistant"]
