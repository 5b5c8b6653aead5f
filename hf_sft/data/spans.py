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
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
    check_influence,
    not_written,
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
# Each turn costs renders of all turns before it. After so many turns, those that look like one whose borders are known have
# the same: no template counts that far.
_MANY_TURNS = 32


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
    """The ways in which a conversation is rendered.

    Args:
        plain: (messages, with generation prompt) -> text.
        marked: messages -> text with marks where the template has tags; None if it has none.
        without_tools: messages -> text without the conversation's tools; None if it has none.
    """

    plain: Render
    marked: Callable[[Messages], str] | None = None
    without_tools: Callable[[Messages], str] | None = None


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
    unwritten: dict[
        int, list[int]
    ]  # message of another role than the assistant's -> its texts, none of which is written

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
                    _refuse_unwritten(masked, shape.unwritten)
                    return Found(spans, shape.behind)
            if not masked.empties:
                break
        if isinstance(shape, _Shape):
            check_influence(rendering.plain, text, messages)
            if tagged := self._by_tags(shape, rendering, text, messages, turns):
                return Found(tagged, "")
        elif not isinstance(shape, TemplateRefusal):
            raise EncodingError(str(shape))
        else:
            check_influence(rendering.plain, text, messages)
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

    def check_written(self, rendering: Rendering, text: str, messages: Messages, context: str) -> None:
        """For a conversation without turns to find; see :meth:`find`.

        Raises:
            EncodingError: the template leaves out a message of another role than the assistant's, or the tools.
        """
        masked = Masked.of(messages, self.markers.tags, everything=True)
        shape = self._shape(rendering, masked, (), context)
        if isinstance(shape, _Shape) and shape.fill(masked.texts)[0] == text:
            _refuse_unwritten(masked, shape.unwritten)
        elif isinstance(shape, EncodingError) and not isinstance(shape, TemplateRefusal):
            raise EncodingError(str(shape))
        else:
            check_influence(rendering.plain, text, messages)

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
    _check_tools(rendering, skeleton)
    regions = _regions(rendering, skeleton, markers)
    spans, reached, behind = [], 0, ""
    borders: dict[int, _Border] = {}
    seen: dict[Any, tuple[int, int, End]] = {}
    for number, turn in enumerate(turns):
        skeleton.check(turn)
        region = regions.get(turn)
        look, known = _look(skeleton, turn, region), None
        if number >= _MANY_TURNS and look is not None:
            known = seen.get(look.key)
        if known is not None and look is not None:
            start, end = look.before + known[0], replace(known[2], at=look.behind + known[1])
        else:
            start, end = _borders(rendering.plain, skeleton, turn, markers, region, whole_prompts)
        if look is not None:
            seen.setdefault(look.key, (start - look.before, end.at - look.behind, end))
        _check_span(skeleton, masked, turn, start, end, reached)
        spans.append((skeleton.locate(start), skeleton.locate(end.at), end.token))
        reached, behind = end.at + len(end.token), end.behind
        if region is not None:
            place = min(0, end.at - region[1])
            ending = skeleton.text[region[1] + place : reached]
            borders[turn] = _Border(skeleton.text[region[0] : start], ending, place, end.token)
    tagged = {turn: borders.get(turn, _Border("", "", 0, "")) for turn in regions}
    return _Shape(skeleton.literals, skeleton.numbers, spans, behind, tagged, skeleton.unwritten())


def _check_tools(rendering: Rendering, skeleton: Skeleton) -> None:
    """Raise EncodingError if the template does not write the conversation's tools."""
    if rendering.without_tools is None:
        return
    try:
        bare = rendering.without_tools(skeleton.masked.messages)
    except TemplateRefusal:
        return
    if bare == skeleton.text:
        raise EncodingError(
            "the chat template does not write the conversation's tools, so the model would not see them; use a chat_template "
            "that knows tools, or remove them from the data"
        )


def _refuse_unwritten(masked: Masked, unwritten: dict[int, list[int]]) -> None:
    """Raise EncodingError if one of the unwritten messages is not blank."""
    for message, numbers in unwritten.items():
        if any(masked.texts[n] for n in numbers):
            raise not_written(message, masked.messages[message]["role"])


class _Look(NamedTuple):
    """How a turn looks from outside.

    Args:
        key: the fixed pieces around and between its texts, its neighbours, and how its region lies in them.
        before: where the piece before its texts begins.
        behind: where the piece behind its texts begins.
    """

    key: Any
    before: int
    behind: int


def _look(skeleton: Skeleton, turn: int, region: tuple[int, int] | None) -> _Look | None:
    """None if the turn's texts do not stand together."""
    places = skeleton.together(turn)
    if places is None:
        return None
    first, last = places
    before, behind = skeleton.begins[first], skeleton.begins[last]
    neighbours = tuple(message["role"] for message in skeleton.masked.messages[max(0, turn - 1) : turn + 2])
    tagged = region and (region[0] - before, region[1] - behind)
    return _Look((tuple(skeleton.literals[first : last + 1]), turn == 0, neighbours, tagged), before, behind)


def _borders(
    render: Render,
    skeleton: Skeleton,
    turn: int,
    markers: Markers,
    region: tuple[int, int] | None,
    whole_prompts: bool,
) -> tuple[int, End]:
    try:
        start, whole = find_start(render, skeleton, turn, markers)
        if whole_prompts and not whole:
            raise misfit(turn)
    except EncodingError:
        # Without a prompt to compare with, the region may hold the turn's header.
        if region is None or not turn or markers.opens(skeleton.text[region[0] : skeleton.first_own(turn)]):
            raise
        start = region[0]
    if region and not region[0] <= start <= min(region[1], skeleton.first_own(turn)):
        start = region[0]  # the prompt ends before the region, or fits elsewhere
    return start, find_end(render, skeleton, turn, start, markers, region)


def _regions(rendering: Rendering, skeleton: Skeleton, markers: Markers) -> dict[int, tuple[int, int]]:
    """The tagged region of each of the assistant's turns; empty where the tags are of no use."""
    if rendering.marked is None:
        return {}
    try:
        return regions_of_turns(skeleton, rendering.marked(skeleton.masked.messages), markers)
    except TemplateRefusal:  # a tag in a place where no mark can stand
        return {}


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
