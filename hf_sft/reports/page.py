"""The page of runs, from its title to the versions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_sft.data.cache import write_file
from hf_sft.inspection.findings import SEVERITIES, of
from hf_sft.inspection.report import Histogram
from hf_sft.pages import (
    Details,
    Facts,
    Grid,
    Heading,
    Notice,
    Notices,
    Section,
    Table,
    Text,
    Tiles,
    histogram_bars,
    render_page,
)
from hf_sft.reports.answers import answers_blocks, stop_check_blocks
from hf_sft.reports.charts import MORE, charts_of
from hf_sft.reports.figures import key_figures, title_line
from hf_sft.reports.findings import find_problems
from hf_sft.reports.runs import Run, read_run
from hf_sft.reports.settings import differences, settings_blocks
from hf_sft.reports.words import figure, listed, percent

REPORT_FILE = "report.html"
_HISTOGRAMS = (
    ("length_histogram", "Tokens of a row", "tokens", ""), ("share_histogram", "Learned share of a row", "%", "%"),
)  # fmt: skip


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` of the run in ``folder`` there, from whichever of its files there are; returns its path.

    Raises:
        ValueError: a file of the run is damaged.
    """
    return write_file(Path(folder) / REPORT_FILE, report_page([read_run(folder)]))


def report_page(runs: Sequence[Run]) -> str:
    """The HTML of one run, or of several laid over each other."""
    sections = [Section(title, blocks) for title, blocks in _sections(runs) if blocks]
    if len(runs) == 1:
        return render_page(runs[0].name, sections, subtitle=title_line(runs[0]))
    return render_page(f"{len(runs)} runs", sections, subtitle=listed([run.name for run in runs], most=8))


def _sections(runs: Sequence[Run]) -> Iterator[tuple[str, list[Any]]]:
    one = len(runs) == 1
    if not one:
        lines = Table(["run", "what it was"], [[run.name, title_line(run)] for run in runs])
        yield "What differed", [lines, differences(runs)]
    yield "Findings", [_findings(runs)]
    yield "Key figures", [_figures(runs)]
    yield "Charts", [*_charts(runs), *_evaluations(runs)]
    yield "Data", _data(runs)
    answers = answers_blocks(runs)
    for run in runs:
        checked = stop_check_blocks(run)
        answers += checked if one or not checked else [Heading(run.name), *checked]
    yield "Answers", answers
    yield "Arguments", _each(runs, lambda run: list(settings_blocks(run)))


def _findings(runs: Sequence[Run]) -> Any:
    found: dict[Notice, list[str]] = {}
    for run in runs:
        for notice in find_problems(run):
            found.setdefault(notice, []).append(run.name)
    ordered = sorted(found, key=lambda notice: SEVERITIES.index(notice.severity))
    notices = [
        notice if len(runs) == 1 else replace(notice, text=f"{listed(found[notice])}: {notice.text}")
        for notice in ordered
    ]
    return Notices(notices) if notices else Text("Nothing that needs attention was found.")


def _figures(runs: Sequence[Run]) -> Any:
    if len(runs) == 1:
        return Tiles(key_figures(runs[0]))
    found = [{name: (value, word) for name, value, word in key_figures(run)} for run in runs]
    rows = []
    for name in dict.fromkeys(name for each in sorted(found, key=len, reverse=True) for name in each):
        cells = (each.get(name, ("", "")) for each in found)
        rows.append([name, *(f"{value} ({word})" if any(map(str.isdigit, word)) else value for value, word in cells)])
    return Table(["", *(run.name for run in runs)], rows)


def _charts(runs: Sequence[Run]) -> Iterator[Any]:
    found = charts_of(runs)
    more = found.pop(MORE, [])
    for group, charts in found.items():
        yield Heading(group)
        yield Grid(charts)
    if more:
        yield Details(MORE, [Grid(more)], open=len(runs) == 1 and len(more) <= 4)
    if not found and not more:
        yield Text("Nothing was logged that could be drawn.")


def _evaluations(runs: Sequence[Run]) -> Iterator[Any]:
    """Tables of everything that evaluations measured, folded up."""
    for run in runs:
        rows = []
        for key in run.logged():
            points = run.points(key)
            if key.startswith("eval_") and not key.endswith(("_runtime", "_per_second")):
                (first, last) = (list(points.items())[place] for place in (0, -1))
                several = f"{figure(first[1])} (step {first[0]:,})" if len(points) > 1 else ""
                extremes = [figure(each(points.values())) if len(points) > 1 else "" for each in (min, max)]
                rows.append([key.removeprefix("eval_"), several, f"{figure(last[1])} (step {last[0]:,})", *extremes])
        if rows:
            summary = "All values of the evaluations" + (f" of {run.name}" if len(runs) > 1 else "")
            yield Details(summary, [Table(["metric", "first", "last", "lowest", "highest"], rows)], printed=False)


def _each(runs: Sequence[Run], make: Any) -> list[Any]:
    """The blocks of one run; of several, folded up under their names."""
    if len(runs) == 1:
        return make(runs[0])  # type: ignore[no-any-return]
    return [Details(run.name, blocks, printed=False) for run in runs if (blocks := make(run))]


# ---- data ----


def _data(runs: Sequence[Run]) -> list[Any]:
    reports = [json.dumps(run.data, sort_keys=True) for run in runs]
    if len(set(reports)) == 1:
        same = [Text("All runs read the same data.")] if len(runs) > 1 and runs[0].data else []
        return [*same, *_data_of(runs[0])]
    return _each(runs, lambda run: list(_data_of(run)))


def _data_of(run: Run) -> Iterator[Any]:
    packing = run.data.get("packing") or {}
    for split in ("train", "eval"):
        report = run.data.get(split)
        if isinstance(report, Mapping) and report:
            yield Heading("Training" if split == "train" else "Evaluation")
            yield Facts(list(_data_facts(report, packing.get(split) or {})))
            charts = list(_histograms(report))
            if charts:
                yield Grid(charts)


def _data_facts(report: Mapping[str, Any], packing: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    records = report.get("records")
    if records:
        yield "records kept", of(report.get("kept", 0), records, "records")
    if rows := report.get("rows") or report.get("kept"):
        yield "rows", f"{rows:,}"
    if tokens := report.get("tokens"):
        yield "tokens", f"{tokens:,}"
        yield "supervised share", percent(report.get("supervised_share", 0.0))
    if mean := report.get("mean_length"):
        yield "tokens of a row", f"{figure(mean)} on average, {report.get('longest', 0):,} at most"
    if packing:
        yield "packing", f"{packing['bins']:,} bins of {packing['capacity']:,} tokens, {percent(packing['fill'])} full"
    if cut := report.get("truncated"):
        yield "cut at max_seq_length", f"{cut:,} rows"
    if same := report.get("duplicates"):
        yield "repeated rows", f"{same:,}"


def _histograms(report: Mapping[str, Any]) -> Iterator[Any]:
    for name, title, label, unit in _HISTOGRAMS:
        if isinstance(found := report.get(name), Mapping) and found.get("counts"):
            histogram = Histogram(tuple(found["borders"]), tuple(found["counts"]))
            yield histogram_bars(title, histogram, x_label=label, unit=unit)
