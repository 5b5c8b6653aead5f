"""Where the model writes in a rendered conversation.

A conversation is rendered as it is, and once as a skeleton: every text replaced by a sentinel. The fixed pieces of the
skeleton, with the texts put back, must give the real render letter for letter; then every position in the skeleton is
known in the render, and nothing was searched for in user text.

    skeleton   <|im_start|>user\\n(0)<|im_end|>\\n<|im_start|>assistant\\n(1)<|im_end|>\\n
    prompt     <|im_start|>user\\n(0)<|im_end|>\\n<|im_start|>assistant\\n
    span                                                              (1)<|im_end|>

The prompt is the skeleton of the turns before, with generation prompt: where it ends, the model starts to write.

Whitespace around a text and tags that the template knows (``</think>``) stay in the skeleton, so what the template
strips or splits off is seen there too. A skeleton depends on the shape of the conversation alone; it is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sft.data.formats import REASONING_KEYS

# Private-use characters: no template or tokenizer gives them a meaning, and no strip() removes them.
_SENTINEL = "\ue0f0{}\ue0f1"
_SLOT = re.compile("\ue0f0(\\d+)\ue0f1")
_TEXT_KEYS = ("content", *REASONING_KEYS)
_MOST_SHAPES = 4096

Messages = list[dict[str, Any]]
# (messages, add_generation_prompt) -> text
Render = Callable[[Messages, bool], str]


class EncodingError(ValueError):
    """A conversation whose supervised tokens are not certain; it must be left out or mended."""


def without_sentinels(text: str) -> str:
    """A message for users, which may quote a skeleton."""
    return _SLOT.sub("...", text)


class TemplateRefusal(EncodingError):
    """A chat template that raises an error for a conversation."""


@dataclass(frozen=True)
class Span:
    """Characters [start, end) are written by the model, and then ``end_token``, the end-of-turn token, at ``end``."""

    start: int
    end: int
    end_token: str


@dataclass(frozen=True)
class Markers:
    """What has a meaning in rendered text.

    Args:
        special: the special tokens, one of which ends a turn.
        border: where a prompt may end: behind a special or added token, or whitespace.
        tags: tags that the template's code knows, as one group; None if there are none.
    """

    special: re.Pattern[str]
    border: re.Pattern[str]
    tags: re.Pattern[str] | None


@dataclass(frozen=True)
class _Slot:
    message: int
    answer: bool = False  # the content, or what follows the last tag in it: must be written
    name: bool = False  # the name of a tool call: may be written again with the tool's result


@dataclass(frozen=True)
class _Skeleton:
    literals: list[str]  # the fixed pieces
    slots: list[int]  # the texts between them: one less
    spans: list[tuple[tuple[int, int], tuple[int, int], str]]  # start, end as (literal, offset); the end token

    def fill(self, texts: list[str]) -> tuple[str, list[Span]]:
        """The render of a conversation of this shape with these texts, and its spans."""
        parts, begins, position = [], [], 0
        for literal, slot in zip(self.literals, self.slots, strict=False):
            parts += [literal, texts[slot]]
            begins.append(position)
            position += len(literal) + len(texts[slot])
        begins.append(position)
        spans = [Span(begins[a] + i, begins[b] + j, token) for (a, i), (b, j), token in self.spans]
        return "".join(parts) + self.literals[-1], spans


def template_tags(template: str) -> re.Pattern[str] | None:
    """The tags that a template mentions, ``<think>`` or ``[/THINK]``: it may cut texts at them."""
    tags = sorted(set(re.findall(r"</?[\w:.-]+>|\[/?[A-Z_]+\]", template)), key=lambda tag: (-len(tag), tag))
    return re.compile("(" + "|".join(map(re.escape, tags)) + ")") if tags else None


class SpanFinder:
    """Finds the spans of conversations; keeps the skeletons of the shapes it has seen.

    Args:
        markers: see :class:`Markers`.
    """

    def __init__(self, markers: Markers) -> None:
        self.markers = markers
        self._skeletons: dict[str, _Skeleton | EncodingError] = {}

    def find(self, render: Render, text: str, messages: Messages, turns: tuple[int, ...], context: str) -> list[Span]:
        """The spans of the assistant's ``turns`` (indices of messages) in ``text``, the render of ``messages``.

        Args:
            render: renders messages of this conversation.
            context: all that a render depends on beside the messages, as text.

        Raises:
            EncodingError: a span is not certain.
        """
        if _SLOT.search(text):
            raise EncodingError("a text holds the private-use characters U+E0F0 and U+E0F1; remove them")
        masked, texts, slots = self._mask(messages, everything=True)
        key = f"{turns} {context} {masked}"
        skeleton = self._skeletons.get(key)
        if skeleton is None:
            try:
                skeleton = _build(render, masked, slots, turns, self.markers, whole_prompts=False)
            except EncodingError as error:
                skeleton = error
            if len(self._skeletons) >= _MOST_SHAPES:
                self._skeletons.clear()
            self._skeletons[key] = skeleton
        if isinstance(skeleton, _Skeleton):
            filled, spans = skeleton.fill(texts)
            if filled == text:
                return spans
        elif not isinstance(skeleton, TemplateRefusal):
            raise EncodingError(str(skeleton))
        # The template's code depends on a text: it quotes it as JSON, say. Only the assistant's must be replaced.
        masked, texts, slots = self._mask(messages, everything=False)
        filled, spans = _build(render, masked, slots, turns, self.markers, whole_prompts=True).fill(texts)
        if filled != text:
            at = _shared(filled, text)
            raise EncodingError(
                f"the chat template changes the text of an assistant turn (...{text[max(0, at - 20) : at + 20]!r}...), "
                "so what the model writes is not certain; mend the text, use another chat_template, or train_on: all"
            )
        return spans

    def _mask(self, messages: Messages, everything: bool) -> tuple[Messages, list[str], list[_Slot]]:
        """Messages with sentinels in place of texts, the texts, and where each belongs."""
        texts: list[str] = []
        slots: list[_Slot] = []
        masked = []
        for index, message in enumerate(messages):
            if everything or message["role"] == "assistant":
                message = dict(message)
                for key in _TEXT_KEYS:
                    if isinstance(message.get(key), str):
                        message[key] = self._mask_text(message[key], texts)
                        slots += [_Slot(index)] * (len(texts) - len(slots))
                        if key == "content" and slots and slots[-1].message == index:
                            slots[-1] = _Slot(index, answer=True)
            if everything and message.get("tool_calls"):
                message["tool_calls"] = [_mask_name(call, texts) for call in message["tool_calls"]]
                slots += [_Slot(index, name=True)] * (len(texts) - len(slots))
            masked.append(message)
        return masked, texts, slots

    def _mask_text(self, text: str, texts: list[str]) -> str:
        parts = self.markers.tags.split(text) if self.markers.tags else [text]
        for n in range(0, len(parts), 2):  # the odd ones are tags
            core = parts[n].strip()
            if core:
                begin = parts[n].index(core)
                sentinel = _SENTINEL.format(len(texts))
                parts[n] = parts[n][:begin] + sentinel + parts[n][begin + len(core) :]
                texts.append(core)
        return "".join(parts)


def _mask_name(call: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """The tool call with a sentinel for its name: templates write the turn's text before it in several ways."""
    function = call.get("function")
    if isinstance(function, dict):
        return {**call, "function": _mask_name(function, texts)}
    if not isinstance(call.get("name"), str):
        return call
    texts.append(call["name"])
    return {**call, "name": _SENTINEL.format(len(texts) - 1)}


def _build(
    render: Render,
    masked: Messages,
    slots: Sequence[_Slot],
    turns: tuple[int, ...],
    markers: Markers,
    whole_prompts: bool,
) -> _Skeleton:
    """Render the skeleton and find the spans in it.

    Args:
        whole_prompts: each turn must begin with its whole generation prompt. Asked for where users' texts are not replaced,
            so that a part of the prompt could be found in the wrong place.

    Raises:
        EncodingError: a span is not certain.
    """
    full = render(masked, False)
    pieces = _SLOT.split(full)
    literals, numbers = pieces[0::2], [int(number) for number in pieces[1::2]]
    begins, position = [], 0  # of each literal, in the skeleton
    for literal, number in zip(literals, [*numbers, 0], strict=True):
        begins.append(position)
        position += len(literal) + len(_SENTINEL.format(number))

    def place(at: int) -> tuple[int, int]:
        for n in reversed(range(len(begins))):
            if begins[n] <= at <= begins[n] + len(literals[n]):
                return n, at - begins[n]
        raise AssertionError("a border lies inside a sentinel")

    spans, reached = [], 0
    for turn in turns:
        own = [n for n, slot in enumerate(slots) if slot.message == turn]
        _check_slots(full, own, slots, turn)
        start, whole = _find_start(render, full, masked, turn, own, markers)
        if whole_prompts and not whole:
            raise _misfit(turn)
        end, token = _find_end(render, full, masked, turn, own, start, markers)
        inside = {int(n) for n in _SLOT.findall(full, start, end)}
        if start < reached or inside != {n for n in own if _SENTINEL.format(n) in full}:
            raise EncodingError(f"the chat template mixes the assistant's message {turn} with another message")
        _check_tool_calls(full[start:end], masked[turn], turn)
        spans.append((place(start), place(end), token))
        reached = end + len(token)
    return _Skeleton(literals, numbers, spans)


def _check_slots(full: str, own: list[int], slots: Sequence[_Slot], turn: int) -> None:
    for n in own:
        count = full.count(_SENTINEL.format(n))
        if count > 1 and not slots[n].name:
            raise EncodingError(
                f"the chat template writes a text of message {turn} {count} times; which one is learned is unclear"
            )
        if not count and slots[n].answer:
            raise EncodingError(
                f"the chat template leaves out the content of the assistant's message {turn}; mend the message, or "
                "mark it with train: false"
            )


def _check_tool_calls(written: str, message: dict[str, Any], turn: int) -> None:
    for call in message.get("tool_calls") or []:
        name = (call.get("function") or call).get("name") if isinstance(call.get("function") or call, dict) else None
        if not name or str(name) not in written:
            raise EncodingError(
                f"the chat template does not write a tool call of message {turn}; use a chat_template that knows tools"
            )


def _shared(one: str, other: str) -> int:
    """Length of the common beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _anchors(one: str, other: str, before: int) -> tuple[int, int]:
    """Ends of the last sentinel that both texts hold once, in ``one`` before ``before``; (0, 0) if there is none."""
    for match in reversed(list(_SLOT.finditer(one, 0, before))):
        if one.count(match[0]) == 1 and other.count(match[0]) == 1:
            return match.end(), other.index(match[0]) + len(match[0])
    return 0, 0


def _last_border(text: str, limit: int, markers: Markers) -> int:
    """The last position up to ``limit`` where a prompt may end."""
    return max((match.end() for match in markers.border.finditer(text) if match.end() <= limit), default=0)


def _find_start(
    render: Render, full: str, masked: Messages, turn: int, own: list[int], markers: Markers
) -> tuple[int, bool]:
    """Where the model starts to write: the generation prompt's end, as far as the turn begins with that prompt.

    Returns:
        The position, and whether the turn begins with the whole prompt.
    """
    try:
        prompt = render(masked[:turn], True)
    except TemplateRefusal:
        if turn:
            raise
        raise EncodingError(
            "the conversation begins with the assistant, and the chat template cannot write a prompt without messages, so "
            "where the model starts to write is not certain; begin with a user or system message, or mark message 0 with "
            "train: false"
        ) from None
    after_prompt, after_full = _anchors(prompt, full, len(prompt))
    first_own = min((full.index(s) for s in map(_SENTINEL.format, own) if s in full), default=len(full))
    if first_own < after_full:
        raise EncodingError(f"the chat template writes message {turn} before the messages that precede it")
    tail = prompt[after_prompt:]
    shared = _shared(tail, full[after_full:first_own])
    if shared == len(tail):
        return after_full + shared, True
    # The turn is written otherwise than the prompt announces it (a history without its empty think block, say). What
    # follows the last common border is not in the prompt; the message before must be closed by then.
    if after_full + shared < first_own or first_own == len(full):
        shared = _last_border(tail, shared, markers)
    closed = render(masked[:turn], False)
    after_closed, after = _anchors(closed, full, len(closed))
    needed = _last_border(full[after:first_own], _shared(full[after:first_own], closed[after_closed:]), markers)
    if after != after_full or shared < needed:
        raise _misfit(turn)
    return after_full + shared, False


def _misfit(turn: int) -> EncodingError:
    return EncodingError(
        f"the generation prompt before message {turn} does not fit the conversation's render, so where the model starts "
        "to write is not certain; use another chat_template, or train_on: all"
    )


def _find_end(
    render: Render, full: str, masked: Messages, turn: int, own: list[int], start: int, markers: Markers
) -> tuple[int, str]:
    """Where the end-of-turn token begins, and the token.

    A turn ends alike whether it is the last one or not: the end-of-turn token is the last special token that both
    renders share. Where they share none (``<|return|>`` and ``<|end|>``), it is the first one after the text.
    """
    text_end = max([start, *(full.index(s) + len(s) for s in map(_SENTINEL.format, own) if s in full)])
    following = _SLOT.search(full, text_end)
    stop = following.start() if following else len(full)
    shared_stop = text_end
    other = _render_otherwise(render, masked, turn)
    if other is not None:
        after_full, after_other = _anchors(full, other, text_end)
        shared_stop = after_full + _shared(full[after_full:stop], other[after_other:])
    found = [m for m in markers.special.finditer(full, text_end, stop) if m.end() <= shared_stop]
    if found:
        return found[-1].start(), found[-1][0]
    first = markers.special.search(full, text_end, stop)
    if first is None or full[text_end : first.start()].strip():
        raise EncodingError(
            f"the chat template does not end the assistant's message {turn} with a special token of this tokenizer "
            f"(after the text comes {full[text_end : min(stop, text_end + 40)]!r}), so the model would not learn to stop; "
            "use another chat_template, or add its end-of-turn token (new_special_tokens)"
        )
    return first.start(), first[0]


def _render_otherwise(render: Render, masked: Messages, turn: int) -> str | None:
    """The turn as the last one if it is not, else followed by another message; None if the template refuses that."""
    try:
        if turn + 1 < len(masked):
            return render(masked[: turn + 1], False)
        role = "tool" if masked[turn].get("tool_calls") else "user"
        return render([*masked, {"role": role, "content": _SENTINEL.format(10**9)}], False)
    except EncodingError:
        return None
