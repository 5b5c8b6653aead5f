"""Preferences on real pairs through the shipped run file: what training and held-out pairs say before and after.

    python benchmarks/dpo_demo.py [--output results.json]

Runs ``train.py --train_args_file train_args/stories260k-dpo.json``, or reads the run that its output folder holds already.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from records import write_record

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "train_args" / "stories260k-dpo.json"
SHOWN = ("loss", "rewards/margins", "rewards/accuracies")


def measure() -> dict[str, Any]:
    folder = ROOT / json.loads(CONFIG.read_text())["output_dir"]
    if not (folder / "eval_results.json").exists():
        words = ["train.py", "--train_args_file", str(CONFIG), "--disable_tqdm", "true"]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    steps = [line for line in history if "rewards/margins" in line]
    before = next(line for line in history if "eval_loss" in line)
    after = json.loads((folder / "eval_results.json").read_text())
    interval = ("rewards/accuracies_low", "rewards/accuracies_high", "pairs")
    return {
        "train_pairs": json.loads((folder / "data_report.json").read_text())["train"]["kept"],
        "seconds": json.loads((folder / "train_results.json").read_text())["train_runtime"],
        "train_first": {name: steps[0][name] for name in SHOWN},
        "train_last": {name: steps[-1][name] for name in SHOWN},
        "held_out_before": {name: before[f"eval_{name}"] for name in (*SHOWN, *interval)},
        "held_out_after": {name: after[f"eval_{name}"] for name in (*SHOWN, *interval)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="where to write the record; default: benchmarks/records/dpo_demo.json")
    options = parser.parse_args()
    found = measure()
    print("| | loss | margin | accuracy |\n|---|---|---|---|")
    for name in ("train_first", "train_last", "held_out_before", "held_out_after"):
        line = found[name]
        share = f"{100 * line['rewards/accuracies']:.0f} %"
        if "pairs" in line:
            low, high = (100 * line[f"rewards/accuracies_{end}"] for end in ("low", "high"))
            share += f" ({low:.0f} to {high:.0f} %, {line['pairs']} pairs)"
        print(f"| {name.replace('_', ' ')} | {line['loss']:.3f} | {line['rewards/margins']:.2f} | {share} |")
    print(f"{found['train_pairs']} training pairs, {found['seconds']:.0f} s")
    print(f"record: {write_record('dpo_demo', found, options.output)}")


if __name__ == "__main__":
    main()
