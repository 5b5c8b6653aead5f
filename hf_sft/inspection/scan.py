"""One pass over token rows: a few numbers per row and counts over all of them, in memory that does not grow with their length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_sft.data.chat import IGNORE, encode_conversation, end_of_turn_id
from hf_sft.inspection.texts import TokenTexts, oddness

_AT_ONCE = 1 << 20  # tokens in memory at once, or one row
_SHORTEST_PROMPT = 3  # tokens
_ASKED, _TOLD = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
_MARK = "6f1c9d"  # stands in for a system prompt


class Signs:
    """What to look for in the rows of one tokenizer and template.

    Args:
        tokenizer: a fast tokenizer, with the template of the training if it has one.
        texts: of its tokens.
        chat: whether the rows are conversations.
        everything: whether all is learned but what is marked.
        joined: whether rows are cut from texts that were joined: those of a source are one document then.
    """

    def __init__(
        self, tokenizer: Any, texts: TokenTexts, *, chat: bool, everything: bool = False, joined: bool = False
    ) -> None:
        self.everything, self.joined = everything, joined
        vocabulary = texts.vocabulary()
        self.blank = np.array(
            [not text.strip() and token not in texts.special_ids for token, text in enumerate(vocabulary)]
        )
        self.oddness = oddness(vocabulary)
        self.oddness[list(texts.special_ids)] = 0
        self.lead = np.array([ord(text[0]) if text[:1].isspace() else 0 for text in vocabulary], np.int32)
        names = ("bos", "eos", "unk", "pad")
        self.bos, self.eos, self.unk, pad = (getattr(tokenizer, f"{name}_token_id", None) for name in names)
        if self.unk in (self.bos, self.eos, pad):  # then it is that
            self.unk = None
        probe = _encode(tokenizer, [_ASKED, _TOLD]) if chat else None
        self.end_of_turn = end_of_turn_id(tokenizer) if probe else None
        if self.end_of_turn not in set(tokenizer.added_tokens_decoder) | texts.special_ids:
            self.end_of_turn = None  # the template's answers have no end that is a token
        self.expected_lead: int | None = None
        if probe:
            first = next(label for label in probe["labels"] if label != IGNORE)
            self.expected_lead = int(self.lead[first])
        self.ends = self._end_tokens(texts, probe)
        self.no_prompt = (
            [prompt for prompt in (_prompt(tokenizer, turns) for turns in _EMPTY) if prompt] if probe else []
        )
        self.system_prompt, self.system_ids = _own_system_prompt(tokenizer, texts) if chat else (None, [])

    def _end_tokens(self, texts: TokenTexts, probe: Any) -> np.ndarray:
        """[vocabulary] bool: tokens that may end an answer: special ones, but not those with which a turn begins."""
        ends = np.zeros(texts.size, bool)
        ends[[token for token in texts.special_ids if token < texts.size]] = True
        if probe:
            ends[[i for i, label in zip(probe["input_ids"], probe["labels"], strict=True) if label == IGNORE]] = False
        ends[[token for token in (self.bos, self.unk) if token is not None]] = False
        ends[[token for token in (self.eos, self.end_of_turn) if token is not None]] = True
        return ends


_EMPTY = ([_TOLD], [{"role": "user", "content": ""}, _TOLD])  # conversations without a question


def _encode(tokenizer: Any, turns: list[dict[str, Any]]) -> Any:
    try:
        return encode_conversation(tokenizer, turns)
    except ValueError:
        return None


def _prompt(tokenizer: Any, turns: list[dict[str, Any]]) -> list[int]:
    """The tokens before the answer."""
    row = _encode(tokenizer, turns)
    if row is None:
        return []
    return row["input_ids"][: next(place for place, label in enumerate(row["labels"]) if label != IGNORE)]


def _own_system_prompt(tokenizer: Any, texts: TokenTexts) -> tuple[str | None, list[int]]:
    """The system prompt that the template writes where a conversation has none, and the tokens with which rows then begin."""
    try:
        without = tokenizer.apply_chat_template([_ASKED, _TOLD], tokenize=False)
        with_one = tokenizer.apply_chat_template([{"role": "system", "content": _MARK}, _ASKED, _TOLD], tokenize=False)
    except Exception:  # a template is code: it may raise whatever it likes
        return None, []
    before, found, after = with_one.partition(_MARK)
    if not found or not before or not (without.startswith(before) and without.endswith(after)):
        return None, []
    own = without[len(before) : len(without) - len(after)]
    ids = texts.backend.encode(before + own, add_special_tokens=False).ids[:-1]  # the last may join with what follows
    return (own.strip(), ids) if own.strip() and len(ids) > 3 else (None, [])


@dataclass
class Scan:
    """What the pass found. Arrays have one element per row, in the order of the rows.

    Attributes:
        lengths, full_lengths, learned: int32, tokens.
        answers: int32, lengths of the learned runs, ends included.
        hashes, prompts: uint64, of a row's tokens and of those before its first answer (0: there are too few).
        oddness: int32, of a row's tokens together.
        truncated: bool, rows that were cut.
        counts: how many rows (``answers``, ``empty_answers``: how many runs) have what; see ``_Chunk``.
        ends: how often each token ends a run.
        joined: as ``Signs.joined``.
    """

    lengths: np.ndarray
    full_lengths: np.ndarray
    learned: np.ndarray
    answers: np.ndarray
    hashes: np.ndarray
    prompts: np.ndarray
    oddness: np.ndarray
    truncated: np.ndarray
    counts: dict[str, int]
    ends: Counter[int]
    joined: bool = False


class _Findings(NamedTuple):
    learned: np.ndarray
    answers: np.ndarray
    hashes: np.ndarray
    prompts: np.ndarray
    oddness: np.ndarray
    open: np.ndarray
    cut_answer: np.ndarray


def scan_rows(rows: Any, signs: Signs) -> Scan:
    """Look at each row once.

    Args:
        rows: a ``datasets.Dataset`` with the columns of prepared data.

    Raises:
        ValueError: a token id that the tokenizer does not have.
    """
    rows = rows.with_format("arrow")
    plain = {name: _column(rows, name) for name in ("source", "record", "full_length")}
    lengths = _lengths(rows)
    last = np.ones(len(lengths), bool)  # rows that end their document
    if len(lengths) > 1:
        whole = lengths == plain["full_length"]
        last[:-1] = np.diff(plain["source"]) != 0
        if not signs.joined:
            last[:-1] |= (np.diff(plain["record"]) != 0) | whole[:-1] | whole[1:]
    first = np.roll(last, 1)
    truncated = (lengths < plain["full_length"]) & first & last
    counts: Counter[str] = Counter()
    ends: Counter[int] = Counter()
    parts = []
    for start, stop in _chunks(lengths):
        table = rows[start:stop]
        ids, labels = (_flat(table[name]) for name in ("input_ids", "labels"))
        chunk = _Chunk(ids, labels, lengths[start:stop], signs)
        chunk.count(counts, ends)
        parts.append(chunk.findings())
    found = _Findings(*map(np.concatenate, zip(*parts, strict=True)))
    counts["documents"] = int(last.sum())
    counts["open"] = int((found.open & last & ~truncated).sum())
    counts["truncated"] = int(truncated.sum())
    counts["truncated_answers"] = int((found.cut_answer & truncated).sum())
    return Scan(
        lengths, plain["full_length"].astype(np.int32), found.learned, found.answers, found.hashes, found.prompts,
        found.oddness, truncated, dict(counts), ends, signs.joined,
    )  # fmt: skip


class _Chunk:
    """Rows behind one another.

    Args:
        ids, labels: [tokens] int32.
        lengths: [rows], each at least 1.
    """

    def __init__(self, ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, signs: Signs) -> None:
        if len(ids) and int(ids.max()) >= len(signs.blank):
            raise ValueError(
                f"the rows hold token id {ids.max()}, and the tokenizer has {len(signs.blank)} tokens: they were made with "
                "another tokenizer"
            )
        self.ids, self.signs = ids, signs
        self.stops = np.cumsum(lengths, dtype=np.int64)
        self.starts = self.stops - lengths
        self.learned = labels != IGNORE
        self.learned[self.starts] = (
            False  # a row's first token is never predicted, so no run of learned ones crosses rows
        )
        following = np.append(self.learned[1:], False)
        self.firsts = np.flatnonzero(self.learned & ~np.insert(self.learned[:-1], 0, False))
        self.lasts = np.flatnonzero(self.learned & ~following)
        self.rows = np.searchsorted(self.stops, self.firsts, side="right")  # of each run
        self.first_learned = self.stops.copy()  # of each row; where nothing is learned, behind it
        self.first_learned[self.rows[::-1]] = self.firsts[::-1]
        self._judge_runs()

    def _judge_runs(self) -> None:
        """Which runs are answers, which of them end as they should, and which are empty."""
        ids, signs = self.ids, self.signs
        behind = self._strip(self.lasts, signs.blank)
        self.closed = signs.ends[ids[behind]]
        content = self._strip(behind, signs.ends)
        content = self._strip(content, signs.blank)
        nothing = (content == self.firsts) & (signs.blank | signs.ends)[ids[content]]
        final = np.append(self.rows[1:] != self.rows[:-1], True) if len(self.rows) else np.zeros(0, bool)
        # With everything learned, a run may be what comes before an answer that is not; so may one from the row's beginning.
        prompt = ~final & (signs.everything | (self.firsts - self.starts[self.rows] <= 1))
        self.answer = ~prompt & (self.closed | ~nothing)
        self.empty = self.answer & nothing

    def _strip(self, places: np.ndarray, table: np.ndarray, most: int = 40) -> np.ndarray:
        """``places`` moved to the left over tokens of ``table``, at most to where their runs begin."""
        places = places.copy()
        for _ in range(most):
            moving = (places > self.firsts) & table[self.ids[places]]
            if not moving.any():
                break
            places[moving] -= 1
        return places

    def findings(self) -> _Findings:
        """Of each row, and of each answer."""
        count = len(self.starts)
        open_rows = np.zeros(count, bool)
        open_rows[self.rows[self.answer & ~self.closed]] = True
        hashes, prompts = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
        data = self.ids.tobytes()
        for row, (start, answer, stop) in enumerate(zip(self.starts, self.first_learned, self.stops, strict=True)):
            hashes[row] = _hash(data[4 * start : 4 * stop])
            if answer - start >= _SHORTEST_PROMPT and answer < stop:
                prompts[row] = _hash(data[4 * start : 4 * answer])
        prompts[self._without_prompt()] = 0
        answers = (self.lasts - self.firsts + 1)[self.answer].astype(np.int32)
        odd = np.add.reduceat(self.signs.oddness[self.ids], self.starts).astype(np.int32)
        learned = np.add.reduceat(self.learned, self.starts, dtype=np.int32)
        return _Findings(learned, answers, hashes, prompts, odd, open_rows, self.learned[self.stops - 1])

    def count(self, counts: Counter[str], ends: Counter[int]) -> None:
        """Add what this chunk has."""
        ids, signs, learned = self.ids, self.signs, self.learned
        ends.update(dict(zip(*(part.tolist() for part in np.unique(ids[self.lasts], return_counts=True)), strict=True)))
        counts["answers"] += int(self.answer.sum())
        counts["empty_answers"] += int(self.empty.sum())
        counts["without_prompt"] += len(self._without_prompt())
        counts["own_system_prompt"] += len(self._beginning_with(signs.system_ids))
        if signs.bos is not None:
            counts["two_bos"] += len(self._beginning_with([signs.bos, signs.bos]))
        if signs.unk is not None:
            counts["unknown"] += self._rows_with(learned & (ids == signs.unk))
        if signs.end_of_turn is not None:
            counts["beyond_end"] += self._rows_with(self._learned_beyond_end())
        if signs.expected_lead is not None:
            odd = self.answer & ~self.empty & (signs.lead[ids[self.firsts]] != signs.expected_lead)
            counts["odd_beginnings"] += len(np.unique(self.rows[odd]))

    def _rows_with(self, tokens: np.ndarray) -> int:
        return len(np.unique(np.searchsorted(self.stops, np.flatnonzero(tokens), side="right")))

    def _learned_beyond_end(self) -> np.ndarray:
        """[tokens] bool: ends of turns behind which learning goes on, other than with a further end or a blank."""
        ids, signs = self.ids, self.signs
        text = ~signs.ends[ids] & self.learned
        one, two = (np.append(text[n:], np.zeros(n, bool)) for n in (1, 2))
        blank = np.append(signs.blank[ids[1:]], False)
        return self.learned & (ids == signs.end_of_turn) & one & (~blank | two)

    def _beginning_with(self, wanted: Sequence[int]) -> np.ndarray:
        """Rows that begin with these tokens."""
        rows = np.flatnonzero(self.stops - self.starts >= max(1, len(wanted)))
        if not len(wanted) or not len(rows):
            return rows[:0]
        heads = self.ids[self.starts[rows][:, None] + np.arange(len(wanted))]
        return rows[(heads == np.asarray(wanted)).all(1)]

    def _without_prompt(self) -> np.ndarray:
        """Rows whose first answer stands behind nothing but the template's own text."""
        sizes = self.first_learned - self.starts
        found = [
            rows[sizes[rows] == len(prompt)]
            for prompt in self.signs.no_prompt
            for rows in [self._beginning_with(prompt)]
        ]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)


def _hash(data: Any) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _chunks(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of rows with about ``_AT_ONCE`` tokens."""
    sums, start = np.cumsum(lengths, dtype=np.int64), 0
    while start < len(lengths):
        limit = (sums[start - 1] if start else 0) + _AT_ONCE
        stop = max(start + 1, int(np.searchsorted(sums, limit, side="right")))
        yield start, stop
        start = stop


def _lengths(rows: Any) -> np.ndarray:
    parts = [
        pc.list_value_length(rows[start : start + 10_000]["input_ids"]).to_numpy()
        for start in range(0, len(rows), 10_000)
    ]
    return np.concatenate(parts).astype(np.int32)


def _column(rows: Any, name: str) -> np.ndarray:
    rows = rows.select_columns(name)
    return np.concatenate([rows[start : start + 100_000][name].to_numpy() for start in range(0, len(rows), 100_000)])


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    """The elements of a column of lists, behind one another."""
    return pc.list_flatten(column).to_numpy().astype(np.int32, copy=False)
