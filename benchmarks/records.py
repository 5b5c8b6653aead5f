"""What every record carries, the conditions under which its figures were taken; how tables look, and how
scripts begin and end."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hf_sft.checkpoints import versions

FOLDER = Path(__file__).parent / "records"


def read_record(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], body: list[list[str]]) -> str:
    """Markdown: the first column to the left, figures to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percent(share: float) -> str:
    """With its sign, but for what rounds to nothing."""
    return f"{100 * share:+.1f} %".replace("-0.0", "0.0").replace("+0.0", "0.0")


def write_record(name: str, results: Any, path: str | None = None) -> Path:
    """Write ``results`` with hardware, versions and date to ``path`` (default: ``benchmarks/records/NAME.json``)."""
    target = Path(path) if path else FOLDER / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    conditions = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
    }
    record = {"benchmark": name, "conditions": conditions, "results": results}
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return target


def parser(
    doc: str | None, name: str, *, steps: int | None = None, repeats: int | None = None
) -> argparse.ArgumentParser:
    """With the options that scripts share: ``--note``, ``--output``, ``--steps`` and ``--repeats`` where they have a default."""
    found = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    for option, default in (("--steps", steps), ("--repeats", repeats)):
        if default is not None:
            found.add_argument(option, type=int, default=default, help="of each way")
    found.add_argument("--note", help="what else there is to say of the conditions")
    found.add_argument("--output", help=f"where to write the record; default: benchmarks/records/{name}.json")
    return found


def conclude(name: str, results: dict[str, Any], path: str | None) -> None:
    """Write the record and end the process: with an error where ``results["missed"]`` names demands that are not met."""
    print(f"record: {write_record(name, results, path)}")
    if results["missed"]:
        sys.exit(f"demands that are not met: {'; '.join(results['missed'])}")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
