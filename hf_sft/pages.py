"""Self-contained HTML pages: figures, findings, charts and token rows in one file, without scripts and without the network.

A page is a list of sections, a section a list of blocks. Everything that comes from data is escaped by Jinja.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hf_sft.inspection.facts import bars_of
from hf_sft.inspection.report import Histogram, Sample
from hf_sft.inspection.texts import visible

_WIDTH, _HEIGHT = 400, 220  # of a chart, in the units of its texts: as wide as a phone, so that they can be read there
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 8, 34
_COLOURS, _DASHES = 8, 4
_MOST_POINTS = 400  # of a line: more cannot be told apart
_MOST_TEXT = 2000  # letters of one text
_MOST_PANEL = 12_000  # and of one that is folded up
_MOST_ROWS = 60  # of the table below a chart


# ---- blocks ----


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Heading:
    """Of a part of a section."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Facts:
    """Pairs of a name and a value."""

    facts: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Tiles:
    """The figures that matter most: (name, value, a word on it, or nothing)."""

    tiles: Sequence[tuple[str, str, str]]
    kind: ClassVar[str] = "tiles"


@dataclass(frozen=True)
class Table:
    """Cells by row; the first cell of a row is its heading."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Panel:
    """A text under a heading, with a word on it; what is beyond ``most`` letters is folded up."""

    title: str
    text: str
    note: str = ""
    most: int = 700

    @property
    def head(self) -> str:
        return self.text if len(self.text) <= self.most + self.most // 10 else self.text[: self.most]

    @property
    def rest(self) -> list[str]:
        """What is folded up, in pieces that are not cut, as far as ``_MOST_PANEL`` letters."""
        start, end = len(self.head), min(len(self.text), _MOST_PANEL)
        return [self.text[place : min(place + _MOST_TEXT, end)] for place in range(start, end, _MOST_TEXT)]

    @property
    def left_out(self) -> int:
        """Letters that are not in the page."""
        return max(0, len(self.text) - _MOST_PANEL)


@dataclass(frozen=True)
class Panels:
    """Texts side by side, where the page is wide enough, under a title; ``blocks`` come below."""

    title: str
    panels: Sequence[Panel]
    blocks: Sequence[Any] = ()
    kind: ClassVar[str] = "panels"


@dataclass(frozen=True)
class Notice:
    """Something to know, ``severity`` error, warning or note, and what to do about it."""

    severity: str
    text: str
    do: str = ""


@dataclass(frozen=True)
class Notices:
    notices: Sequence[Notice]
    kind: ClassVar[str] = "notices"


@dataclass(frozen=True)
class Details:
    """Blocks behind a summary, folded up unless ``open``; on paper they are unfolded, or left out if not ``printed``."""

    summary: str
    blocks: Sequence[Any]
    open: bool = False
    printed: bool = True
    kind: ClassVar[str] = "details"


@dataclass(frozen=True)
class Grid:
    """Blocks side by side, where the page is wide enough."""

    blocks: Sequence[Any]
    kind: ClassVar[str] = "grid"


@dataclass(frozen=True)
class TokenRow:
    """A row of tokens with a title; see ``inspection.Sample``."""

    title: str
    sample: Sample

    @property
    def body(self) -> Any:
        """Markup: learned tokens in ``mark``, each token in ``i``, line breaks visible."""
        return _token_markup(self.sample)


@dataclass(frozen=True)
class Key:
    """What the marks in token rows mean, and a box that shows the borders of tokens."""

    kind: ClassVar[str] = "key"


@dataclass(frozen=True)
class Samples:
    """Token rows, the first ``open`` of them unfolded."""

    samples: Sequence[TokenRow]
    open: int = 3
    kind: ClassVar[str] = "samples"


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Bars:
    """A histogram: labels and counts of neighbouring bins.

    Args:
        ticks: what stands below the left border of a bin, and behind the last one; default: nothing.
    """

    title: str
    bars: Sequence[tuple[str, int]]
    ticks: Sequence[str] = ()
    x_label: str = ""
    y_label: str = "rows"
    kind: ClassVar[str] = "bars"

    def rows(self) -> list[list[str]]:
        return [[label, f"{count:,}"] for label, count in self.bars]

    def chart(self) -> dict[str, Any]:
        most = max((count for _, count in self.bars), default=0)
        scale = _Scale(0, max(most, 1), _HEIGHT - _BOTTOM, _TOP).widened()
        step = (_WIDTH - _LEFT - _RIGHT) / max(1, len(self.bars))
        bars = []
        for place, (label, count) in enumerate(self.bars):
            top = scale(count)
            shape = {"x": _LEFT + place * step + 0.5, "y": top, "width": step - 1, "height": scale(0) - top}
            bars.append({"label": f"{label}: {count:,}", **{key: round(value, 1) for key, value in shape.items()}})
        every = max(1, math.ceil(len(self.ticks) / 8))
        x_ticks = [
            {"at": round(_LEFT + place * step, 1), "label": self.ticks[place]}
            for place in range(0, len(self.ticks), every)
        ]
        return {**_frame(self.x_label), "bars": bars, "x_ticks": x_ticks, "y_ticks": scale.ticks(whole=True)}


def histogram_bars(title: str, histogram: Histogram, *, x_label: str = "", unit: str = "") -> Bars:
    """The chart of a histogram."""
    ticks = [f"{int(border):,}" for border in histogram.borders]
    return Bars(title, bars_of(histogram, unit), ticks, x_label)


@dataclass(frozen=True)
class Series:
    """A line; values that are not finite leave a gap.

    Args:
        dots: what was measured now and then: its points are marked.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    dots: bool = False


@dataclass(frozen=True)
class Lines:
    """A line chart of one or several series, told apart by colour and by dashes.

    Args:
        log: a logarithmic y axis; values that are not above zero leave a gap.
        whole: x values are whole numbers.
        span: the x values at the ends of the axis; default: of what is drawn.
    """

    title: str
    series: Sequence[Series]
    x_label: str = "step"
    log: bool = False
    whole: bool = True
    span: tuple[float, float] | None = None
    kind: ClassVar[str] = "lines"

    def header(self) -> list[str]:
        return [self.x_label, *(series.name for series in self.series if series.xs)]

    def rows(self) -> list[list[str]]:
        """Of the chart's table: x and the value of each series there; of many, some that are evenly spread, and the last."""
        columns = [dict(zip(series.xs, series.ys, strict=True)) for series in self.series if series.xs]
        xs = sorted({x for column in columns for x in column if math.isfinite(x)})
        every = math.ceil(len(xs) / _MOST_ROWS)
        shown = sorted({*xs[::every], xs[-1]}) if xs else []
        return [[number(x), *(number(column[x], digits=4) if x in column else "" for column in columns)] for x in shown]

    def chart(self) -> dict[str, Any]:
        parts = [_parts(series, self.log) for series in self.series]
        points = [point for runs in parts for run in runs for point in run]
        if not points:
            return {"lines": []}
        xs, ys = zip(*points, strict=True)
        x_low, x_high = self.span or (min(xs), max(xs))
        x_scale = _Scale(min(x_low, *xs), max(x_high, *xs), _LEFT + 4, _WIDTH - _RIGHT)
        y_scale = _Scale(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP, log=self.log).widened()
        lines = []
        for place, (series, runs) in enumerate(zip(self.series, parts, strict=True)):
            drawn = [[(round(x_scale(x), 1), round(y_scale(y), 1)) for x, y in run] for run in runs]
            few = sum(map(len, drawn)) <= (60 if series.dots else 6)
            lines.append(
                {
                    "name": series.name,
                    "colour": place % _COLOURS,
                    "dash": (place + place // _COLOURS) % _DASHES,
                    "dotted": series.dots,
                    "parts": [_path(run) for run in drawn if len(run) > 1],
                    "dots": [point for run in drawn if few or len(run) == 1 for point in run],
                }
            )
        x_ticks = x_scale.ticks(whole=self.whole)
        return {**_frame(self.x_label), "lines": lines, "x_ticks": x_ticks, "y_ticks": y_scale.ticks()}


def _path(points: Sequence[tuple[float, float]]) -> Any:
    """The points of a polyline: markup, which is not cut like a text."""
    from markupsafe import Markup

    return Markup(" ".join(f"{x:g},{y:g}" for x, y in points))


def _frame(x_label: str) -> dict[str, Any]:
    return {
        "width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT, "bottom": _BOTTOM, "x_label": x_label,
    }  # fmt: skip


def _parts(series: Series, log: bool) -> list[list[tuple[float, float]]]:
    """Runs of finite points, thinned to what can be seen: of each stretch its lowest and highest."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.xs, series.ys, strict=True):
        if not (math.isfinite(x) and math.isfinite(y)) or (log and y <= 0):
            runs.append([])
        else:
            runs[-1].append((float(x), math.log10(y) if log else float(y)))
    total = sum(map(len, runs))
    if total <= _MOST_POINTS:
        return [run for run in runs if run]
    stretch = math.ceil(2 * total / _MOST_POINTS)
    return [
        [point for start in range(0, len(run), stretch) for point in _extremes(run[start : start + stretch])]
        for run in runs
        if run
    ]


def _extremes(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return sorted({min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])})


class _Scale:
    """From values to places on an axis, and round numbers along it; with ``log``, values are powers of ten."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        if low == high:
            low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log
        self.step = self._step(10**low, 10**high) if log else self._step(low, high)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def widened(self) -> _Scale:
        """To round numbers at both ends."""
        if self.log:
            return self
        low, high = (math.floor(self.low / self.step + 1e-9), math.ceil(self.high / self.step - 1e-9))
        wide = _Scale(low * self.step, high * self.step, self.start, self.end)
        wide.step = self.step
        return wide

    def ticks(self, *, whole: bool = False) -> list[dict[str, Any]]:
        values = self._powers() if self.log else []
        if len(values) < 2:
            values = [math.log10(value) if self.log else value for value in self._even(whole)]
        return [{"at": round(self(value), 1), "label": number(10**value if self.log else value)} for value in values]

    def _powers(self) -> list[float]:
        """1, 2 and 5 times powers of ten, or of many powers some."""
        reach = self.high - self.low
        digits, every = ((1, 2, 5) if reach <= 2.5 else (1,)), max(1, math.ceil(reach / 6))
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [power + math.log10(digit) for power in powers if power % every == 0 for digit in digits]
        return [value for value in values if self.low - 1e-9 <= value <= self.high + 1e-9]

    @staticmethod
    def _step(low: float, high: float) -> float:
        room = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(room))
        return next(size * power for size in (1, 2, 5, 10) if size * power >= room * (1 - 1e-9))

    def _even(self, whole: bool) -> list[float]:
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        step = max(1.0, self.step) if whole else self.step
        first = math.ceil(low / step - 1e-9)
        values = [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]
        return [value for value in values if value > 0] if self.log else values


def number(value: float, digits: int | None = None) -> str:
    """A number for people: 2,484, 0.15, 1.5e-5, 2.5M; by default with the digits that it has, at most six behind the point.

    Args:
        digits: significant digits, where it is no whole number.
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "-inf" if value < 0 else "inf"
    size = abs(value)
    if size < 1e-12:
        return "0"
    if size < 1e-3 or size >= 1e15:
        mantissa, exponent = f"{value:.{(digits or 3) - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    if size >= 1e6:
        power, letter = next(each for each in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if size >= each[0])
        return f"{value / power:.{digits or 4}g}{letter}"
    if float(value).is_integer() or digits is None:
        return f"{round(value, 6):,.10g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"


# ---- pages ----


def render_page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """The HTML of a page. It loads nothing, runs nothing, and shows control characters of its texts by name."""
    return _template().render(title=title, subtitle=subtitle, sections=list(sections))


@functools.lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("page_templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_finalize,
    )
    return environment.get_template("page.html.jinja")


def _finalize(value: Any) -> Any:
    """Texts of any origin pass here before they are escaped."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return visible(value if len(value) <= _MOST_TEXT else f"{value[:_MOST_TEXT]}... ({len(value):,} characters)")


def _token_markup(sample: Sample) -> Any:
    from markupsafe import Markup

    token_markup, gap = Markup('<i{} title="{}">{}</i>'), Markup("<b> ... {:,} tokens ... </b>")
    line_break, special = Markup("<u></u>\n"), Markup(' class="s"')
    pieces: list[Any] = []
    opened = False
    for place, token in enumerate(sample.tokens):
        cut = place == sample.cut_at
        if opened and (cut or not token.learned):
            pieces.append(Markup("</mark>"))
            opened = False
        if cut:
            pieces.append(gap.format(sample.left_out))
        if token.learned and not opened:
            pieces.append(Markup("<mark>"))
            opened = True
        text = line_break.join(visible(token.text).split("\n"))
        pieces.append(token_markup.format(special if token.special else "", " ".join(map(str, token.ids)), text))
    return Markup("").join([*pieces, Markup("</mark>")] if opened else pieces)
