"""Preference pairs as token rows: the chosen side and, behind it, the rejected one, each with the prompt.

input_ids   prompt, chosen answer | prompt, rejected answer
labels      -100 ... , the answer | -100 ... , the answer        rejected_start: where the second side begins
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from hf_sft.data.chat import IGNORE, ChatEncoder, EncodingError, TokenRow
from hf_sft.data.messages import Conversation
from hf_sft.data.preferences import PreferencePair
from hf_sft.data.tokenize import Overlength, RowCounts, check_token_row, supervised_tokens, truncate_row

_TOKENISED = ("prompt_ids", "chosen_ids", "rejected_ids")


class PairRow(TokenRow):
    """A token row of two sides; see above."""

    rejected_start: int


class PairEncoder:
    """Encodes preference pairs: the answers are learned, and nothing of the prompt.

    Args:
        chat: encodes each side as a conversation.
    """

    def __init__(self, chat: ChatEncoder) -> None:
        self.chat = chat
        self.special_tokens_met = chat.special_tokens_met

    def encode(self, pairs: Sequence[PreferencePair]) -> list[PairRow | EncodingError]:
        """The row of each pair, or the error that says why it has none."""
        sides = self.chat.encode(
            Conversation([*_unlearned(pair.prompt), *answer], pair.tools, pair.template_kwargs)
            for pair in pairs
            for answer in (pair.chosen, pair.rejected)
        )
        return [_pair(chosen, rejected) for chosen, rejected in zip(sides[::2], sides[1::2], strict=True)]


def _pair(chosen: TokenRow | EncodingError, rejected: TokenRow | EncodingError) -> PairRow | EncodingError:
    if isinstance(chosen, EncodingError):
        return EncodingError(f"chosen: {chosen}")
    if isinstance(rejected, EncodingError):
        return EncodingError(f"rejected: {rejected}")
    return pair_row(chosen, rejected)


def _unlearned(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**message, "train": False} if message["role"] == "assistant" else message for message in messages]


def cut_side(row: TokenRow, max_prompt: int | None, max_answer: int | None) -> TokenRow:
    """``row`` with the last ``max_prompt`` tokens of its prompt, which ends where the first token is learned, and the first
    ``max_answer`` tokens behind it."""
    length = len(row["input_ids"])
    prompt = next((place for place, label in enumerate(row["labels"]) if label != IGNORE), length)
    start = 0 if max_prompt is None else max(0, prompt - max_prompt)
    part = slice(start, None if max_answer is None else prompt + max_answer)
    return TokenRow(input_ids=row["input_ids"][part], labels=row["labels"][part])


def pair_row(chosen: TokenRow, rejected: TokenRow) -> PairRow:
    """Two sides as one row."""
    return PairRow(
        input_ids=chosen["input_ids"] + rejected["input_ids"],
        labels=chosen["labels"] + rejected["labels"],
        rejected_start=len(chosen["input_ids"]),
    )


def sides_of(row: Mapping[str, Any]) -> tuple[TokenRow, TokenRow]:
    """The chosen and the rejected side of a pair's row (lists or arrays)."""
    border = int(row["rejected_start"])
    first, second = (
        TokenRow(input_ids=row["input_ids"][part], labels=row["labels"][part])
        for part in (slice(border), slice(border, None))
    )
    return first, second


def is_tokenised_pair(value: Any) -> bool:
    """Whether a record claims to be a pair that is tokenised already, as a row of ours or by prompt and answers."""
    return isinstance(value, Mapping) and (
        value.get("rejected_start") is not None or all(value.get(name) is not None for name in _TOKENISED)
    )


def check_pair_row(value: Mapping[str, Any], vocabulary: int | None) -> PairRow:
    """A tokenised pair: ``{"prompt_ids", "chosen_ids", "rejected_ids"}``, or a row of ours as it came.

    Raises:
        EncodingError: as ``check_token_row``; or the border lies outside the row.
    """
    if value.get("rejected_start") is not None:
        row, border = check_token_row(value, vocabulary), value["rejected_start"]
        if not isinstance(border, Integral) or not 0 < int(border) < len(row["input_ids"]):
            raise EncodingError(
                f"rejected_start is {border!r}, and the row has {len(row['input_ids'])} tokens: both sides need some"
            )
        return PairRow(**row, rejected_start=int(border))
    prompt, *answers = (list(value[name]) for name in _TOKENISED)
    chosen, rejected = (
        check_token_row({"input_ids": prompt + ids, "labels": [IGNORE] * len(prompt) + ids}, vocabulary)
        for ids in answers
    )
    return pair_row(chosen, rejected)


def fit_pair(
    counts: RowCounts,
    row: PairRow,
    max_length: int,
    max_prompt: int | None = None,
    max_answer: int | None = None,
    *,
    overlength: Overlength = "drop",
) -> list[PairRow]:
    """The pair as it is kept, counted in ``counts``; none where a side is too long and dropped, or nothing is left to compare.

    An answer that is cut loses its end, with the token that ends the turn: it is not taught to stop.

    Args:
        max_length: tokens of a side; what is beyond is treated as ``overlength`` says.
        max_prompt, max_answer: as for :func:`cut_side`, beforehand.

    Raises:
        EncodingError: a side is too long, and ``overlength`` is ``error``.
    """
    whole = sides_of(row)
    sides = [cut_side(side, max_prompt, max_answer) for side in whole]
    longest = max(len(side["input_ids"]) for side in sides)
    if longest > max_length:
        if overlength == "error":
            raise EncodingError(
                f"a side has {longest} tokens, but max_seq_length is {max_length}; raise it, set max_prompt_length and "
                "max_answer_length, or set overlength to drop or truncate"
            )
        if overlength != "truncate":
            counts.add_too_long(longest)
            return []
        sides = [truncate_row(side, max_length) for side in sides]
    learned = [supervised_tokens(side["labels"]) for side in sides]
    if sides[0] == sides[1] or not all(learned):
        counts.unsupervised += 1
        return []
    counts.truncated += sum(learned) < sum(supervised_tokens(side["labels"]) for side in whole)
    counts.kept += 1
    counts.count(sides)
    return [pair_row(*sides)]
