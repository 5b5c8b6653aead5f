"""The page of an inspection: what the model will see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_sft.inspection.facts import bad_records, common_facts, facts_of, place_of, sources_of, title_of
from hf_sft.inspection.report import Inspection, Packing, SplitInspection
from hf_sft.pages import (
    Details,
    Facts,
    Grid,
    Key,
    Notice,
    Notices,
    Samples,
    Section,
    Table,
    Text,
    TokenRow,
    histogram_bars,
    render_page,
)

_ALL = 1 << 30


def inspection_page(inspection: Inspection, title: str = "What the model will see") -> str:
    """The HTML of an inspection."""
    sections = [Section("Findings", [_findings(inspection)])]
    if facts := common_facts(inspection):
        sections.append(Section("Settings", [Facts(facts)]))
    for split in inspection.splits:
        sections.append(Section(split.name, list(_figures(split))))
    for split in inspection.splits:
        sections.append(Section(f"Rows of {split.name}", list(_rows(split))))
    rows = ", ".join(f"{split.rows:,} rows for {split.name}" for split in inspection.splits)
    return render_page(title, sections, subtitle=rows)


def _findings(inspection: Inspection) -> Any:
    if not inspection.findings:
        return Text("Nothing that usually goes wrong was found.")
    return Notices(
        [
            Notice(each.severity, f"{each.split}: {each.what}" if each.split else each.what, each.do)
            for each in inspection.findings
        ]
    )


def _figures(split: SplitInspection) -> Iterable[Any]:
    yield Facts(facts_of(split))
    header, sources = sources_of(split)
    if len(sources) > 1:
        yield Table(header, sources)
    reasons, examples = bad_records(split)
    if reasons:
        yield Table(["records that cannot be used", "records"], reasons)
        yield Details("examples", [Text(example) for example in examples])
    lengths = histogram_bars("Tokens of a row", split.length_histogram, x_label="tokens")
    yield Grid([lengths, histogram_bars("Learned share of a row", split.share_histogram, x_label="%", unit="%")])


def _rows(split: SplitInspection) -> Iterable[Any]:
    yield Key()
    yield Samples([TokenRow(title_of(sample), sample) for sample in split.samples])
    if split.packing is not None and split.packing.documents:
        yield Details(_packing_title(split.packing), [Samples(list(_documents(split.packing)), open=_ALL)], open=True)


def _packing_title(packing: Packing) -> str:
    more = f", {packing.left_out:,} more documents not shown" if packing.left_out else ""
    return f"One bin as it is packed: number {packing.number:,} of {packing.bins:,}, {packing.capacity:,} tokens{more}"


def _documents(packing: Packing) -> Iterable[TokenRow]:
    for number, document in enumerate(packing.documents):
        yield TokenRow(
            f"document {number}: row {document.row:,}, {place_of(document)}, {document.length:,} tokens", document
        )
