"""What the model will see: samples, lengths, supervision, packing and leaks of prepared data, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_sft.arguments import DataArguments
from hf_sft.data.chat import IGNORE
from hf_sft.data.packing import pack_documents
from hf_sft.inspection.findings import Finding, find_problems
from hf_sft.inspection.scan import Scan, Signs, scan_rows
from hf_sft.inspection.texts import Token, TokenTexts

if TYPE_CHECKING:
    from hf_sft.data.prepared import PreparedData

_QUANTILES = {
    "shortest": 0.0,
    "5 %": 0.05,
    "25 %": 0.25,
    "median": 0.5,
    "75 %": 0.75,
    "95 %": 0.95,
    "99 %": 0.99,
    "longest": 1.0,
}
_MOST_BARS = 24
_MOST_DOCUMENTS = 6  # of a bin that is shown


@dataclass(frozen=True)
class Sample:
    """A row to look at.

    Attributes:
        why: what it was chosen for.
        row: its place in the prepared rows, from 0.
        source, record: the file, and the line or position in it.
        length, full_length: tokens, and before it was cut.
        learned: tokens that are learned.
        tokens: its tokens, without ``left_out`` of them at ``cut_at``.
    """

    why: tuple[str, ...]
    row: int
    source: str
    record: int
    length: int
    full_length: int
    learned: int
    tokens: tuple[Token, ...]
    cut_at: int | None = None
    left_out: int = 0


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` values lie in [borders[i], borders[i + 1]); the last border belongs to the last bin."""

    borders: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """Bins that training will make, and one of them: ``documents`` of it, without ``left_out`` of them.

    ``fill`` is tokens / (bins * capacity).
    """

    capacity: int
    bins: int
    fill: float
    number: int
    documents: tuple[Sample, ...]
    left_out: int


@dataclass(frozen=True)
class SplitInspection:
    """One split.

    Attributes:
        report: what became of the records; see ``RowCounts.report``.
        lengths, answers: quantiles of the tokens of a row, and of a learned run.
        full_99: tokens that 99 of 100 rows have at most, before they were cut.
        length_histogram, share_histogram: of tokens, and of the learned share of a row.
        counts: rows (``answers``, ``empty_answers``: learned runs) that have what; see ``findings``.
        ends: text of a token -> learned runs that it ends, the most frequent first.
        packing: None where nothing is packed.
    """

    name: str
    report: dict[str, Any]
    rows: int
    tokens: int
    learned: int
    lengths: dict[str, int]
    answers: dict[str, int]
    full_99: int
    length_histogram: Histogram
    share_histogram: Histogram
    counts: dict[str, int]
    ends: dict[str, int]
    samples: tuple[Sample, ...]
    packing: Packing | None

    @property
    def share(self) -> float:
        """Learned tokens among all."""
        return self.learned / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Overlap:
    """Rows of ``eval`` that ``train`` has too: whole, or with the same prompt and another answer."""

    rows: int
    same: int
    same_prompt: int


@dataclass(frozen=True)
class Inspection:
    """Everything there is to show. :meth:`to_dict` gives plain values for JSON.

    Attributes:
        splits: ``train``, and ``eval`` if there is any.
        findings: what usually goes wrong and went wrong here, the worst first.
        overlap: None with one split.
        facts: what the data were prepared with.
    """

    splits: tuple[SplitInspection, ...]
    findings: tuple[Finding, ...]
    overlap: Overlap | None = None
    facts: dict[str, str] = field(default_factory=dict)

    def only(self, split: str) -> Inspection:
        """What there is to say about one split, and about both together."""
        return replace(
            self,
            splits=tuple(each for each in self.splits if each.name == split),
            findings=tuple(each for each in self.findings if each.split in (None, split)),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_data(
    prepared: Mapping[str, PreparedData],
    tokenizer: Any,
    *,
    capacity: int,
    samples: int = 5,
    seed: int = 0,
    packing: bool = True,
    data: DataArguments | None = None,
    rows: Mapping[str, Sequence[int]] | None = None,
    most_tokens: int | None = 400,
) -> Inspection:
    """Look at prepared data. Memory does not grow with the length of the rows; 50 bytes per row or so.

    Args:
        prepared: split -> token rows and their report.
        tokenizer: the one that they were prepared with, with its template.
        capacity: tokens of a bin.
        samples: rows drawn at random that are shown besides the longest, the shortest and their like.
        seed: of that draw.
        packing: whether training packs documents.
        data: how they were prepared; decides which findings apply.
        rows: split -> places of rows that are shown in place of a choice.
        most_tokens: of a sample; a longer one is cut in its middle. None: all.

    Raises:
        ValueError: a row that does not exist, or tokens that the tokenizer does not have.
    """
    data = data or DataArguments()
    texts = TokenTexts(tokenizer)
    chat, everything = data.task_type != "pretrain", data.train_on == "all"
    signs = Signs(tokenizer, texts, chat=chat, everything=everything, joined=data.joins_texts)
    scans = {name: scan_rows(part.rows, signs) for name, part in prepared.items()}
    splits = tuple(
        _Split(name, part, scans[name], texts, most_tokens).inspect(
            capacity if packing else None, samples, seed, (rows or {}).get(name)
        )
        for name, part in prepared.items()
    )
    overlap = _overlap(scans["train"], scans["eval"]) if {"train", "eval"} <= scans.keys() else None
    ends = [texts.decode([token]) for token in [signs.end_of_turn, signs.eos] if token is not None]
    facts = {"end of turn": ends[0] if ends else "no token", "capacity of a bin": f"{capacity:,} tokens"}
    if signs.system_prompt:
        facts["system prompt of the template"] = signs.system_prompt
    inspection = Inspection(splits, (), overlap, facts)
    return replace(inspection, findings=find_problems(inspection, data, signs.system_prompt))


def _between(text: str) -> Token:
    """What is shown between tokens, and is none."""
    return Token((), text, learned=False, special=False)


class _Split:
    """The rows of one split with all that is known of them."""

    def __init__(
        self, name: str, prepared: PreparedData, scan: Scan, texts: TokenTexts, most_tokens: int | None
    ) -> None:
        self.name, self.prepared, self.scan, self.texts, self.most_tokens = name, prepared, scan, texts, most_tokens
        sources = prepared.report.get("sources") or []
        self.sources = [str(each.get("source", "")) for each in sources]

    def inspect(self, capacity: int | None, samples: int, seed: int, rows: Sequence[int] | None) -> SplitInspection:
        scan = self.scan
        tokens, learned = int(scan.lengths.sum(dtype=np.int64)), int(scan.learned.sum(dtype=np.int64))
        ends: dict[str, int] = {}
        for token, count in scan.ends.most_common(8):
            text = self.texts.alone(token)
            ends[text] = ends.get(text, 0) + count
        chosen = self._chosen(samples, seed) if rows is None else {self._checked(row): ("asked for",) for row in rows}
        return SplitInspection(
            name=self.name,
            report=dict(self.prepared.report),
            rows=len(scan.lengths),
            tokens=tokens,
            learned=learned,
            lengths=_quantiles(scan.lengths),
            answers=_quantiles(scan.answers),
            full_99=_quantiles(scan.full_lengths)["99 %"],
            length_histogram=histogram(scan.lengths),
            share_histogram=_share_histogram(scan),
            counts={**scan.counts, "duplicates": self._duplicates()},
            ends=ends,
            samples=tuple(self.sample(row, why) for row, why in chosen.items()),
            packing=self._packing(capacity, show=rows is None) if capacity is not None else None,
        )

    def sample(self, row: int, why: tuple[str, ...] = (), most: int | None = None) -> Sample:
        item = self.prepared.rows.with_format("arrow")[row : row + 1]
        ids, labels = (item[name][0].values.to_numpy() for name in ("input_ids", "labels"))
        learned = np.asarray(labels != IGNORE)
        learned[0] = False  # nothing stands before it that it could be predicted from
        most = self.most_tokens if most is None else most
        border = item["rejected_start"][0].as_py() if "rejected_start" in item.column_names else None
        tokens, cut_at, left_out = self._tokens(ids, learned, most, border)
        number = item["source"][0].as_py()
        return Sample(
            why=why,
            row=int(row),
            source=self.sources[number] if number < len(self.sources) else f"source {number}",
            record=item["record"][0].as_py(),
            length=len(ids),
            full_length=item["full_length"][0].as_py(),
            learned=int(learned.sum()),
            tokens=tuple(tokens),
            cut_at=cut_at,
            left_out=left_out,
        )

    def _tokens(
        self, ids: np.ndarray, learned: np.ndarray, most: int | None, border: int | None
    ) -> tuple[list[Token], int | None, int]:
        """Tokens to show, where some are left out, and how many; ``border``: where a pair's rejected side begins."""
        if border is not None:  # each side is cut by itself
            chosen, rejected = ((0, border), (border, len(ids)))
            shown = [self._side(ids, learned, part, None if most is None else most // 2) for part in (chosen, rejected)]
            return [*shown[0], _between("\n--- rejected ---\n"), *shown[1]], None, 0
        if most is None or len(ids) <= most + most // 10:  # to leave out a handful helps nobody
            return self._part(ids, learned, 0, len(ids)), None, 0
        head, tail = most - most // 2, len(ids) - most // 2
        before = self._part(ids, learned, 0, head)
        return [*before, *self._part(ids, learned, tail, len(ids))], len(before), tail - head

    def _side(self, ids: np.ndarray, learned: np.ndarray, side: tuple[int, int], most: int | None) -> list[Token]:
        start, end = side
        if most is None or end - start <= most + most // 10:
            return self._part(ids, learned, start, end)
        head, tail = start + most - most // 2, end - most // 2
        gap = _between(f" ... {tail - head:,} tokens ... ")
        return [*self._part(ids, learned, start, head), gap, *self._part(ids, learned, tail, end)]

    def _part(self, ids: np.ndarray, learned: np.ndarray, start: int, end: int) -> list[Token]:
        part = slice(start, end)
        before = ids[:start].tolist()[-1:]
        return list(self.texts.tokens(ids[part].tolist(), learned[part].tolist(), before=before))

    def _checked(self, row: int) -> int:
        if not 0 <= row < len(self.scan.lengths):
            raise ValueError(f"there is no row {row} in {self.name}: its rows are 0 to {len(self.scan.lengths) - 1}")
        return row

    def _chosen(self, samples: int, seed: int) -> dict[int, tuple[str, ...]]:
        """Row -> what it is shown for."""
        scan = self.scan
        chosen: dict[int, tuple[str, ...]] = {}
        drawn = np.random.default_rng(seed).permutation(len(scan.lengths))[: max(0, samples)]
        cut = np.where(scan.truncated, scan.full_lengths - scan.lengths, 0)
        extremes = {
            "longest": int(scan.lengths.argmax()),
            "shortest": int(scan.lengths.argmin()),
            "most truncated": int(cut.argmax()) if cut.any() else None,
            "lowest supervised share": int((scan.learned / scan.lengths).argmin()),
            "unusual characters": int(scan.oddness.argmax()) if scan.oddness.any() else None,
        }
        for row in drawn.tolist():
            chosen[row] = ("random",)
        for why, place in extremes.items():
            if place is not None:
                chosen[place] = (*chosen.get(place, ()), why)
        return chosen

    def _duplicates(self) -> int:
        told = self.prepared.report.get("duplicates")
        if told is not None and not self.scan.joined:  # of joined texts the report counts texts
            return int(told)
        return len(self.scan.hashes) - len(np.unique(self.scan.hashes))

    def _packing(self, capacity: int, *, show: bool) -> Packing:
        bins = pack_documents(self.scan.lengths.tolist(), capacity)
        sizes = np.array([len(members) for members in bins])
        number = int(np.argsort(sizes, kind="stable")[len(sizes) // 2])  # as many documents as usual
        members = bins[number]
        shown = members[:_MOST_DOCUMENTS] if show else []
        most = None if self.most_tokens is None else max(80, self.most_tokens // max(1, len(shown)))
        return Packing(
            capacity=capacity,
            bins=len(bins),
            fill=float(self.scan.lengths.sum(dtype=np.int64)) / (len(bins) * capacity),
            number=number,
            documents=tuple(self.sample(row, most=most) for row in shown),
            left_out=len(members) - len(shown),
        )


def _quantiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    found = np.quantile(values, list(_QUANTILES.values()), method="inverted_cdf")
    return dict(zip(_QUANTILES, map(int, found), strict=True))


def histogram(values: np.ndarray) -> Histogram:
    """Counts of whole numbers from 0 in bins with round borders; if a few are far above the others, the last bin holds them."""
    longest = int(values.max(initial=0))
    usual = int(np.quantile(values, 0.99, method="inverted_cdf")) if len(values) else 0
    reach = longest if longest <= 1.5 * usual else usual
    width = next(
        size
        for power in range(12)
        for size in (10**power, 2 * 10**power, 5 * 10**power)
        if (reach + 1) / size <= _MOST_BARS
    )
    borders = list(range(0, reach + width + 1, width))
    borders = borders[: -(-(reach + 1) // width) + 1]
    if longest >= borders[-1]:
        borders.append(longest + 1)
    counts, _ = np.histogram(values, borders)
    return Histogram(tuple(borders), tuple(map(int, counts)))


def _share_histogram(scan: Scan) -> Histogram:
    counts, _ = np.histogram(100 * scan.learned / scan.lengths, np.arange(0, 101, 10))
    return Histogram(tuple(range(0, 101, 10)), tuple(map(int, counts)))


def _overlap(train: Scan, evaluation: Scan) -> Overlap:
    same = np.isin(evaluation.hashes, np.unique(train.hashes))
    prompts = np.unique(train.prompts)
    asked = np.isin(evaluation.prompts, prompts[prompts > 0]) & ~same
    return Overlap(len(same), int(same.sum()), int(asked.sum()))
