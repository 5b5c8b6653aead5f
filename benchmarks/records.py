"""What every record carries: the conditions under which its figures were taken."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hf_sft.checkpoints import versions

FOLDER = Path(__file__).parent / "records"


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


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
