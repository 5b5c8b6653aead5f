"""``hf-sft report``: the page of a run, or of several laid over each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_sft.commands.options import CommandParser
from hf_sft.imports import importing


def main(argv: Sequence[str]) -> int:
    """Write the page that ``argv`` asks for; returns 0. Raises ValueError for everything that a user can put right."""
    parser = CommandParser(
        prog="hf-sft report",
        description="Write one HTML page with what there is to know of a run: findings, figures, charts, answers, arguments; "
        "of several runs what differed, and their charts laid over each other. The page needs no network.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output_dir of a run")
    parser.add_argument(
        "--output", metavar="FILE", help="where to; default: report.html, of one run in its folder (written anew there)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write over the file that --output names")
    options = parser.options(argv)

    with importing():
        from hf_sft.data.cache import write_file
        from hf_sft.drawing import check_new_file
        from hf_sft.reports import read_runs, report_page

    runs = read_runs(options.folders)
    path = Path(options.output or (runs[0].folder / "report.html" if len(runs) == 1 else "report.html"))
    if options.output is not None or len(runs) > 1:
        check_new_file("output", path, (".html", ".htm"), overwrite=options.overwrite)
    page = report_page(runs)
    try:
        print(f"Report: {write_file(path, page)}")
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}): name another file with --output") from None
    return 0
