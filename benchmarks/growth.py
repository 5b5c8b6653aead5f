"""How the cost of a training step grows: with documents per pack, length, vocabulary, and packs per step.

    python benchmarks/growth.py [--steps 7] [--axes documents vocabulary] [--output results.json]

Steps of SFTTrainer on the model of ``causal_step.py`` (4 layers, 256 wide; vocabulary 6,400 unless it is the axis). The points of
one axis are processes of their own whose steps alternate; figures are medians. Two series of an axis are measured one after the
other: so many models fit into memory. With the number of processes cost grows as ``engines.py`` measures.

    documents      2,048 tokens in 4 to 64 documents of equal lengths, causal and WeDLM: equal tokens, so equal time per token
    pack           packs of 512 to 8,192 tokens in documents of gsm8k's lengths: attention stays within documents
    length         one document of 512 to 8,192 tokens: attention grows with its square
    vocabulary     6,400 to 151,680, ours and TRL's
    accumulation   1 to 8 packs per step

Demanded: a token costs at most 1.10 times as much in 8 to 64 documents as in 4, and k packs per step at most 1.10 k times as much
as one. (That is stricter than a distance of 10 % from the line of least squares: such a line bends with what it is to judge.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trainers
from records import conclude, parser, table
from turns import WARM_UP, Way, alternate
from workloads import Row, equal_packs, gsm8k_packs, tokens

VOCABULARY = 6400
DOCUMENTS = (4, 8, 16, 32, 64)
LENGTHS = (512, 1024, 2048, 4096, 8192)
VOCABULARIES = (6400, 16_000, 32_000, 64_000, 151_680)
ACCUMULATIONS = (1, 2, 4, 8)
ALLOWED = 1.10  # times what growth in proportion would give

Points = dict[tuple[str, int], tuple[Way, int]]  # (series, place on the axis) -> how, and tokens per step


def point(
    packs: list[list[Row]], vocabulary: int = VOCABULARY, way: Callable[..., Any] = trainers.ours, **how: Any
) -> Any:
    per_step = sum(map(tokens, packs)) / len(packs) * how.get("accumulation", 1)
    return (way, {"packs": packs, "vocabulary": vocabulary, **how}), round(per_step)


def documents(count: int, length: int = 2048) -> Points:
    packs = {parts: equal_packs(count, parts, VOCABULARY, length) for parts in DOCUMENTS}
    ways = {"causal": trainers.ours, "WeDLM": trainers.wedlm}
    return {(name, parts): point(packs[parts], way=way) for name, way in ways.items() for parts in DOCUMENTS}


def pack(count: int) -> Points:
    return {("causal", length): point(gsm8k_packs(count, VOCABULARY, length)) for length in LENGTHS}


def length(count: int) -> Points:
    return {("causal", size): point(equal_packs(count, 1, VOCABULARY, size)) for size in LENGTHS}


def vocabulary(count: int) -> Points:
    ways = {"SFTTrainer": trainers.ours, "TRL": trainers.trl}
    return {
        (name, size): point(gsm8k_packs(count, size), size, way) for name, way in ways.items() for size in VOCABULARIES
    }


def accumulation(count: int) -> Points:
    packs = gsm8k_packs(count * max(ACCUMULATIONS), VOCABULARY)
    return {("causal", size): point(packs, accumulation=size) for size in ACCUMULATIONS}


AXES = {
    "documents": (documents, "documents per pack of 2,048 tokens"),
    "pack": (pack, "tokens per pack, in documents of gsm8k's lengths"),
    "length": (length, "tokens of one document"),
    "vocabulary": (vocabulary, "rows of the vocabulary"),
    "accumulation": (accumulation, "packs per step"),
}


def run(axis: str, steps: int) -> dict[str, Any]:
    make, title = AXES[axis]
    points = make(steps + WARM_UP)
    found: dict[str, Any] = {}
    for series in dict.fromkeys(name for name, _ in points):  # one series at a time: so many models fit into memory
        ways = {str(place): way for (name, place), (way, _) in points.items() if name == series}
        courses = alternate(ways, steps)
        found[series] = [
            {
                "at": place, "seconds": courses[str(place)].median, "tokens": per_step, "peak_mb": courses[str(place)].peak,
                "microseconds_per_token": 1e6 * courses[str(place)].median / per_step,
            }
            for (name, place), (_, per_step) in points.items()
            if name == series
        ]  # fmt: skip
    return {"title": title, "series": found}


def missed(axes: dict[str, Any]) -> list[str]:
    """What was demanded and is not met."""
    found = []
    for axis in ("documents", "accumulation"):
        points = axes.get(axis, {"title": "", "series": {}})
        for series, (first, *others) in points["series"].items():
            for other in others:
                grown = other["microseconds_per_token"] / first["microseconds_per_token"]
                if grown > ALLOWED:
                    found.append(f"{series}, {other['at']} {points['title']}: a token costs {grown:.2f} times as much")
    return found


def markdown(record: dict[str, Any], axis: str) -> str:
    """The table of one axis."""
    head = [record["axes"][axis]["title"], "", "s / step", "microseconds / token", "peak MB"]
    body = [
        [f"{p['at']:,}", series, f"{p['seconds']:.3f}", f"{p['microseconds_per_token']:.0f}", f"{p['peak_mb']:,.0f}"]
        for series, points in record["axes"][axis]["series"].items()
        for p in points
    ]
    return table(head, body)


def main() -> None:
    words = parser(__doc__, "growth", steps=7)
    words.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    options = words.parse_args()
    record: dict[str, Any] = {"note": options.note, "steps": options.steps, "axes": {}}
    for axis in options.axes:
        record["axes"][axis] = run(axis, options.steps)
        print(markdown(record, axis), end="\n\n", flush=True)
    record["missed"] = missed(record["axes"])
    conclude("growth", record, options.output)


if __name__ == "__main__":
    main()
