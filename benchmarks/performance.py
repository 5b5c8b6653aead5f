"""The tables and pictures of docs/performance.md, from the records of the other benchmarks.

    python benchmarks/performance.py

A table stands behind a line ``<!-- NAME -->`` (a record, ``growth AXIS`` or ``engines processes``) up to the next empty line, and
is replaced; pictures go to docs/pictures. Nothing is measured here.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from records import FOLDER, read_record

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "pictures"
_MARKED = re.compile(r"(<!-- ([a-z_]+)(?: ([a-z]+))? -->\n\n)(?:\|.*\n)*\n?")
# Axis -> is it drawn with logarithmic scales, and what stands on the vertical one.
DRAWN = {
    "documents": (False, "microseconds_per_token"),
    "pack": (False, "microseconds_per_token"),
    "length": (False, "microseconds_per_token"),
    "vocabulary": (True, "microseconds_per_token"),
    "accumulation": (False, "seconds"),
    "processes": (False, "processor_seconds_per_pack"),
}
_UNITS = {
    "microseconds_per_token": "microseconds per token", "seconds": "seconds per step",
    "processor_seconds_per_pack": "processor seconds per pack",
}  # fmt: skip


def filled(page: str) -> str:
    """``page`` with every marked table as its record says.

    Raises:
        ValueError: a mark whose record is not there.
    """

    def table(mark: re.Match[str]) -> str:
        name, axis = mark[2], mark[3]
        if not (FOLDER / f"{name}.json").is_file():
            raise ValueError(f"docs/performance.md marks {name}, which has no record: run python benchmarks/{name}.py")
        results = read_record(name)["results"]
        words = [axis] if axis else []
        return f"{mark[1]}{importlib.import_module(name).markdown(results, *words)}\n\n"

    return _MARKED.sub(table, page)


def drawn() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Axis -> its points and their conditions: those of ``growth.py``, and the number of processes, from ``engines.py``."""
    growth, engines = read_record("growth"), read_record("engines")
    found = {axis: (points, growth["conditions"]) for axis, points in growth["results"]["axes"].items()}
    return {**found, "processes": (engines["results"]["processes"], engines["conditions"])}


def draw(axis: str, found: dict[str, Any], conditions: dict[str, Any]) -> Path:
    """One picture per axis of growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logarithmic, figure_name = DRAWN[axis]
    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    for (series, points), marker in zip(found["series"].items(), "os^d", strict=False):
        axes.plot([p["at"] for p in points], [p[figure_name] for p in points], marker=marker, label=series)
    places = sorted({p["at"] for points in found["series"].values() for p in points})
    if axis != "accumulation":  # there a straight line is what counts
        axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:,}" for place in places], minor=False)
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    else:
        axes.set_ylim(0, 1.1 * max(p[figure_name] for points in found["series"].values() for p in points))
    axes.set(xlabel=found["title"], ylabel=_UNITS[figure_name])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(f"{conditions['cores']} CPU cores, medians, {conditions['date']}", fontsize="small", loc="right")
    path = PICTURES / f"growth-{axis}.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return path


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    for axis, (found, conditions) in drawn().items():
        print(draw(axis, found, conditions).relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
