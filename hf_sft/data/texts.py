"""Raw texts for pretraining: every token is learned, and the end of each document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_sft.data.chat import IGNORE, EncodingError, TokenRow, any_of, fast_backend, forbidden_tokens, refuse_special
from hf_sft.data.files import Record, read_records
from hf_sft.data.formats import FormatError


def read_texts(path: Path) -> Iterator[Record]:
    """The records of a file; a ``.txt`` file is one record, its whole text.

    Raises:
        ValueError: the file is not UTF-8, or as ``read_records``.
    """
    if path.suffix != ".txt":
        yield from read_records(path)
        return
    try:
        yield Record(1, path.read_bytes().decode("utf-8-sig"), "document")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


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

    Raises:
        ValueError: a slow tokenizer, or one without an end-of-sequence token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.backend = tokenizer, fast_backend(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos_token, which ends each document; set it in its tokenizer_config.json"
            )
        self.forbidden = any_of(forbidden_tokens(tokenizer))

    def encode(self, texts: Sequence[str]) -> list[TokenRow | EncodingError]:
        """The token row of each text, or the error that says why it has none."""
        refused = [self._refusal(text) for text in texts]
        allowed = [text for text, error in zip(texts, refused, strict=True) if error is None]
        encodings = iter(self.backend.encode_batch_fast(allowed, add_special_tokens=True))
        return [error if error is not None else self._row(next(encodings).ids) for error in refused]

    def _refusal(self, text: str) -> EncodingError | None:
        try:
            refuse_special(text, self.forbidden)
        except EncodingError as error:
            return error
        return None

    def _row(self, ids: list[int]) -> TokenRow:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if ids[-1:] != [eos]:
            ids = [*ids, eos]
        labels = list(ids)
        if bos is not None and ids[0] == bos:
            labels[0] = IGNORE
        return TokenRow(input_ids=ids, labels=labels)
