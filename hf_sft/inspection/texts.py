"""What tokens say: their texts with characters kept whole, and texts made safe to show."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_sft.data.chat import fast_backend

_BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character
_MOST_PARTS = 4  # tokens that one character can take: UTF-8 has up to four bytes
_JOINERS = {"\u200c", "\u200d"}  # parts of words and of emoji
_ODD = {"Cc", "Cf", "Co", "Cs", "So", "Zl", "Zp"}
_ODD_DIRECTIONS = {"R", "AL", "RLE", "RLO", "LRO"}


@dataclass(frozen=True)
class Token:
    """A token, or several that make one character.

    Attributes:
        ids: token ids.
        text: what they decode to behind the tokens before them.
        learned: whether the model is taught to write it.
        special: a special token, not the letters of one.
    """

    ids: tuple[int, ...]
    text: str
    learned: bool
    special: bool


class TokenTexts:
    """Decodes with one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.backend = fast_backend(tokenizer)
        self.special_ids = special_ids(tokenizer)
        self.size = max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
        self._anchor = self.backend.encode("x", add_special_tokens=False).ids[-1:]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def alone(self, token: int) -> str:
        """The text of one token, where others stand before it."""
        return self._behind(self._anchor, [token])

    def vocabulary(self) -> list[str]:
        """:meth:`alone` of every token; those that are part of a character hold U+FFFD."""
        lead = self.decode(self._anchor)
        pairs = [[*self._anchor, token] for token in range(self.size)]
        texts = self.backend.decode_batch(pairs, skip_special_tokens=False)
        return [text[len(lead) :] if text.startswith(lead) else text for text in texts]

    def tokens(self, ids: Sequence[int], learned: Sequence[bool], before: Sequence[int] = ()) -> Iterator[Token]:
        """The tokens of a part of a row; those of a character that takes several are one.

        Args:
            before: the ids in front of the part.
        """
        context, place = list(before[-1:]), 0
        while place < len(ids):
            special = ids[place] in self.special_ids
            count, text = (
                (1, self._behind(context, ids[place : place + 1]))
                if special
                else self._character(ids, place, learned, context)
            )
            group = list(ids[place : place + count])
            yield Token(tuple(map(int, group)), text, bool(learned[place]), special)
            context, place = group, place + count

    def _character(
        self, ids: Sequence[int], place: int, learned: Sequence[bool], context: list[int]
    ) -> tuple[int, str]:
        """(tokens, text) of the smallest number of tokens from ``place`` on that hold whole characters."""
        first = self._behind(context, ids[place : place + 1])
        if _BROKEN not in first:
            return 1, first
        for count in range(2, _MOST_PARTS + 1):
            group = ids[place : place + count]
            if len(group) < count or learned[place + count - 1] != learned[place] or group[-1] in self.special_ids:
                break
            text = self._behind(context, group)
            if _BROKEN not in text:
                return count, text
        return 1, first

    def _behind(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """The text of ``ids`` behind others: without them, many decoders take a blank from the beginning."""
        if not context:
            return self.decode(ids)
        lead = self.decode(context)
        if _BROKEN in lead:  # the rest of it could be in ids
            return self._behind(self._anchor, ids)
        both = self.decode([*context, *ids])
        return both[len(lead) :] if both.startswith(lead) else self.decode(ids)


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all special tokens."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def oddness(texts: Sequence[str]) -> np.ndarray:
    """[len(texts)] int32: how much a token stands out: 0 for ASCII, 1 for other letters, 10 for emoji, parts of characters,
    right-to-left letters and control characters."""
    scores = np.zeros(len(texts), np.int32)
    for place, text in enumerate(texts):
        if not text.isascii():
            scores[place] = max(10 if _is_odd(letter) else int(not letter.isascii()) for letter in text)
        elif any((letter < " " and letter not in "\n\t\r") or letter == "\x7f" for letter in text):
            scores[place] = 10
    return scores


def _is_odd(letter: str) -> bool:
    return (
        letter == _BROKEN
        or unicodedata.category(letter) in _ODD
        or unicodedata.bidirectional(letter) in _ODD_DIRECTIONS
    )


def visible(text: str, also: str = "") -> str:
    """The text with nothing that could drive a terminal or a browser, or that shows nothing: control characters as their
    pictures, marks of direction and of zero width by their numbers. Line breaks and tabs stay.

    Args:
        also: further letters to write by their numbers.
    """
    return "".join(letter if letter in "\n\t" else _shown(letter, also) for letter in text)


def _shown(letter: str, also: str) -> str:
    if " " <= letter <= "~" and letter not in also:
        return letter
    code = ord(letter)
    if code < 0x20:
        return chr(0x2400 + code)  # the block of control pictures
    if code == 0x7F:
        return "\u2421"
    hidden = unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") and letter not in _JOINERS
    return f"<U+{code:04X}>" if hidden or letter in also else letter
