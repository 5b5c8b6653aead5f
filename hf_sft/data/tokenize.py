"""Token rows: lengths, checks, and the count of what became of each record."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from hf_sft.data.chat import IGNORE, EncodingError, SpecialTokenError, TokenRow

Overlength = Literal["drop", "truncate", "split", "error"]
_MOST_EXAMPLES = 10
_LENGTH_STEP = 256  # tokens
_MOST_BARS = 24  # of a histogram


def supervised_tokens(labels: list[int]) -> int:
    """How many tokens are learned; the first token of a row has none before it and is never predicted."""
    return len(labels) - labels.count(IGNORE) - (bool(labels) and labels[0] != IGNORE)


def truncate_row(row: TokenRow, max_length: int) -> TokenRow:
    """The first ``max_length`` tokens. An answer that is cut loses its end-of-turn token: it is not taught to stop."""
    return TokenRow(input_ids=row["input_ids"][:max_length], labels=row["labels"][:max_length])


def split_row(row: TokenRow, max_length: int, overlap: int = 1) -> list[TokenRow]:
    """Rows of at most ``max_length`` tokens that together learn what ``row`` does, each of its tokens once.

    Each begins with the last ``overlap`` tokens (1 to ``max_length - 1``) of the one before, which are not learned again: what
    is learned in it has at least so many tokens before it.
    """
    rows, step = [truncate_row(row, max_length)], max_length - overlap
    for start in range(step, len(row["input_ids"]) - overlap, step):
        part = slice(start, start + max_length)
        labels = [IGNORE] * overlap + row["labels"][part][overlap:]
        rows.append(TokenRow(input_ids=row["input_ids"][part], labels=labels))
    return rows


def cut_tail(row: TokenRow, max_length: int, tail: int) -> TokenRow:
    """``row`` without as much of its tail of ``tail`` end-of-turn tokens as is beyond ``max_length``."""
    excess = len(row["input_ids"]) - max_length
    has_tail = len(set(row["labels"][-tail - 1 :])) == 1 and row["labels"][-1] != IGNORE
    return truncate_row(row, max_length) if 0 < excess <= tail and has_tail else row


def is_token_row(value: Any) -> bool:
    """Whether a record claims to be tokenised already."""
    return isinstance(value, Mapping) and value.get("input_ids") is not None


def check_token_row(value: Mapping[str, Any], vocabulary: int | None = None) -> TokenRow:
    """A token row as it came, with plain lists.

    Args:
        value: has ``input_ids`` and ``labels``; other keys are left out.
        vocabulary: token ids must be below this.

    Raises:
        EncodingError: no labels, unequal lengths, no tokens, or numbers that are no token ids.
    """
    if value.get("labels") is None:
        raise EncodingError("a token row has input_ids and no labels; add labels, -100 where nothing is learned")
    columns = {}
    for name in ("input_ids", "labels"):
        try:
            array = np.asarray(value[name])
        except (TypeError, ValueError):  # rows within rows, of unequal lengths
            array = np.empty((0, 0))
        if array.ndim != 1 or not (array.dtype.kind in "iu" or array.size == 0):
            raise EncodingError(f"{name} of a token row must be a flat list of whole numbers")
        columns[name] = array
    ids, labels = columns["input_ids"], columns["labels"]
    if len(ids) != len(labels):
        raise EncodingError(
            f"a token row has {len(ids)} input_ids and {len(labels)} labels; they must be of one length"
        )
    if not len(ids):
        raise EncodingError("a token row has no tokens")
    learned = labels[labels != IGNORE]
    highest, lowest = max(ids.max(), learned.max(initial=0)), min(ids.min(), learned.min(initial=0))
    limit = vocabulary or 2**31
    if lowest < 0 or highest >= limit:
        wrong = lowest if lowest < 0 else highest
        raise EncodingError(f"a token row holds {wrong}, but token ids are 0 to {limit - 1} (labels also -100)")
    return TokenRow(input_ids=ids.tolist(), labels=labels.tolist())


@dataclass
class RowCounts:
    """What became of the records: read = kept + dropped + bad."""

    read: int = 0
    kept: int = 0
    overlength: int = 0
    unsupervised: int = 0
    truncated: int = 0
    split: int = 0
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    duplicates: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    special_tokens: Counter[str] = field(default_factory=Counter)
    too_long: Counter[str] = field(default_factory=Counter)  # by the next multiple of _LENGTH_STEP
    lengths: Counter[str] = field(default_factory=Counter)  # rows by their tokens
    shares: Counter[str] = field(default_factory=Counter)  # and by the tenth that their learned share is in, 0 to 9
    bad: Counter[str] = field(default_factory=Counter)
    bad_examples: list[str] = field(default_factory=list)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> RowCounts:
        """The counts that ``vars`` and JSON made plain values of."""
        counters = {
            name: Counter(values[name])
            for name in ("formats", "special_tokens", "too_long", "lengths", "shares", "bad")
        }
        return cls(**{**values, **counters})

    def add(self, other: RowCounts) -> None:
        """Count what another part of the data has counted."""
        for entry in fields(self):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            if entry.name == "longest":
                self.longest = max(mine, theirs)
            elif entry.name == "bad_examples":
                self.bad_examples += theirs[: _MOST_EXAMPLES - len(mine)]
            else:
                setattr(self, entry.name, mine + theirs)

    def add_bad(self, place: str, error: ValueError) -> None:
        """Count a record that is left out; reasons that differ in numbers and quotations count together."""
        reason = str(error)
        kind = re.sub(r"\d+", "N", re.split(r": |[('\"]|; ", reason)[0]).strip()
        if isinstance(error, SpecialTokenError):
            kind = "a text spells a special token"
            self.special_tokens[error.token] += 1
        self.bad[kind or "other"] += 1
        if len(self.bad_examples) < _MOST_EXAMPLES:
            self.bad_examples.append(f"{place}: {reason}")

    def fit(
        self, row: TokenRow, max_length: int, overlength: Overlength, *, overlap: int = 1, joined: bool = False
    ) -> list[TokenRow]:
        """The row as it is kept, or in several if it is split; none where it is dropped (too long, or nothing to learn in it).
        Counted either way.

        Args:
            overlap: as for :func:`split_row`.
            joined: the row is a text that is still to be joined with others and cut (``data.concat``): it has any length, and
                what is made of it is to be counted by :meth:`count`.

        Raises:
            EncodingError: too long, and ``overlength`` is ``error``.
        """
        length = len(row["input_ids"])
        cut = length > max_length and not joined
        if cut and overlength == "error":
            raise EncodingError(
                f"{length} tokens, but max_seq_length is {max_length}; raise it, or set overlength to drop or truncate"
            )
        if cut and overlength == "drop":
            self.add_too_long(length)
            return []
        rows = [row]
        if cut:
            rows = split_row(row, max_length, overlap) if overlength == "split" else [truncate_row(row, max_length)]
        rows = [row for row in rows if supervised_tokens(row["labels"])]
        if not rows:
            self.unsupervised += 1
            return []
        self.truncated += cut and overlength == "truncate"
        self.split += cut and overlength == "split"
        self.kept += 1
        if not joined:
            self.count(rows)
        return rows

    def add_too_long(self, length: int) -> None:
        """Count a record that is left out for its length."""
        self.overlength += 1
        self.too_long[str(-(-length // _LENGTH_STEP) * _LENGTH_STEP)] += 1

    def count(self, rows: Sequence[TokenRow]) -> None:
        """Count rows that are trained on."""
        self.rows += len(rows)
        for row in rows:
            length, learned = len(row["input_ids"]), supervised_tokens(row["labels"])
            self.tokens += length
            self.supervised += learned
            self.longest = max(self.longest, length)
            self.lengths[str(length)] += 1
            self.shares[str(min(9, 10 * learned // max(1, length)))] += 1

    def report(self) -> dict[str, Any]:
        """The counts as plain values for ``data_report.json``."""
        return {
            "records": self.read,
            "kept": self.kept,
            "dropped": {"overlength": self.overlength, "no_supervised_token": self.unsupervised},
            "too_long_lengths": dict(self.too_long),
            "bad": {"count": self.bad.total(), "reasons": dict(self.bad), "examples": self.bad_examples},
            "truncated": self.truncated,
            "cut_into_several": self.split,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "supervised_share": self.supervised / self.tokens if self.tokens else 0.0,
            "longest": self.longest,
            "mean_length": self.tokens / self.rows if self.rows else 0.0,
            "duplicates": self.duplicates,
            "formats": dict(self.formats),
            "special_tokens_in_text": dict(self.special_tokens),
        }

    def histograms(self) -> dict[str, Any]:
        """Of rows, by their tokens and by their learned share in per cent: ``counts[i]`` of them lie in
        [borders[i], borders[i + 1]); the last border belongs to the last bin."""
        lengths = {int(length): count for length, count in self.lengths.items()}
        shares = {10 * int(tenth): count for tenth, count in self.shares.items()}
        width = next(size for power in range(12) for size in (10**power, 2 * 10**power, 5 * 10**power)
                     if self.longest / size < _MOST_BARS)  # fmt: skip
        return {
            "length_histogram": _histogram(lengths, range(0, self.longest + width + 1, width)),
            "share_histogram": _histogram(shares, range(0, 101, 10)),
        }


def _histogram(values: Mapping[int, int], borders: Sequence[int]) -> dict[str, list[int]]:
    counts, _ = np.histogram(list(values), borders, weights=list(values.values()))
    return {"borders": list(borders), "counts": counts.astype(int).tolist()}
