"""Raw texts for pretraining: every token is learned, and the end of each document."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from hf_sft.data.chat import IGNORE, EncodingError, TokenRow
from hf_sft.data.messages import FormatError
from hf_sft.data.pieces import ALL, Piece, PieceTokenizer
from hf_sft.data.skeletons import refuse_marks
from hf_sft.data.special import HiddenTokens, SpecialTokensInText, check_choice, refuse_special
from hf_sft.data.templates import forbidden_tokens


def to_text(value: Any) -> str:
    """The text of a record: a string, or an object whose ``text`` is one.

    Raises:
        FormatError: anything else, or a blank text.
    """
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        found = f"an object with {', '.join(map(str, value))}" if isinstance(value, dict) else type(value).__name__
        raise FormatError(f'task_type pretrain reads {{"text": "..."}} or bare strings, and this is {found}')
    if not text.strip():
        raise FormatError("the text is blank")
    return text


class TextEncoder:
    """Encodes texts as documents: the tokens that the tokenizer puts before a text (BOS), the text, the end of sequence.

    All tokens are learned but a BOS.

    Args:
        tokenizer: a fast tokenizer.
        learn_bos: learn a BOS as well, which follows the end of another text where texts are joined.
        special_tokens_in_text: ``refuse`` texts that hold special tokens, or keep these as ``text``: ordinary tokens in the
            text's letters. Then ``special_tokens_met`` counts the texts that hold each.

    Raises:
        ValueError: a slow tokenizer, or one without an end-of-sequence token.
    """

    def __init__(
        self, tokenizer: Any, *, special_tokens_in_text: SpecialTokensInText = "refuse", learn_bos: bool = False
    ) -> None:
        check_choice(special_tokens_in_text)
        self.tokenizer, self.special_tokens_in_text, self.learn_bos = tokenizer, special_tokens_in_text, learn_bos
        self.pieces = PieceTokenizer(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos_token, which ends each document; set it in its tokenizer_config.json"
            )
        self.hidden = HiddenTokens(forbidden_tokens(tokenizer))
        self.forbidden = self.hidden.pattern
        self.special_tokens_met: Counter[str] = Counter()

    def encode(self, texts: Sequence[str]) -> list[TokenRow | EncodingError]:
        """The token row of each text, or the error that says why it has none."""
        special = [self.forbidden.search(text) is not None for text in texts]
        allowed = [text for text, found in zip(texts, special, strict=True) if not found]
        encodings = iter(self.pieces.backend.encode_batch_fast(allowed, add_special_tokens=True))
        return [
            self._with_special(text) if found else self._row(next(encodings).ids)
            for text, found in zip(texts, special, strict=True)
        ]

    def _with_special(self, text: str) -> TokenRow | EncodingError:
        """The row of a text that holds special tokens."""
        try:
            if self.special_tokens_in_text == "refuse":
                refuse_special(text, self.forbidden)
            refuse_marks(text)
        except EncodingError as error:
            return error
        pieces = self.hidden.cut(Piece(self.hidden.hide(text), ALL), self.pieces.continues)
        found = self.pieces.encode(pieces)
        ids = [found[piece.text, piece.place] for piece in pieces]
        if refusal := next((part for part in ids if isinstance(part, EncodingError)), None):
            return refusal
        self.special_tokens_met.update(set(self.forbidden.findall(text)))
        return self._row([*self._lead, *itertools.chain.from_iterable(ids)])  # type: ignore[arg-type]

    @cached_property
    def _lead(self) -> list[int]:
        """The tokens that the tokenizer puts before a text."""
        bare, whole = (self.pieces.backend.encode("a", add_special_tokens=flag).ids for flag in (False, True))
        return whole[: next(n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)]

    def _row(self, ids: list[int]) -> TokenRow:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if ids[-1:] != [eos]:
            ids = [*ids, eos]
        labels = list(ids)
        if bos is not None and ids[0] == bos and not self.learn_bos:
            labels[0] = IGNORE
        return TokenRow(input_ids=ids, labels=labels)
