"""An inspection on the terminal: figures, findings, and rows with what is learned in colour, or between brackets without it.

Nothing of a record reaches the terminal as a command: control characters are written out, and rich's markup is never parsed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from hf_sft.inspection.facts import bad_records, bars_of, common_facts, facts_of, place_of, sources_of, title_of
from hf_sft.inspection.findings import SEVERITIES, Finding
from hf_sft.inspection.report import Histogram, Inspection, Packing, Sample, SplitInspection
from hf_sft.inspection.texts import Token, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_COLOURS = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}
_LEARNED, _READ, _SPECIAL, _CUT = "green", "default", "bold magenta", "italic dim"
_BRACKETS = ("\u27e6", "\u27e7")
_ASCII_BRACKETS = ("[[", "]]")
_BAR = 40  # columns of the longest bar


def show(inspection: Inspection, console: Console, *, tokens: bool = False) -> None:
    """Print an inspection.

    Learned text is green; where the console has no colours, it stands between brackets.

    Args:
        console: where to; its width and colours decide the form.
        tokens: a line for each token of the samples, with its id and label.
    """
    _Terminal(console, tokens).show(inspection)


def counted(findings: Sequence[Finding]) -> str:
    """ "1 error, 2 notes"."""
    numbers = {severity: sum(each.severity == severity for each in findings) for severity in SEVERITIES}
    told = [f"{number} {severity}{'s' * (number > 1)}" for severity, number in numbers.items() if number]
    return ", ".join(told) or "nothing that usually goes wrong was found"


class _Terminal:
    def __init__(self, console: Console, tokens: bool) -> None:
        from rich.text import Text

        self.console, self.tokens, self._text = console, tokens, Text
        self.colour = console.color_system is not None and not console.no_color
        self.unicode = (console.encoding or "").lower().startswith("utf")
        self.brackets = ("", "") if self.colour else _BRACKETS if self.unicode else _ASCII_BRACKETS

    def text(self, text: str = "", style: str = "") -> Text:
        """Text that is shown as it is, but for control characters."""
        return self._text(visible(text), style=style)

    def print(self, *texts: Any) -> None:
        self.console.print(*texts, soft_wrap=False, highlight=False, markup=False, emoji=False)

    def heading(self, text: str) -> None:
        self.print()
        title = self.text(text, "bold")
        if title.cell_len > self.console.width - 4:  # a rule would cut it
            self.print(title)
        else:
            self.console.rule(title, align="left", characters="\u2500" if self.unicode else "-")

    def show(self, inspection: Inspection) -> None:
        self.facts(common_facts(inspection))
        for split in inspection.splits:
            self.heading(split.name)
            self.facts(facts_of(split))
            self.sources(split)
        self.findings(inspection.findings)
        for split in inspection.splits:
            self.bad(split)
            self.histogram(f"{split.name}: tokens of a row", split.length_histogram)
            self.histogram(f"{split.name}: learned share of a row", split.share_histogram, "%")
        self.legend()
        for split in inspection.splits:
            for sample in split.samples:
                self.heading(f"{split.name}, {title_of(sample)}")
                self.sample(sample)
            if split.packing is not None and split.packing.documents:
                self.packing(split.name, split.packing)

    # ---- figures ----

    def facts(self, facts: Iterable[tuple[str, str]]) -> None:
        self.table([], [list(fact) for fact in facts])

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.table import Table

        table = Table(box=None, show_header=bool(header), padding=(0, 2, 0, 0), pad_edge=False)
        for place, name in enumerate(header or ("", "")):
            style = "dim" if place == 0 and not header else ""
            table.add_column(self.text(name), style=style, overflow="fold", no_wrap=place > 0 and len(header) > 4)
        for row in rows:
            table.add_row(*map(self.text, row))
        self.print(table)

    def sources(self, split: SplitInspection) -> None:
        header, rows = sources_of(split)
        if len(rows) > 1:
            self.print()
            self.table(header, rows)

    def findings(self, findings: Sequence[Finding]) -> None:
        self.heading(f"findings: {counted(findings)}")
        for finding in findings:
            where = f"{finding.split}: " if finding.split else ""
            severity = self.text(f"{finding.severity.upper()}  ", _COLOURS[finding.severity])
            self.print(
                self._text().join([severity, self.text(f"{where}{finding.what} "), self.text(finding.do, "italic")])
            )

    def bad(self, split: SplitInspection) -> None:
        reasons, examples = bad_records(split)
        if reasons:
            self.heading(f"{split.name}: records that cannot be used")
            self.table(["reason", "records"], reasons)
            for example in examples:
                self.print(self.text(f"  {_cut(example)}"))

    def histogram(self, title: str, histogram: Histogram, unit: str = "") -> None:
        self.heading(title)
        bars, most = bars_of(histogram, unit), max(histogram.counts, default=0)
        width = max((len(name) for name, _ in bars), default=0)
        room = max(4, min(_BAR, self.console.width - width - 12))
        for name, count in bars:
            length = max(round(room * count / most), 1) if count else 0
            self.print(
                self.text(f"{name:>{width}}  ")
                .append_text(self.text(("\u2588" if self.unicode else "#") * length, "blue"))
                .append(f" {count:,}")
            )

    # ---- rows ----

    def legend(self) -> None:
        self.print()
        learned = self.text(f"{self.brackets[0]}learned{self.brackets[1]}", _LEARNED)
        special = self.text("special token", _SPECIAL)
        parts = [self.text("Samples: "), learned, self.text(", read only, "), special]
        parts = parts if self.colour else parts[:2] + [self.text(" is learned, the rest is read only")]
        self.print(self._text().join(parts))

    def sample(self, sample: Sample) -> None:
        if self.tokens:
            self.table(["place", "id", "label", "text"], list(self._token_rows(sample)))
        else:
            self.print(self._row(sample))

    def _row(self, sample: Sample) -> Text:
        """The text of a row, what is learned marked."""
        text = self._text()
        for style, parts in groupby(self._parts(sample), key=lambda part: part[1]):
            text.append("".join(part for part, _ in parts), style)
        return text

    def _parts(self, sample: Sample) -> Iterator[tuple[str, str]]:
        """(text, style) of each token and of what stands between them."""
        opened = False
        for place, token in enumerate(sample.tokens):
            if place == sample.cut_at:
                yield self.brackets[1] * opened, _LEARNED
                yield f" ... {sample.left_out:,} tokens ... ", _CUT
                opened = False
            if token.learned != opened:
                yield self.brackets[not token.learned], _LEARNED
                opened = token.learned
            yield (
                visible(token.text, also="".join(self.brackets) if self.brackets == _BRACKETS else ""),
                self._style(token),
            )
        yield self.brackets[1] * opened, _LEARNED

    def _style(self, token: Token) -> str:
        if token.special:
            return f"{_SPECIAL} underline" if token.learned else _SPECIAL
        return _LEARNED if token.learned else _READ

    def _token_rows(self, sample: Sample) -> Iterable[list[str]]:
        place = 0
        for number, token in enumerate(sample.tokens):
            if number == sample.cut_at:
                yield ["...", f"{sample.left_out:,} tokens", "", ""]
                place += sample.left_out
            ids = " ".join(map(str, token.ids))
            quoted = visible(token.text).replace("\n", "\\n").replace("\t", "\\t")
            yield [
                str(place),
                ids,
                ids if token.learned else "-100",
                f"'{quoted}'{' special' if token.special else ''}",
            ]
            place += len(token.ids)

    def packing(self, name: str, packing: Packing) -> None:
        tokens = sum(document.length for document in packing.documents)
        free = "" if packing.left_out else f", {packing.capacity - tokens:,} tokens free"
        self.heading(f"{name}, packed: bin {packing.number:,} of {packing.bins:,}, {packing.capacity:,} tokens{free}")
        for number, document in enumerate(packing.documents):
            border = f"document {number}: row {document.row:,}, {place_of(document)}, {document.length:,} tokens"
            self.print(self.text(f"--- {border} ---", "bold blue"))
            self.print(self._row(document))
        if packing.left_out:
            self.print(self.text(f"... {packing.left_out:,} more documents ...", _CUT))


def _cut(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
