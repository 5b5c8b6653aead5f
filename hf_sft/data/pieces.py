"""Pieces of a rendered conversation and their tokens.

A piece is tokenised by itself. One that continues a text is tokenised behind an anchor where the tokenizer would put a space
before it; one that spells a special token is tokenised as ordinary text.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal, NamedTuple

from hf_sft.data.skeletons import EncodingError
from hf_sft.data.templates import special_tokens

_ANCHORS = ("\n", ":", ">", "x")

# Which tokens of a piece are learned.
ALL, NONE, FIRST, REST = slice(None), slice(0), slice(1), slice(1, None)

Place = Literal["begins", "continues", "spells"]
Key = tuple[str, Place]


class Piece(NamedTuple):
    """A part of a rendered conversation that is tokenised by itself.

    Args:
        place: whether it begins a text (or what stands before matters not, as with a special token), continues one, or spells
            a special token.
        ends: it begins with the token that ends a turn.
        times: how often its tokens stand in the row.
    """

    text: str
    learned: slice
    place: Place = "begins"
    ends: bool = False
    times: int = 1


def fast_backend(tokenizer: Any) -> Any:
    """The Rust tokenizer inside, with truncation and padding off.

    Raises:
        ValueError: a slow tokenizer, which has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer, and hf_sft needs a fast one. Load it with AutoTokenizer, "
            "or convert it so that its folder has a tokenizer.json."
        )
    # State that calls of the tokenizer leave behind; it sets what it needs at each call.
    backend.no_truncation()
    backend.no_padding()
    return backend


class PieceTokenizer:
    """Tokenises pieces in batches through the Rust tokenizer, which must not change meanwhile.

    Args:
        tokenizer: a fast tokenizer.

    Raises:
        ValueError: a slow tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.backend = fast_backend(tokenizer)
        self.special_ids = set(tokenizer.convert_tokens_to_ids(sorted(special_tokens(tokenizer))))
        adds_prefix = any(self._begins_otherwise(probe) for probe in ("a", " a", "1"))
        # The place of a piece that continues a text: it makes no difference to most tokenizers.
        self.continues: Place = "continues" if adds_prefix else "begins"
        self._spelled: dict[str, list[int] | EncodingError] = {}

    def _begins_otherwise(self, text: str) -> bool:
        """Whether the text has other tokens alone than behind a line break: a space is put before it, or removed."""
        alone, behind = self._tokenise([text, "\n" + text])
        return behind[-len(alone) :] != alone

    def encode(self, pieces: Iterable[Piece]) -> dict[Key, list[int] | EncodingError]:
        """Token ids of each distinct text and place, or why there are none."""
        keys = dict.fromkeys((piece.text, piece.place) for piece in pieces)
        found: dict[Key, list[int] | EncodingError] = {
            (text, place): self.spell(text) for text, place in keys if place == "spells"
        }
        joined = [text for text, place in keys if place == "continues"]
        single = [text for text, place in keys if place == "begins"]
        if joined:
            lead, *behind = self._tokenise([_ANCHORS[0], *(_ANCHORS[0] + text for text in joined)])
            for text, ids in zip(joined, behind, strict=True):
                fits = ids[: len(lead)] == lead
                found[text, "continues"] = ids[len(lead) :] if fits else _continue(self.backend, text)
        found.update(((text, "begins"), ids) for text, ids in zip(single, self._tokenise(single), strict=True))
        return found

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _speller(self) -> Any:
        """A copy of the Rust tokenizer that reads special tokens as text."""
        speller = type(self.backend).from_str(self.backend.to_str())
        speller.encode_special_tokens = True
        return speller

    def spell(self, token: str) -> list[int] | EncodingError:
        """The tokens of a special token's text, none of which is special."""
        if token not in self._spelled:
            ids = _continue(self._speller, token)
            if isinstance(ids, list) and not self._is_spelling(ids, token):
                ids = EncodingError(
                    f"the tokenizer cannot write {token!r} as ordinary text: it has no tokens for it but special ones; "
                    "remove it from the data"
                )
            self._spelled[token] = ids
        return self._spelled[token]

    def _is_spelling(self, ids: list[int], token: str) -> bool:
        text = self.backend.decode(ids, skip_special_tokens=False)
        return self.special_ids.isdisjoint(ids) and "".join(text.split()) == "".join(token.split())


def _continue(backend: Any, text: str) -> list[int] | EncodingError:
    """Tokens of a text that continues another, for a tokenizer that begins each text with a space."""
    for anchor in _ANCHORS:
        lead, ids = (
            encoding.ids for encoding in backend.encode_batch([anchor, anchor + text], add_special_tokens=False)
        )
        if ids[: len(lead)] == lead:
            return ids[len(lead) :]
    return EncodingError(f"the tokenizer cannot continue a text with {text[:20]!r}: it has no token border before it")
