"""From records to token rows: chunk by chunk, in this process or in several, every record counted.

A chunk's rows depend on its records alone, so the number of processes changes nothing but the time.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa

from hf_sft.arguments import DataArguments
from hf_sft.data.chat import ChatEncoder, EncodingError, TokenRow, TrainOn
from hf_sft.data.files import BadRecord, Record
from hf_sft.data.formats import Conversation, FormatError, check_template_kwargs, to_conversation
from hf_sft.data.pairs import PairEncoder, check_pair_row, fit_pair, is_tokenised_pair
from hf_sft.data.preferences import PreferencePair, to_preference
from hf_sft.data.templates import has_template, resolve_template
from hf_sft.data.texts import TextEncoder, to_text
from hf_sft.data.tokenize import Overlength, RowCounts, check_token_row, cut_tail, is_token_row
from hf_sft.sources import Source

CHUNK = 1000  # records in memory at once
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("source", pa.int32()),  # place among the sources
        ("record", pa.int64()),  # line or position in the file, from 1
        ("full_length", pa.int32()),  # tokens before anything was cut
        ("rejected_start", pa.int32()),  # of preference pairs (data/pairs.py)
    ]
)


@dataclass(frozen=True)
class RowRules:
    """What an objective asks of token rows.

    Args:
        end_tail: end-of-turn tokens that are learned behind a conversation's last answer; see ``ChatEncoder``.
        mask_token_id: no row may hold it.
        max_prompt_length, max_answer_length: of preference pairs; see ``fit_pair``.
    """

    end_tail: int = 0
    mask_token_id: int | None = None
    max_prompt_length: int | None = None
    max_answer_length: int | None = None

    def apply(self, row: TokenRow | ValueError, max_length: int, *, encoded: bool) -> TokenRow | ValueError:
        """The row as the objective wants it, or what is wrong with it; a tail never makes a row too long.

        ``encoded``: the row was made here; one that came as token rows has no tail of ours.
        """
        if isinstance(row, ValueError):
            return row
        if self.mask_token_id in row["input_ids"]:
            return EncodingError(
                f"it holds the mask token {self.mask_token_id}; take it out of the text, or choose another mask_token"
            )
        return cut_tail(row, max_length, self.end_tail) if self.end_tail and encoded else row


NO_RULES = RowRules()


@dataclass(frozen=True)
class Encoding:
    """How records become token rows; with the tokenizer, all that rows depend on beside the records."""

    task: str = "sft"
    data_format: str = "auto"
    columns: tuple[tuple[str, str], ...] = ()
    chat_templates: tuple[str | None, ...] = (None,)
    system_prompt: str | None = None
    template_kwargs: Mapping[str, Any] | None = None
    train_on: TrainOn = "assistant"
    special_tokens_in_text: str = "refuse"
    max_length: int = 2048
    overlength: Overlength = "drop"
    split_overlap: int = 1
    joined: bool = False  # the rows are texts of any length, which are joined and cut in the next step (data.concat)
    rules: RowRules = NO_RULES
    seed: int = 0

    @classmethod
    def of(cls, data: DataArguments, rules: RowRules, source: Source | None = None, seed: int = 0) -> Encoding:
        """As the arguments say, and the source where it says otherwise.

        Raises:
            ValueError: ``chat_template_kwargs`` is no object.
        """
        source = source or Source("")
        names = source.chat_template or data.chat_template
        return cls(
            task=data.task_type,
            data_format=source.format or data.data_format,
            columns=tuple((source.columns or {}).items()),
            chat_templates=tuple(names) if isinstance(names, list) else (names,),
            system_prompt=source.system_prompt or data.system_prompt,
            template_kwargs=check_template_kwargs(_object(data.chat_template_kwargs)),
            train_on=data.train_on,
            special_tokens_in_text=data.special_tokens_in_text,
            max_length=data.max_seq_length,
            overlength=cast(Overlength, data.overlength_rule),
            split_overlap=data.split_overlap,
            joined=data.joins_texts,
            rules=rules,
            seed=seed,
        )

    @property
    def is_pairs(self) -> bool:
        """Whether records are preference pairs, both of whose sides are learned from."""
        return self.task == "dpo"

    def templates(self, tokenizer: Any) -> list[str]:
        """The Jinja texts; none where raw texts are learned.

        Raises:
            ValueError: as ``resolve_template``.
        """
        named = self.chat_templates != (None,) or self.system_prompt
        if self.task == "pretrain" or not (named or has_template(tokenizer)):
            return []  # in the second case conversations are refused when one is met: token rows need no template
        return [resolve_template(tokenizer, name, self.system_prompt) for name in self.chat_templates]


def _object(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"chat_template_kwargs is no JSON ({error}): {value!r}. Write a JSON object.") from None


class Chunk(NamedTuple):
    """What became of some records.

    Args:
        rows: of ``SCHEMA``; those that are kept.
        counts: what became of each record.
        hashes: [rows] uint64, of the token ids and labels.
        too_long: with ``overlength: error``, the records that are.
    """

    rows: pa.RecordBatch
    counts: RowCounts
    hashes: np.ndarray
    too_long: list[str]


class RowEncoder:
    """Makes token rows of the records of one source.

    Args:
        tokenizer: a fast tokenizer; not needed for records that are token rows already.
        encoding: how.
        name: of the source, for messages.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding, name: str) -> None:
        self.tokenizer, self.encoding, self.name = tokenizer, encoding, name
        self.vocabulary = None if tokenizer is None else len(tokenizer)

    @cached_property
    def encoders(self) -> list[ChatEncoder | TextEncoder | PairEncoder]:
        """One per template."""
        encoding = self.encoding
        if self.tokenizer is None:
            raise ValueError(
                "conversations and texts need a tokenizer: pass it as processing_class, or give token rows"
            )
        specials: Any = encoding.special_tokens_in_text
        if encoding.task == "pretrain":
            return [TextEncoder(self.tokenizer, special_tokens_in_text=specials, learn_bos=encoding.joined)]
        kwargs = dict(encoding.template_kwargs or {})
        chats = [
            ChatEncoder(
                self.tokenizer, template, kwargs, end_tail=encoding.rules.end_tail, special_tokens_in_text=specials
            )
            for template in encoding.templates(self.tokenizer) or [resolve_template(self.tokenizer, None)]
        ]
        return [PairEncoder(chat) if encoding.is_pairs else chat for chat in chats]

    def encode(self, records: list[Record]) -> Chunk:
        """The rows of the records that can be used, and the account of all."""
        encoding, counts = self.encoding, RowCounts(read=len(records))
        kept: list[tuple[TokenRow, int, int]] = []
        too_long: list[str] = []
        for record, found in zip(records, self._token_rows(records, counts), strict=True):
            row = encoding.rules.apply(found, encoding.max_length, encoded=not self._is_tokenised(record.value))
            place = record.where(self.name)
            if isinstance(row, ValueError):
                counts.add_bad(place, row)
                continue
            try:
                rows = self._fit(counts, row)
            except EncodingError as error:
                too_long.append(f"{place}: {error}")
                continue
            kept += [(row_, record.number, len(row["input_ids"])) for row_ in rows]
        rows_, hashes = _record_batch(kept)
        return Chunk(rows_, counts, hashes, too_long)

    def _fit(self, counts: RowCounts, row: Any) -> Sequence[TokenRow]:
        """The row as it is kept, or in several, counted."""
        encoding = self.encoding
        if encoding.is_pairs:
            rules = encoding.rules
            lengths = encoding.max_length, rules.max_prompt_length, rules.max_answer_length
            return fit_pair(counts, row, *lengths, overlength=encoding.overlength)
        overlap, joined = encoding.split_overlap, encoding.joined
        return counts.fit(row, encoding.max_length, encoding.overlength, overlap=overlap, joined=joined)

    def _token_rows(self, records: list[Record], counts: RowCounts) -> list[TokenRow | ValueError]:
        """The token row of each record, or what is wrong with it."""
        parsed = [self._parse(record.value) for record in records]
        found: list[Any] = list(parsed)
        groups: dict[int, list[int]] = {}  # encoder -> places of its records
        for place, value in enumerate(parsed):
            if isinstance(value, (Conversation, PreferencePair, str)):
                counts.formats[_format_of(value)] += 1
                groups.setdefault(self._draw(records[place].number), []).append(place)
            elif not isinstance(value, ValueError):
                counts.formats["token_rows"] += 1
        for number, places in groups.items():
            encoder: Any = self.encoders[number]
            options = {"train_on": self.encoding.train_on} if isinstance(encoder, ChatEncoder) else {}
            encoded = encoder.encode([parsed[place] for place in places], **options)
            counts.special_tokens.update(encoder.special_tokens_met)  # those that are kept as text
            encoder.special_tokens_met.clear()
            for place, row in zip(places, encoded, strict=True):
                found[place] = row
        return found

    def _draw(self, number: int) -> int:
        """The template of a record: by its number and the seed, never by the order of calls."""
        count = len(self.encoders)
        return 0 if count == 1 else random.Random(f"{self.encoding.seed} {number}").randrange(count)

    def _is_tokenised(self, value: Any) -> bool:
        return is_tokenised_pair(value) if self.encoding.is_pairs else is_token_row(value)

    def _parse(self, value: Any) -> Conversation | PreferencePair | str | TokenRow | ValueError:
        encoding = self.encoding
        try:
            if isinstance(value, BadRecord):
                return FormatError(value.reason)
            if encoding.columns and isinstance(value, Mapping):
                value = _rename(value, encoding.columns)
            if encoding.is_pairs:
                if is_tokenised_pair(value):
                    return check_pair_row(value, self.vocabulary)
                return to_preference(value)
            if is_token_row(value):
                return check_token_row(value, self.vocabulary)
            return to_text(value) if encoding.task == "pretrain" else to_conversation(value, encoding.data_format)
        except (FormatError, EncodingError) as error:
            return error


def _format_of(value: Conversation | PreferencePair | str) -> str:
    if isinstance(value, PreferencePair):
        return "preference"
    return "text" if isinstance(value, str) else value.format


def _rename(record: Mapping[str, Any], columns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Fields under our names.

    Raises:
        FormatError: a field that the record does not have.
    """
    new = dict(record)
    for ours, theirs in columns:
        if theirs not in record:
            raise FormatError(
                f"columns takes {ours!r} from {theirs!r}, and the record has {', '.join(map(repr, record))}"
            )
        new.pop(theirs, None)
    return {**new, **{ours: record[theirs] for ours, theirs in columns}}


def _record_batch(kept: list[tuple[TokenRow, int, int]]) -> tuple[pa.RecordBatch, np.ndarray]:
    """Rows of ``SCHEMA``, and a hash of each row."""
    offsets = np.cumsum([0, *(len(row["input_ids"]) for row, _, _ in kept)], dtype=np.int32)
    lists, flats = [], []
    for name in ("input_ids", "labels"):
        parts = (row[name] for row, _, _ in kept)  # type: ignore[literal-required]
        flat = np.fromiter(itertools.chain.from_iterable(parts), np.int32, offsets[-1])
        flats.append(flat)
        lists.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)))
    hashes = np.empty(len(kept), np.uint64)
    for n, (start, end) in enumerate(itertools.pairwise(offsets)):
        digest = hashlib.blake2b(flats[0][start:end].tobytes() + flats[1][start:end].tobytes(), digest_size=8)
        hashes[n] = int.from_bytes(digest.digest(), "little")
    numbers = [
        pa.array(np.zeros(len(kept), np.int32)),
        pa.array([number for _, number, _ in kept], pa.int64()),
        pa.array([length for _, _, length in kept], pa.int32()),
        pa.array([row.get("rejected_start") for row, _, _ in kept], pa.int32()),
    ]
    return pa.RecordBatch.from_arrays([*lists, *numbers], schema=SCHEMA), hashes


# ---- several processes ----

_encoder: RowEncoder | None = None  # of a worker process


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _start_worker(tokenizer: Any, encoding: Encoding, name: str) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if sys.platform == "linux":  # if the parent is killed; else they wait for ever, and hold its connections open
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _encoder = RowEncoder(tokenizer, encoding, name)


def _work(records: list[Record]) -> Chunk:
    assert _encoder is not None
    return _encoder.encode(records)


def encode_records(
    records: Iterable[Record], tokenizer: Any, encoding: Encoding, name: str, workers: int = 1
) -> Iterator[Chunk]:
    """The chunks of the records, in their order.

    Args:
        workers: processes; no more than two chunks per process are under way at once.
    """
    records = iter(records)
    chunks = iter(lambda: list(itertools.islice(records, CHUNK)), [])
    if workers == 1:
        yield from map(RowEncoder(tokenizer, encoding, name).encode, chunks)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker, (tokenizer, encoding, name))
    waiting: deque[Future[Chunk]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
