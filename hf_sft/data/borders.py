"""Where the model starts to write in a turn of a skeleton, and where the turn ends.

    skeleton   <|im_start|>user\\n(0)<|im_end|>\\n<|im_start|>assistant\\n(1)<|im_end|>\\n
    prompt     <|im_start|>user\\n(0)<|im_end|>\\n<|im_start|>assistant\\n
    span                                                              (1)<|im_end|>

The prompt is the skeleton of the turns before, with generation prompt: where it ends, the model starts to write.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from hf_sft.data.skeletons import (
    SENTINEL,
    SLOT,
    EncodingError,
    Markers,
    Messages,
    Render,
    Skeleton,
    TemplateRefusal,
    anchors,
    shared_length,
)

_NOBODY = 10**9  # number of the sentinel in a message that is added


@dataclass(frozen=True)
class End:
    """The end-of-turn ``token`` begins ``at`` this position.

    Args:
        behind: what the template writes next if the conversation goes on, up to the token; empty where the render holds it.
    """

    at: int
    token: str
    behind: str = ""


def misfit(turn: int) -> EncodingError:
    return EncodingError(
        f"the generation prompt before message {turn} does not fit the conversation's render, so where the model starts "
        "to write is not certain; use another chat_template, or train_on: all"
    )


def starts_with_assistant(why: str) -> EncodingError:
    return EncodingError(
        f"the conversation begins with the assistant, and {why}, so where the model starts to write is not certain; begin with "
        "a user or system message, or mark message 0 with train: false"
    )


def find_start(render: Render, skeleton: Skeleton, turn: int, markers: Markers) -> tuple[int, bool]:
    """Where the model starts to write: the generation prompt's end, as far as the turn begins with that prompt.

    Returns:
        The position, and whether the turn begins with the whole prompt.

    Raises:
        EncodingError: the prompt cannot be rendered, or fits nowhere.
    """
    full, before = skeleton.text, skeleton.masked.messages[:turn]
    try:
        prompt = render(before, True)
    except TemplateRefusal:
        if turn:
            raise
        raise starts_with_assistant("the chat template cannot write a prompt without messages") from None
    after_prompt, after_full, anchor = anchors(prompt, full, len(prompt))
    first_own = skeleton.first_own(turn)
    if first_own < after_full:
        raise EncodingError(f"the chat template writes message {turn} before the messages that precede it")
    tail = prompt[after_prompt:]
    shared = shared_length(tail, full[after_full:first_own])
    if shared == len(tail):
        return after_full + shared, True
    # The turn is written otherwise than the prompt announces it (a history without its empty think block, say). What
    # follows the last common border is not in the prompt; the message before must stand before it, and be closed by then.
    rest = tail[shared:].strip()
    if after_full + shared < first_own or first_own == len(full):
        shared = _last_border(tail, shared, markers)
    if not turn:  # a default system prompt may stand there
        raise starts_with_assistant("the chat template does not begin it with its generation prompt")
    if anchor < 0 or skeleton.masked.slots[anchor].message != turn - 1:
        raise misfit(turn)
    closed = render(before, False)
    after_closed, after, _ = anchors(closed, full, len(closed))
    needed = shared_length(full[after:first_own], closed[after_closed:])
    if needed < len(closed) - after_closed:
        needed = _last_border(full[after:first_own], needed, markers)
    if after != after_full or shared < needed or SLOT.search(tail, shared):
        raise misfit(turn)
    following = SLOT.search(full, after_full + shared)
    behind = full[after_full + shared : following.start() if following else len(full)]
    if (rest and rest in behind) or set(markers.special.findall(tail, shared)) & set(markers.special.findall(behind)):
        raise misfit(turn)  # what the two do not share is written all the same: a line break keeps a header apart, say
    return after_full + shared, False


def _last_border(text: str, limit: int, markers: Markers) -> int:
    """The last position up to ``limit`` where a prompt may end."""
    return max((match.end() for match in markers.border.finditer(text) if match.end() <= limit), default=0)


def find_end(
    render: Render,
    skeleton: Skeleton,
    turn: int,
    start: int,
    markers: Markers,
    region: tuple[int, int] | None = None,
) -> End:
    """Where the end-of-turn token begins.

    A turn ends alike whether it is the last one or not: the end-of-turn token is the last special token that both
    renders share. Where they share none, it is the first one after the text: of two that differ (``<|return|>`` and
    ``<|end|>``) the one that is written, or the token that begins the next message (``<|user|>``), if it does not begin the
    assistant's turns as well, and is what the template writes before a user's message (after a tool call: a tool's). Where
    the last turn has none at all, it is the one that the template writes there as soon as the conversation goes on.

    Args:
        region: the turn as the template's tags mark it. If it ends with a special token, nothing behind it is the end; if a
            special token follows directly, that one is.

    Raises:
        EncodingError: there is no such token.
    """
    full, special = skeleton.text, markers.special
    other, is_last = _render_otherwise(render, skeleton.masked.messages, turn)
    text_end = skeleton.last_own(turn, start, full if is_last else other)
    following = SLOT.search(full, text_end)
    stop = following.start() if following else len(full)
    tagged = None
    if region is not None:
        stop, tagged = _end_of_region(full, region[1], text_end, stop, markers)
    common = _compare(full, other, text_end, stop)
    if other is not None and not common.over:
        _refuse_unseen(skeleton, turn)
    found = [match for match in special.finditer(full, text_end, stop) if match[0] not in markers.openers]
    shared = [match for match in found if match.end() <= common.stop]
    if shared and (common.over or _nothing_follows(full, shared[-1].end(), common.stop, markers)):
        if common.over and (more := full[shared[-1].end() : common.stop].strip()):
            raise EncodingError(
                f"the chat template writes {more[:40]!r} behind the last special token of the assistant's message {turn}, so "
                "which token ends the turn is not certain; use another chat_template"
            )
        return End(shared[-1].start(), shared[-1][0])
    if tagged is not None:
        return tagged
    written = full[:stop] + common.more
    following = SLOT.search(written, stop)
    behind = list(special.finditer(written, text_end, following.start() if following else len(written)))
    over = common.stop if common.over else text_end
    first = next((match for match in behind if match.start() >= over), None)
    opener = next((match for match in behind if match[0] in markers.openers), None)
    if first is None or written[over : first.start()].strip() or (opener and opener.start() <= first.start()):
        _refuse_unseen(skeleton, turn)
        raise _no_end(turn, written[text_end:], opener)
    if other is None and is_last and len(found) > 1:
        raise EncodingError(
            f"which of {', '.join(match[0] for match in found)} ends the assistant's message {turn} is not certain, as the chat "
            "template does not let the conversation go on; use another chat_template"
        )
    if not is_last and (common.over or other is None):
        _check_next(render, skeleton, turn, first, over, markers)
    return End(first.start(), first[0], written[len(full) : first.end()])


def _check_next(
    render: Render, skeleton: Skeleton, turn: int, token: re.Match[str], over: int, markers: Markers
) -> None:
    """Raise EncodingError if the ``token`` behind a turn that is ``over`` is not the one that stops the model: where another
    message follows than a user's or a tool's result, it may be that message's header."""
    messages, full = skeleton.masked.messages, skeleton.text
    probe = _next_message(messages[turn])
    if messages[turn + 1]["role"] == probe["role"]:
        return
    try:
        other = render([*messages[: turn + 1], probe], False)
    except EncodingError:
        found = None
    else:
        after_full, after_other, _ = anchors(full, other, over)
        at = after_other + over - after_full
        found = markers.special.search(other, at) if other[after_other:at] == full[after_full:over] else None
    if found is None or found[0] != token[0]:
        raise EncodingError(
            f"the chat template ends the assistant's message {turn} with nothing but the begin of the next message "
            f"({token[0]!r}), and this is {messages[turn + 1]['role']!r}, so the model would not learn to stop; join the two "
            f"messages, put a message of role {probe['role']} between them, mark message {turn} with train: false, or use "
            "another chat_template"
        )


def _next_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message that comes behind one of the assistant, at inference: the result of its tool call, or the user's."""
    return {"role": "tool" if message.get("tool_calls") else "user", "content": SENTINEL.format(_NOBODY)}


class _Common(NamedTuple):
    """How far a render and another one of the same turn go together.

    Args:
        stop: up to here, in the render.
        over: there one of the two ends, so that all of the turn is common to both.
        more: what the other one has behind the end of the render.
    """

    stop: int
    over: bool
    more: str


def _compare(full: str, other: str | None, text_end: int, stop: int) -> _Common:
    if other is None:
        return _Common(text_end, False, "")
    after_full, after_other, _ = anchors(full, other, text_end)
    shared = shared_length(full[after_full:stop], other[after_other:])
    more = other[after_other + shared :]
    ends = after_full + shared == len(full)
    return _Common(after_full + shared, ends or not more, more if ends else "")


def _nothing_follows(full: str, end: int, stop: int, markers: Markers) -> bool:
    """Whether a token at whose ``end`` two renders may part is the last thing in a turn: up to where they do, or up to another
    special token, there is no text."""
    begin = next((at for at in range(end, stop) if not full[at].isspace()), stop)
    return begin == stop or markers.special.match(full, begin) is not None


def _refuse_unseen(skeleton: Skeleton, turn: int) -> None:
    """Raise EncodingError for a turn without a text of its own."""
    if not skeleton.own(turn) and not skeleton.masked.messages[turn].get("tool_calls"):
        raise EncodingError(
            f"the assistant's message {turn} is empty, and the chat template writes it in a way of its own, so where it "
            "ends is not certain; leave it out, or mark it with train: false"
        )


def _end_of_region(full: str, end: int, text_end: int, stop: int, markers: Markers) -> tuple[int, End | None]:
    """Up to where the end of turn is looked for, and the special token that the tagged text ends with, if it does."""
    inside = list(markers.special.finditer(full, text_end, end))
    if inside and not full[inside[-1].end() : end].strip():
        return end, End(inside[-1].start(), inside[-1][0])
    behind = markers.special.match(full, end)
    return (behind.end() if behind else stop), None


def _no_end(turn: int, behind: str, opener: re.Match[str] | None) -> EncodingError:
    """The reason where no token ends a turn: what comes behind its text, and the special token that begins the next one."""
    if opener and not behind.partition(opener[0])[0].strip():
        return EncodingError(
            f"the chat template does not end the assistant's message {turn}: the next special token is {opener[0]!r}, which "
            "begins every turn, so the model would not learn to stop; use another chat_template, or write an end-of-turn "
            "token behind the text in this one"
        )
    return EncodingError(
        f"the chat template does not end the assistant's message {turn} with a special token of this tokenizer "
        f"(after the text comes {SLOT.split(behind)[0][:40]!r}), so the model would not learn to stop; use another "
        "chat_template, or add its end-of-turn token (new_special_tokens)"
    )


def _render_otherwise(render: Render, messages: Messages, turn: int) -> tuple[str | None, bool]:
    """The turn as the last one if it is not, else followed by another message (None if the template refuses that); and whether
    it is the last."""
    is_last = turn + 1 == len(messages)
    others = [*messages, _next_message(messages[turn])] if is_last else messages[: turn + 1]
    try:
        return render(others, False), is_last
    except EncodingError:
        return None, is_last


def find_openers(render: Render, special: re.Pattern[str], bos: str | None) -> frozenset[str]:
    """Special tokens that begin any turn, so that none of them ends one: a BOS that is not the end of texts as well, and what
    stands both before the first message and between a question's end and its answer."""
    openers = {bos} if bos else set()
    question, answer = ({"role": role, "content": SENTINEL.format(n)} for n, role in enumerate(("user", "assistant")))
    try:
        closed, full = render([question], False), render([question, answer], False)
    except EncodingError:
        return frozenset(openers)
    try:
        prompt = render([question], True)
    except EncodingError:  # a template for training alone
        prompt = None
    end = closed.partition(question["content"])[2]
    before, _, between = full.partition(answer["content"])[0].partition(question["content"])
    header = special.findall(_from_special(between, end, special))
    if not header and prompt == closed:  # it may be that the prompt is always there
        header = special.findall(between)
    return frozenset(openers | (set(special.findall(before)) & set(header)))


def _from_special(text: str, other: str, special: re.Pattern[str]) -> str:
    """``text`` from the special token on in which it and ``other`` part, or from the place where they do."""
    shared = shared_length(text, other)
    return text[next((m.start() for m in special.finditer(text) if m.start() <= shared < m.end()), shared) :]
