"""Where the model writes in a rendered conversation.

A conversation is rendered as it is, and once as a skeleton: every text replaced by a sentinel. The fixed pieces of the
skeleton, with the texts put back, must give the real render letter for letter; then every position in the skeleton is
known in the render, and nothing was searched for in user text.

    skeleton   <|im_start|>user\\n(0)<|im_end|>\\n<|im_start|>assistant\\n(1)<|im_end|>\\n
    prompt     <|im_start|>user\\n(0)<|im_end|>\\n<|im_start|>assistant\\n
    span                                                              (1)<|im_end|>

A skeleton depends on the shape of the conversation alone; it is kept, so that a conversation costs one render.

Where the template has ``{% generation %}`` tags that mark each of the assistant's turns once, the spans come from them. A tag
may begin before the generation prompt ends (at ``<think>``, say, which the prompt opens already): the span begins where the
prompt ends all the same, since the model is not asked for what the prompt holds. What lies between the prompt and a tag that
begins later (an empty think block) is not learned: the author left it out. The end-of-turn token is the last one in the tag;
many authors put it behind the tag instead, and then it is the one that follows.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from hf_sft.data.borders import End, find_end, find_start, misfit
from hf_sft.data.generation_tags import regions_in_text, regions_of_turns
from hf_sft.data.skeletons import (
    EncodingError,
    Markers,
    Masked,
    Messages,
    Render,
    Skeleton,
    TemplateRefusal,
    sentinels_in,
    shared_length,
    template_tags,
    without_sentinels,
)

__all__ = [
    "EncodingError",
    "Found",
    "Markers",
    "Rendering",
    "Span",
    "SpanFinder",
    "TemplateRefusal",
    "template_tags",
    "without_sentinels",
]

_MOST_SHAPES = 4096


@dataclass(frozen=True)
class Span:
    """Characters [start, end) are written by the model, and then ``end_token``, the end-of-turn token, at ``end``."""

    start: int
    end: int
    end_token: str


class Found(NamedTuple):
    """The spans of a conversation.

    Args:
        behind: what the template writes behind the render up to the last end-of-turn token, where it writes that with the next
            message only (``<|user|>``); else empty.
    """

    spans: list[Span]
    behind: str


@dataclass(frozen=True)
class Rendering:
    """The two ways in which a conversation is rendered.

    Args:
        plain: (messages, with generation prompt) -> text.
        marked: messages -> text with marks where the template has tags; None if it has none.
    """

    plain: Render
    marked: Callable[[Messages], str] | None = None


class _Border(NamedTuple):
    """A turn's borders from the view of its tagged region.

    Args:
        before: what lies in the region before the span.
        ending: what lies from the region's end on, or from the end-of-turn token on if that is further left, up to that
            token's end.
        place: where ``ending`` begins; 0 is the region's end.
        token: the end-of-turn token.
    """

    before: str
    ending: str
    place: int
    token: str


@dataclass(frozen=True)
class _Shape:
    """All that is known of conversations of one shape."""

    literals: list[str]  # the fixed pieces
    slots: list[int]  # the texts between them: one less
    spans: list[tuple[tuple[int, int], tuple[int, int], str]]  # start, end as (literal, offset); the end token
    behind: str
    tagged: dict[int, _Border]  # turn -> its borders; empty where tags were not used

    def fill(self, texts: list[str]) -> tuple[str, list[Span]]:
        """The render of a conversation of this shape with these texts, and its spans."""
        parts: list[str] = []
        begins, position = [], 0
        for literal, slot in zip(self.literals, self.slots, strict=False):
            text = texts[slot]
            parts += (literal, text)
            begins.append(position)
            position += len(literal) + len(text)
        begins.append(position)
        spans = [Span(begins[a] + i, begins[b] + j, token) for (a, i), (b, j), token in self.spans]
        return "".join(parts) + self.literals[-1], spans


class SpanFinder:
    """Finds the spans of conversations; keeps what it knows of the shapes it has seen.

    Args:
        markers: see :class:`Markers`.
        volatile: the template writes the time, so that a shape can grow old.
    """

    def __init__(self, markers: Markers, *, volatile: bool = False) -> None:
        self.markers, self.volatile = markers, volatile
        self._shapes: dict[str, _Shape | EncodingError] = {}

    def find(self, rendering: Rendering, text: str, messages: Messages, turns: tuple[int, ...], context: str) -> Found:
        """The spans of the assistant's ``turns`` (indices of messages) in ``text``, the render of ``messages``.

        Args:
            rendering: renders messages of this conversation.
            context: all that a render depends on beside the messages, as text.

        Raises:
            EncodingError: a span is not certain.
        """
        shape: _Shape | EncodingError | None = None
        for empties in (True, False):  # a template may treat blank messages in a way of its own
            masked = Masked.of(messages, self.markers.tags, everything=True, empties=empties)
            shape = self._shape(rendering, masked, turns, context)
            if isinstance(shape, _Shape):
                filled, spans = shape.fill(masked.texts)
                if filled == text:
                    return Found(spans, shape.behind)
            if not masked.empties:
                break
        if isinstance(shape, _Shape):
            if tagged := self._by_tags(shape, rendering, text, messages, turns):
                return Found(tagged, "")
        elif not isinstance(shape, TemplateRefusal):
            raise EncodingError(str(shape))
        # The template's code depends on a text: it quotes it as JSON, say. Only the assistant's must be replaced.
        masked = Masked.of(messages, self.markers.tags, everything=False)
        shape = _build(rendering, masked, turns, self.markers, whole_prompts=True)
        filled, spans = shape.fill(masked.texts)
        if filled != text:
            at = shared_length(filled, text)
            raise EncodingError(
                f"the chat template changes the text of an assistant turn (...{text[max(0, at - 20) : at + 20]!r}...), "
                "so what the model writes is not certain; mend the text, use another chat_template, or train_on: all"
            )
        return Found(spans, shape.behind)

    def _shape(
        self, rendering: Rendering, masked: Masked, turns: tuple[int, ...], context: str
    ) -> _Shape | EncodingError:
        """What is known of the conversation's shape, or why it is refused."""
        now = datetime.datetime.now().isoformat(timespec="minutes") if self.volatile else ""
        key = f"{turns} {context} {now} {masked.messages}"
        shape = self._shapes.get(key)
        if shape is None:
            try:
                shape = _build(rendering, masked, turns, self.markers, whole_prompts=False)
            except EncodingError as error:
                shape = error.with_traceback(None)  # it would keep the frames
            if len(self._shapes) >= _MOST_SHAPES:
                self._shapes.clear()
            self._shapes[key] = shape
        return shape

    def _by_tags(
        self, shape: _Shape, rendering: Rendering, text: str, messages: Messages, turns: tuple[int, ...]
    ) -> list[Span] | None:
        """The spans from the tags in the text itself, for templates that change texts; the shape says that they mark turns, and
        how the borders of a span lie in its region."""
        if rendering.marked is None or not shape.tagged or shape.behind:
            return None
        regions = regions_in_text(text, rendering.marked(messages), messages)
        if regions is None:
            return None
        of_turn = dict(zip(shape.tagged, regions, strict=True))
        spans = []
        for turn in turns:
            border, (start, end) = shape.tagged[turn], of_turn[turn]
            ending = end + border.place
            if not text.startswith(border.before, start) or not text.startswith(border.ending, ending):
                return None
            at = ending + len(border.ending) - len(border.token)
            spans.append(Span(start + len(border.before), at, border.token))
        return spans


def _build(
    rendering: Rendering, masked: Masked, turns: tuple[int, ...], markers: Markers, whole_prompts: bool
) -> _Shape:
    """Render the skeleton and find the spans in it.

    Args:
        whole_prompts: each turn must begin with its whole generation prompt. Asked for where users' texts are not replaced,
            so that a part of the prompt could be found in the wrong place.

    Raises:
        EncodingError: a span is not certain.
    """
    skeleton = Skeleton(rendering.plain(masked.messages, False), masked)
    regions = regions_of_turns(skeleton, rendering.marked(masked.messages)) if rendering.marked else {}
    spans, reached, behind = [], 0, ""
    borders: dict[int, _Border] = {}
    for turn in turns:
        skeleton.check(turn)
        region = regions.get(turn)
        try:
            start, whole = find_start(rendering.plain, skeleton, turn, markers)
            if whole_prompts and not whole:
                raise misfit(turn)
        except EncodingError:
            if region is None:
                raise
            start = region[0]
        if region and not region[0] <= start <= min(region[1], skeleton.first_own(turn)):
            start = region[0]  # the prompt ends before the region, or fits elsewhere
        end = find_end(rendering.plain, skeleton, turn, start, markers, region)
        _check_span(skeleton, masked, turn, start, end, reached)
        spans.append((skeleton.locate(start), skeleton.locate(end.at), end.token))
        reached, behind = end.at + len(end.token), end.behind
        if region is not None:
            place = min(0, end.at - region[1])
            ending = skeleton.text[region[1] + place : reached]
            borders[turn] = _Border(skeleton.text[region[0] : start], ending, place, end.token)
    tagged = {turn: borders.get(turn, _Border("", "", 0, "")) for turn in regions}
    return _Shape(skeleton.literals, skeleton.numbers, spans, behind, tagged)


def _check_span(skeleton: Skeleton, masked: Masked, turn: int, start: int, end: End, reached: int) -> None:
    """Raise EncodingError if the span holds another message's text, or not all that the assistant has written."""
    written = skeleton.text[start : end.at]
    if start < reached or sentinels_in(skeleton.text, start, end.at) != set(skeleton.own(turn)):
        raise EncodingError(f"the chat template mixes the assistant's message {turn} with another message")
    for call in masked.messages[turn].get("tool_calls") or []:
        name = (call.get("function") or call).get("name") if isinstance(call.get("function") or call, dict) else None
        if not name or str(name) not in written:
            raise EncodingError(
                f"the chat template does not write a tool call of message {turn}; use a chat_template that knows tools"
            )
