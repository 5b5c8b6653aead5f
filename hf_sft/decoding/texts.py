"""Text of tokens that come one after the other: no character is shown before all of its bytes are there."""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_MOST = 3  # tokens of a character that lacks its last byte


class StreamedText:
    """Decodes growing rows of tokens piece by piece; the pieces together are the text of the whole row.

    Args:
        tokenizer: special tokens are skipped.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        # Tokens up to ``_done`` are written. Those from ``_context`` on are decoded again with what follows: a tokenizer may
        # write a token in another way at the beginning of a text.
        self._context = self._done = 0

    def add(self, tokens: list[int], last: bool = False) -> str:
        """The text that ``tokens`` add.

        Args:
            last: nothing will come behind them.
        """
        self._tokens += tokens
        count = len(self._tokens)
        for end in range(count, max(count - _MOST, self._done) - 1, -1):
            text = self._decode(self._context, end)
            if not text.endswith(_UNFINISHED):
                piece = text[len(self._decode(self._context, self._done)) :]
                if end > self._done:
                    self._context, self._done = self._done, end
                return piece + (self._rest(count) if last else "")
        return self._rest(count if last else count - _MOST)  # bytes that are no text

    def _rest(self, end: int) -> str:
        """What is not written yet, up to ``end``, without its context."""
        if end <= self._done:
            return ""
        piece = self._decode(self._done, end)
        self._context = self._done = end
        return piece

    def _decode(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self._tokens[start:end], skip_special_tokens=True))
