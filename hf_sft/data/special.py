"""Special tokens that stand in texts: as they are, the tokenizer would read them as themselves, and a turn could end there.

They are refused, or hidden while the template is rendered and spelled with ordinary tokens. Tokens that are added but not
special (``<think>``, ``<tool_call>``) are read as themselves wherever they stand; they are meant to be written by a model.
"""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from hf_sft.data.pieces import ALL, NONE, REST, Piece, Place
from hf_sft.data.skeletons import MARKS, EncodingError, any_of

SpecialTokensInText = Literal["refuse", "text"]


class SpecialTokenError(EncodingError):
    """A text that holds a special token.

    Args:
        message: for users.
        token: the special token.
    """

    def __init__(self, message: str, token: str = "") -> None:
        super().__init__(message)
        self.token = token


def check_choice(value: str) -> None:
    if value not in get_args(SpecialTokensInText):
        raise ValueError(f"special_tokens_in_text is {value!r}; it must be refuse or text")


def refuse_special(text: str, forbidden: re.Pattern[str]) -> None:
    """Raise SpecialTokenError, with its place, for a special token in a text."""
    found = forbidden.search(text)
    if found:
        around = text[max(0, found.start() - 20) : found.end() + 20]
        raise SpecialTokenError(
            f"a text holds {found[0]!r} (...{around!r}...), which the tokenizer reads as a special token; remove it from the "
            "data, keep its letters (special_tokens_in_text: text), or name it in new_special_tokens if the template does "
            "not use it",
            found[0],
        )


class HiddenTokens:
    """Hides special tokens of texts in marks that neither template nor tokenizer knows, and brings them out again.

    Args:
        tokens: special tokens that texts must not hold as themselves.
    """

    def __init__(self, tokens: set[str]) -> None:
        self.tokens = sorted(tokens)
        self.pattern = any_of(tokens)
        self._numbers = {token: n for n, token in enumerate(self.tokens)}
        self._hidden = re.compile(f"{MARKS[2]}(\\d+){MARKS[3]}")

    def hide(self, value: Any) -> Any:
        """The value with the special tokens of all strings in it hidden."""
        if isinstance(value, str):
            return self.pattern.sub(lambda found: f"{MARKS[2]}{self._numbers[found[0]]}{MARKS[3]}", value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        return value

    def show(self, text: str) -> str:
        """The text with its special tokens brought out."""
        return self._hidden.sub(lambda found: self.tokens[int(found[1])], text)

    def cut(self, piece: Piece, continues: Place) -> list[Piece]:
        """The piece as several: what stands around hidden tokens, and each of these, spelled.

        Args:
            continues: the place of what continues a text; see ``PieceTokenizer``.
        """
        first, *others = self._hidden.split(piece.text)
        if not others:
            return [piece]
        later = ALL if piece.learned in (ALL, REST) else NONE
        pieces = [piece._replace(text=first)] if first else []
        for number, text in zip(others[0::2], others[1::2], strict=True):
            pieces.append(Piece(self.tokens[int(number)], later, "spells"))
            if text:
                pieces.append(Piece(text, later, continues))
        return pieces
