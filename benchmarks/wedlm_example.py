"""The WeDLM example from nothing: how long it takes, and what its decodings cost and get right.

    OMP_NUM_THREADS=2 python benchmarks/wedlm_example.py [--output results.json]

Runs ``examples/wedlm/run`` in a new folder and keeps its table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from records import write_record

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="where to write the record; default: benchmarks/records/wedlm_example.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        environment = {**os.environ, "PYTHON": sys.executable}
        process = subprocess.run([ROOT / "examples" / "wedlm" / "run", folder], env=environment, check=False)
        seconds = time.perf_counter() - start
        rows = json.loads(Path(folder, "compare.json").read_text(encoding="utf-8"))
        trained = {
            name: json.loads(Path(folder, name, "train_results.json").read_text(encoding="utf-8"))["train_runtime"]
            for name in ("lm", "wedlm")
        }
    print(f"{seconds:.0f} s in all, training {trained['lm']:.0f} s and {trained['wedlm']:.0f} s")
    results = {"seconds": seconds, "training_seconds": trained, "decodings": rows}
    print(f"record: {write_record('wedlm_example', results, options.output)}")
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
