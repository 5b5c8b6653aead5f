"""Pages are well formed, self-contained, of bounded size, and show hostile texts as text."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from test_inspection import TOKENIZER, args, bad, chat, look, sound
from test_terminal import HOSTILE

from hf_sft import pages
from hf_sft.data.cache import write_file
from hf_sft.inspection import Inspection
from hf_sft.inspection.page import inspection_page
from hf_sft.pages import (
    Bars,
    Details,
    Facts,
    Grid,
    Heading,
    Lines,
    Notice,
    Notices,
    Panel,
    Panels,
    Section,
    Series,
    Table,
    Text,
    Tiles,
    render_page,
)

VOID = {"meta", "br", "hr", "input", "img", "link"}
EVIL = "<script>alert(1)</script></style></pre>&amp;&lt; \"'`{{ 7*7 }}{% raw %}\x00 <img src=x onerror=y> <!-- ]]>"


class Page(HTMLParser):
    """Checks while it reads; keeps texts, tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.marked: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], "tags are left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), "an attribute stands twice"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "mark":
            self.marked.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        assert "script" not in self.open
        if "style" not in self.open:
            self.texts.append(data)
        if "mark" in self.open:
            self.marked[-1] += data

    @property
    def text(self) -> str:
        return "".join(self.texts)


def read(html: str) -> Page:
    """The page, which must load nothing and run nothing."""
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>") and html.count("</html>") == 1
    assert "://" not in html and "url(" not in html and "@import" not in html
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "base", "form")
        assert not any(name.startswith("on") or name in ("src", "srcset", "action", "style") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert targets <= {f"#{name}" for name in ids}
    assert ("viewport", "width=device-width, initial-scale=1") in [
        (a.get("name"), a.get("content")) for _, a in page.tags
    ]
    assert "prefers-color-scheme: dark" in html and "@media print" in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    return page


def everything(text: str, values: list[float]) -> list[Section]:
    lines = [
        Series(text, range(len(values)), values),
        Series(f"{text} again", range(len(values)), [2 * v for v in values]),
    ]
    blocks = [
        Text(text), Facts([(text, text)]), Table([text, text], [[text, "1"]]), Notices([Notice("error", text, text)]),
        Bars(text, [(text, 3), (text, 0)], ["0", text, text], text, text), Lines(text, lines, text),
        Lines(text, lines[:1], log=True), Heading(text), Tiles([(text, text, text)]),
        Panels(text, [Panel(text, text, text), Panel(text, "")], [Text(text)]),
    ]  # fmt: skip
    return [Section(text, blocks), Section(text, [Details(text, [Grid(blocks)], open=True)]), Section(text, [])]


@pytest.mark.parametrize("text", ["plain", EVIL, HOSTILE, "\ud800 lone", "", "x" * 10**6])
def test_texts_of_any_kind_are_shown_as_text(text) -> None:
    html = render_page(text, everything(text, [1.0, 2.0, 0.5]), subtitle=text)
    page = read(html)
    assert page.text.count("<script>alert(1)</script>") >= 20 * (text == EVIL)
    if text == EVIL:
        assert "</style></pre>&amp;&lt; \"'`{{ 7*7 }}{% raw %}\u2400 <img src=x onerror=y>" in page.text
    assert len(html) < 300_000


def test_a_page_without_anything() -> None:
    read(render_page("nothing", []))


def polylines(html: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline points="([^"]*)"', html)
    assert all(re.fullmatch(r"[-\d.]+,[-\d.]+( [-\d.]+,[-\d.]+)*", points) for points in found)
    return [[tuple(map(float, point.split(","))) for point in points.split()] for points in found]  # type: ignore[misc]


def chart(*series: Series, **options) -> str:
    return render_page("x", [Section("s", [Lines("t", series, **options)])])


def test_lines_stay_inside_and_keep_their_extremes() -> None:
    ys = np.cos(np.linspace(0, 60, 50_000)) + 3
    ys[31_234], ys[17] = 9.0, -4.0
    html = chart(Series("a", range(len(ys)), ys.tolist()))
    read(html)
    (points,) = polylines(html)
    assert len(points) <= pages._MOST_POINTS + 2 and len(html) < 30_000
    assert all(pages._LEFT <= x <= 400 - pages._RIGHT and pages._TOP <= y <= 220 - pages._BOTTOM for x, y in points)
    heights = [y for _, y in points]
    top, unit = pages._TOP, (220 - pages._TOP - pages._BOTTOM) / 15  # the axis goes to round numbers, -5 and 10
    assert min(heights) == round(top + unit, 1) and max(heights) == round(
        top + 14 * unit, 1
    )  # the two outliers are there
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_values_that_are_not_finite_leave_gaps() -> None:
    ys = [1.0, 2.0, math.nan, 3.0, 4.0, math.inf, 5.0]
    html = chart(Series("a", range(7), ys))
    assert [len(points) for points in polylines(html)] == [2, 2] and html.count("<circle") == 5
    assert [len(points) for points in polylines(chart(Series("a", range(4), [1, 0, 10, 100]), log=True))] == [2]
    assert "There are no values." in read(chart(Series("a", [1], [math.nan]))).text
    assert "There are no values." in read(chart()).text
    for constant in ([5.0, 5.0], [0.0, 0.0], [-1e-9, -1e-9], [1e300, 1e300]):
        assert polylines(chart(Series("a", [0, 1], constant)))
    assert chart(Series("a", [3], [2.5])).count("<circle") == 1


def test_series_differ_in_more_than_colour() -> None:
    html = chart(*(Series(f"run {n}", range(30), [n + i for i in range(30)]) for n in range(5)))
    page = read(html)
    assert {f"c{n}" for n in range(5)} <= {word for _, a in page.tags for word in (a.get("class") or "").split()}
    assert {f"d{n}" for n in range(4)} <= {word for _, a in page.tags for word in (a.get("class") or "").split()}
    assert all(page.text.count(f"run {n}") == 3 for n in range(5))  # the line's title, the legend, the table


def test_axes_have_round_numbers() -> None:
    scale = pages._Scale(0.0, 2484, 186, 8)
    assert [tick["label"] for tick in scale.ticks()] == ["0", "500", "1,000", "1,500", "2,000"]
    assert scale.ticks()[0]["at"] == 186
    assert [tick["label"] for tick in pages._Scale(0, 2, 0, 1).ticks(whole=True)] == ["0", "1", "2"]
    assert [tick["label"] for tick in pages._Scale(-6, -4, 0, 1, log=True).ticks()] == [
        "1e-6", "2e-6", "5e-6", "1e-5", "2e-5", "5e-5", "1e-4",
    ]  # fmt: skip
    assert [tick["label"] for tick in pages._Scale(0.1, 0.3, 0, 1).ticks()] == ["0.1", "0.15", "0.2", "0.25", "0.3"]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0, None, "0"), (2484, None, "2,484"), (0.15, None, "0.15"), (1.5e-5, None, "1.5e-5"), (-2.5e6, None, "-2.5M"),
        (1.2345678e-4, 4, "1.235e-4"), (2.003817, 4, "2.004"), (1263.7338, 4, "1,264"), (0.17109, 4, "0.1711"),
        (3.0, 4, "3"), (math.nan, 4, "NaN"), (-math.inf, None, "-inf"), (1e300, None, "1e300"), (1.18e6, 4, "1.18M"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(value, digits, text) -> None:
    assert pages.number(value, digits) == text


def test_a_chart_has_its_table_and_its_span() -> None:
    html = chart(Series("a", [10, 20, 30], [1.0, math.nan, 3.0]), Series("b", [20], [5.0], dots=True), span=(0, 40))
    assert "step a b 10 1 20 NaN 5 30 3" in " ".join(" ".join(read(html).texts).split())
    xs = [x for points in polylines(chart(Series("a", [10, 30], [1.0, 3.0]), span=(0, 40))) for x, _ in points]
    left, right = pages._LEFT + 4, 400 - pages._RIGHT
    assert xs == pytest.approx([left + (right - left) / 4, left + 3 * (right - left) / 4], abs=0.06)
    rows = Lines("t", [Series("a", range(1000), range(1000))]).rows()
    assert len(rows) <= pages._MOST_ROWS + 1 and rows[0] == ["0", "0"] and rows[-1] == ["999", "999"]


def test_what_a_panel_folds_up_is_all_there() -> None:
    text = "".join(chr(97 + n % 26) for n in range(9_000))
    page = read(render_page("x", [Section("s", [Panels("t", [Panel("p", text)])])]))
    assert "8,300 more characters" in page.text and "left out" not in page.text
    start = page.text.index(text[:700])
    assert "".join(page.text[start:].replace("8,300 more characters", "").split()) == text
    page = read(render_page("x", [Section("s", [Panels("t", [Panel("p", text * 2)])])]))
    assert "6,000 characters are left out" in page.text


def test_bars_are_as_high_as_their_counts() -> None:
    html = render_page("x", [Section("s", [Bars("t", [("a", 10), ("b", 5), ("c", 0)], ["0", "1", "2", "3"])])])
    heights = [float(height) for height in re.findall(r'class="bar".*? height="([\d.]+)"', html)]
    assert heights == [178.0, 89.0, 0.0]
    assert "a: 10" in read(html).text


# The page of an inspection


def inspection(**options) -> Inspection:
    return look([chat("Hi <b>", "H\u00e9 & \U0001f642\n", "x", "</pre>"), *sound()], sound(9, seed=1), **options)


def test_the_page_of_an_inspection() -> None:
    html = inspection_page(inspection(rows={"train": [0]}, report=bad(2), data=args(bad_records="skip")))
    page = read(html)
    sample = page.text[page.text.index("asked for: row 0") :].split("\n", 1)[1]
    assert sample.startswith(TOKENIZER.decode(chat("Hi <b>", "H\u00e9 & \U0001f642\n", "x", "</pre>")["input_ids"]))
    assert page.marked[:3] == ["learned", "H\u00e9 & \U0001f642\n<|im_end|>", "</pre><|im_end|>"]
    assert "warning train: 2 of 42 records (4.8 %) cannot be used" in " ".join(page.text.split())
    assert "train.jsonl, line 3: broken" in page.text and "40 with" not in page.text
    assert "document 0: row" in page.text and "Rows of eval" in page.text
    assert '<i class="s" title="256">&lt;|im_end|&gt;</i></mark>' in html and "<u></u>" in html
    assert "Nothing that usually goes wrong" in read(inspection_page(look(sound()))).text


def test_a_record_of_ten_megabytes_makes_no_large_page() -> None:
    text = "".join(chr(33 + n % 90) for n in range(10_000))
    row = chat(text, "Yes")
    large = {name: row[name][:5] + row[name][5:10_000] * 1000 + row[name][10_000:] for name in ("input_ids", "labels")}
    assert len(large["input_ids"]) > 9_000_000
    report = {**bad(3), "formats": {"x" * 10**6: 41}, "sources": [{"source": "y" * 10**6}] * 2}
    report["bad"] = {"count": 1, "reasons": {"r" * 10**6: 1}, "examples": ["e" * 10**6] * 10}
    html = inspection_page(look([large, *sound()], packing=False, report=report))
    read(html)
    assert len(html) < 400_000


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    path = write_file(tmp_path / "new" / "a.html", "one \u00e9")
    assert path.read_text(encoding="utf-8") == "one \u00e9"
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "two \ud800")
    assert path.read_text(encoding="utf-8") == "one \u00e9" and [p.name for p in path.parent.iterdir()] == ["a.html"]


@pytest.mark.slow
def test_a_browser_has_nothing_to_complain_of(tmp_path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    sections = everything(EVIL, [1.0, math.nan, 2.0, 3.0] * 300)
    for name, html in (("a", inspection_page(inspection())), ("b", render_page("x", sections))):
        page, picture = write_file(tmp_path / f"{name}.html", html), tmp_path / f"{name}.png"
        words = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--screenshot={picture}",
        ]
        done = subprocess.run(
            [browser, *words, page.as_uri()], capture_output=True, text=True, timeout=120, check=False
        )
        assert "CONSOLE" not in done.stderr
        assert picture.stat().st_size > 5000
