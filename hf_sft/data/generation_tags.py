"""``{% generation %}`` tags: what the author of a chat template says the assistant writes.

The template is rendered with a mark where each tag stands; the marks lie in the text itself, so they are right in macros and
captured blocks too.
"""

from __future__ import annotations

import re

from hf_sft.data.skeletons import MARKS, Messages, Skeleton, assistant_turns, sentinels_in

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


def regions_of_turns(skeleton: Skeleton, marked: str) -> dict[int, tuple[int, int]]:
    """The region of each assistant's turn in the skeleton; none at all unless the tags mark each turn once, in order, with all
    of its texts.

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
    return dict(zip(turns, found[1], strict=True))


def regions_in_text(text: str, marked: str, messages: Messages) -> list[tuple[int, int]] | None:
    """The regions in the render of messages, if there is one for each turn of the assistant."""
    found = split_marks(marked)
    if found is None or found[0] != text or len(found[1]) != len(assistant_turns(messages)):
        return None
    return found[1]
