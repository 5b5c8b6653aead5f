"""Memory and seconds of ``hf-sft merge``: what a process holds at most while it merges an adapter into a base of several files.

    python benchmarks/merging.py [--repeats 3] [--note "..."] [--output results.json]

Each case is a process of its own, in which ``tests/peak_of_merging.py`` measures: it writes a base of 221 MB in float32 (files
of 40 MB at most) and an adapter, starts anew, merges a small pair first (so that everything is imported) and then this one.
Memory is resident memory (Linux) above that before. "in memory" loads the base, puts the adapter on it, merges by PEFT and saves.

The difference is that of the logits of the merged model and of the adapter on the float base; onto dequantised weights it shows
the quantisation, not an error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "peak_of_merging.py"
CASES = {  # kind of adapter (of the script), how it is merged
    "LoRA": ("plain", "files"),
    "DoRA": ("dora", "files"),
    "LoRA onto dequantised NF4": ("plain", "nf4"),
    "LoRA in memory": ("plain", "memory"),
}


def in_memory(adapter: str, output_dir: str) -> None:
    from hf_sft.merging import load_merged
    from hf_sft.models.inference import base_arguments

    model, tokenizer = load_merged(adapter, base_arguments(adapter, None))
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def measure(folder: Path, kind: str, way: str) -> None:
    """The script with another way to merge; it starts this process anew, with the same words, after it has written its case."""
    script: Any = importlib.import_module(SCRIPT.stem)
    dequantised = {"onto": "dequantized", "quantization": "nf4", "compute_dtype": "float32"}
    merge = in_memory if way == "memory" else partial(script.merge_adapter, **(dequantised if way == "nf4" else {}))
    seconds = 0.0

    def timed(adapter: str, target: str) -> None:
        nonlocal seconds
        start = time.perf_counter()
        merge(adapter, target)
        seconds = time.perf_counter() - start  # of the last, the large one

    script.merge_adapter = timed
    script.main(folder, kind)
    print(json.dumps({"seconds": seconds}))


def case(kind: str, way: str, folder: Path) -> dict[str, float]:
    paths = os.pathsep.join([str(ROOT), str(SCRIPT.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, str(folder), kind, way]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{kind}, {way}: {done.stderr[-3000:]}")
    found, timed = map(json.loads, done.stdout.splitlines()[-2:])
    return {**found, **timed}


def run(repeats: int) -> list[dict[str, Any]]:
    """Cases alternate, so that a slow moment of the machine hits all."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for _ in range(repeats):
        for name, (kind, way) in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                runs[name].append(case(kind, way, Path(folder)))
    results = []
    for name, each in runs.items():
        middle = {key: statistics.median(one[key] for one in each) for key in each[0]}
        peaks, seconds = [one["peak"] for one in each], [one["seconds"] for one in each]
        results.append({"case": name, **middle, "all peaks": peaks, "all seconds": seconds})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", help="goes into the record: what else the machine did")
    parser.add_argument("--output", help="where to write the record; default: benchmarks/records/merging.json")
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)  # of a case: folder, kind, way
    options = parser.parse_args()
    if options.words:
        folder, kind, way = options.words
        measure(Path(folder), kind, way)
        return
    from records import write_record

    results = run(options.repeats)
    print("| merge | peak | seconds | files | largest | adapter | logits differ by |\n|---|---|---|---|---|---|---|")
    for r in results:
        peak, largest, adapter = (f"{r[name] / 1e6:.0f} MB" for name in ("peak", "largest_shard", "adapter"))
        print(
            f"| {r['case']} | {peak} | {r['seconds']:.1f} | {r['shards']:.0f} | {largest} | {adapter} | {r['difference']:.1e} |"
        )
    record = {"note": options.note, "threads of each process": 1, "cases": results}
    print(f"record: {write_record('merging', record, options.output)}")


if __name__ == "__main__":
    main()
