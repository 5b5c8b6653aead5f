"""The page of one run or of several: what was learned, from the files that a run leaves in its folder."""

from hf_sft.reports.page import report_page, write_report
from hf_sft.reports.runs import Run, read_run, read_runs

__all__ = ["Run", "read_run", "read_runs", "report_page", "write_report"]
