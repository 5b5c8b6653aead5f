"""``{% generation %}`` tags: what the author of a chat template says the assistant writes.

The template is rendered with a mark where each tag stands; the marks lie in the text itself, so they are right in macros and
captured blocks too.
"""

from __future__ import annotations

import re

from hf_sft.data.skeletons import MARKS, SLOT, Markers, Messages, Skeleton, assistant_turns, sentinels_in

_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_OPEN, _CLOSE = MARKS[4], MARKS[5]
_SPLIT = re.compile(f"([{_OPEN}{_CLOSE}])")


def with_marks(template: str) -> str | None:
    """The template that writes a mark behind each opening and before each closing tag; None if it has no tags."""
    return _TAG.sub(_mark, template) if _TAG.search(template) else None


def _mark(tag: re.Match[str]) -> str:
    # A tag trims the whitespace on its two sides: the mark stands between two tags, each with the trimming of one side.
    before, closes, after = tag.groups()
    if closes:
        return f"{{%{before} set hf_sft_mark = 0 %}}{{{{ '{_CLOSE}' }}}}{{% endgeneration {after}%}}"
    return f"{{%{before} generation %}}{{{{ '{_OPEN}' }}}}{{% set hf_sft_mark = 0 {after}%}}"


def split_marks(text: str) -> tuple[str, list[tuple[int, int]]] | None:
    """The text without marks, and the tagged regions [start, end) in it, of which those that touch count as one; None if they
    are not one after another."""
    regions: list[tuple[int, int]] = []
    position, start = 0, None
    parts = _SPLIT.split(text)
    for part in parts:
        if part == _OPEN and start is None:
            start = position
        elif part == _CLOSE and start is not None:
            if regions and regions[-1][1] == start:
                start = regions.pop()[0]
            if start < position:
                regions.append((start, position))
            start = None
        elif part in (_OPEN, _CLOSE):
            return None
        else:
            position += len(part)
    return None if start is not None else ("".join(parts[0::2]), regions)


def regions_of_turns(skeleton: Skeleton, marked: str, markers: Markers) -> dict[int, tuple[int, int]]:
    """The region of each assistant's turn in the skeleton; none at all unless the tags mark each turn once, in order, with all
    of its texts and nothing of the next message.

    Args:
        marked: the skeleton's render with marks.
    """
    found = split_marks(marked)
    turns = assistant_turns(skeleton.masked.messages)
    if found is None or found[0] != skeleton.text or len(found[1]) != len(turns):
        return {}
    for turn, (start, end) in zip(turns, found[1], strict=True):
        if sentinels_in(skeleton.text, start, end) != set(skeleton.own(turn)):
            return {}
        if _reaches_over(skeleton, turn, (start, end), markers):
            return {}
    return dict(zip(turns, found[1], strict=True))


def _reaches_over(skeleton: Skeleton, turn: int, region: tuple[int, int], markers: Markers) -> bool:
    """Whether a turn's region holds the next message's header: behind the turn's last text an opener, or text between or behind
    the special tokens there (those of a tool call may stand around its arguments)."""
    after = max((match.end() for match in SLOT.finditer(skeleton.text, *region)), default=region[1])
    rest = skeleton.text[after : region[1]]
    if skeleton.masked.messages[turn].get("tool_calls"):
        return markers.opens(rest)
    return markers.opens(rest) or any(part.strip() for part in markers.special.split(rest)[1:])


def regions_in_text(text: str, marked: str, messages: Messages) -> list[tuple[int, int]] | None:
    """The regions in the render of messages, if there is one for each turn of the assistant."""
    found = split_marks(marked)
    if found is None or found[0] != text or len(found[1]) != len(assistant_turns(messages)):
        return None
    return found[1]
