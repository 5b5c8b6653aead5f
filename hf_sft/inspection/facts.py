"""An inspection in words: the figures that the terminal and the page show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hf_sft.inspection.findings import of
from hf_sft.inspection.report import Histogram, Inspection, Sample, SplitInspection

_SHOWN = ("shortest", "5 %", "median", "95 %", "longest")


def facts_of(split: SplitInspection) -> list[tuple[str, str]]:
    """Figures of one split: (what, value)."""
    report, counts = split.report, split.counts
    dropped, bad = report.get("dropped") or {}, report.get("bad") or {}
    records = report.get("records")
    facts = []
    if records is not None:
        facts.append(("records read", f"{records:,}"))
        facts.append(("kept", of(report.get("kept", 0), records, "records")))
        left_out = {
            "longer than max_seq_length": dropped.get("overlength"),
            "with nothing to learn": dropped.get("no_supervised_token"),
            "that cannot be used": bad.get("count"),
        }
        facts.append(("left out", ", ".join(f"{count:,} {why}" for why, count in left_out.items() if count) or "none"))
    facts.append(("rows", f"{split.rows:,} with {split.tokens:,} tokens"))
    facts.append(("learned", of(split.learned, split.tokens, "tokens")))
    facts.append(("tokens of a row", _quantiles(split.lengths)))
    facts.append(("tokens of a learned run", _quantiles(split.answers)))
    whole = counts["documents"] - counts["truncated"]
    facts.append(("end of turn learned", of(whole - counts["open"], whole, "documents that are whole")))
    if split.ends:
        facts.append(("learned last", _counted({repr(text): count for text, count in split.ends.items()})))
    if counts["truncated"]:
        facts.append(("cut at max_seq_length", of(counts["truncated"], split.rows, "rows")))
    if report.get("cut_into_several"):
        facts.append(("cut into several rows", f"{report['cut_into_several']:,} documents"))
    facts.append(("repeated rows", of(counts["duplicates"], split.rows, "rows")))
    if split.packing is not None:
        packing = split.packing
        facts.append(
            ("packed", f"{packing.bins:,} bins of {packing.capacity:,} tokens, {100 * packing.fill:.1f} % full")
        )
    if formats := report.get("formats"):
        facts.append(("formats", _counted(formats)))
    facts.append(("special tokens in texts", _counted(report.get("special_tokens_in_text") or {}) or "none"))
    return facts


def common_facts(inspection: Inspection) -> list[tuple[str, str]]:
    """Figures of the whole."""
    facts = list(inspection.facts.items())
    if overlap := inspection.overlap:
        facts.append(("evaluation rows in train", of(overlap.same, overlap.rows, "rows")))
        facts.append(("their prompts, answered otherwise", of(overlap.same_prompt, overlap.rows, "rows")))
    return facts


def sources_of(split: SplitInspection) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a table of the sources."""
    header = ["source", "weight", "records", "kept", "left out", "bad", "tokens", "learned"]
    sources = split.report.get("sources") or []
    names = [str(source.get("source", "")) for source in sources]
    short = [name.replace("\\", "/").rsplit("/", 1)[-1] for name in names]
    rows = []
    for number, source in enumerate(sources):
        dropped = sum((source.get("dropped") or {}).values())
        numbers = [
            source.get("records"),
            source.get("kept"),
            dropped,
            (source.get("bad") or {}).get("count"),
            source.get("tokens"),
        ]
        share = source.get("supervised_share")
        rows.append(
            [
                short[number] if short.count(short[number]) == 1 else names[number],
                f"{source.get('weight', 1):g}",
                *("" if number is None else f"{number:,}" for number in numbers),
                "" if share is None else f"{100 * share:.1f} %",
            ]
        )
    return header, rows


def bad_records(split: SplitInspection) -> tuple[list[tuple[str, str]], list[str]]:
    """(reasons with their numbers, examples with their places)."""
    bad = split.report.get("bad") or {}
    return [(reason, f"{count:,}") for reason, count in (bad.get("reasons") or {}).items()], list(
        bad.get("examples") or []
    )


def title_of(sample: Sample) -> str:
    """What a sample is, and where it comes from."""
    why = f"{', '.join(sample.why)}: " if sample.why else ""
    cut = f", cut from {sample.full_length:,}" if sample.full_length > sample.length else ""
    return f"{why}row {sample.row:,}, {place_of(sample)}, {sample.length:,} tokens{cut}, {sample.learned:,} learned"


def place_of(sample: Sample) -> str:
    """File and record."""
    return f"record {sample.record:,} of {sample.source}"


def bars_of(histogram: Histogram, unit: str = "") -> list[tuple[str, int]]:
    """(range, count) of each bin; borders are whole numbers."""
    borders = [int(border) for border in histogram.borders]
    last = len(histogram.counts) - 1
    return [
        (f"{borders[i]:,} to {borders[i + 1] - (unit != '%' or i != last):,}{' ' * bool(unit)}{unit}", count)
        for i, count in enumerate(histogram.counts)
    ]


def _quantiles(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {values[name]:,}" for name in _SHOWN if name in values) or "none"


def _counted(counts: dict[str, int] | Iterable[tuple[str, int]], most: int = 6) -> str:
    items: Sequence[tuple[str, int]] = list(counts.items() if isinstance(counts, dict) else counts)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(f"{name} ({count:,})" for name, count in items[:most]) + more
