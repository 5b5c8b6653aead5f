"""Fine-tuning on real data through the shipped run files: evaluation before and after, and how long it took.

    python benchmarks/real_data.py [NAME ...] [--output results.json]

Runs ``train.py --train_args_file train_args/NAME.json`` for each name, or reads the run that its output folder holds already.
The files name model and data under ../shared/data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from records import write_record

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["stories260k-gsm8k-full", "stories260k-gsm8k-lora", "qwen3-tiny-gsm8k", "stories260k-gsm8k-wedlm"]


def measure(name: str) -> dict:
    config = ROOT / "train_args" / f"{name}.json"
    folder = ROOT / json.loads(config.read_text())["output_dir"]
    if not (folder / "eval_results.json").exists():
        subprocess.run(
            [sys.executable, "train.py", "--train_args_file", config, "--disable_tqdm", "true"], cwd=ROOT, check=True
        )
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    before, after = (
        next(line for line in history if "eval_loss" in line),
        json.loads((folder / "eval_results.json").read_text()),
    )
    report = json.loads((folder / "data_report.json").read_text())
    speed = [line["tokens_per_second"] for line in history if "tokens_per_second" in line]
    return {
        "run": name,
        "documents": report["train"]["kept"],
        "tokens": report["train"]["tokens"],
        "seconds": json.loads((folder / "train_results.json").read_text())["train_runtime"],
        "tokens_per_second": sorted(speed)[len(speed) // 2],
        **{
            f"{key}_{when}": line[f"eval_{key}"]
            for when, line in (("before", before), ("after", after))
            for key in ("loss", "perplexity", "token_accuracy", "any_order_bound", "masked_accuracy")
            if f"eval_{key}" in line
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--output", help="where to write the record; default: benchmarks/records/real_data.json")
    options = parser.parse_args()
    results = [measure(name) for name in options.names or NAMES]
    print("| run | documents | training | eval loss | perplexity | token accuracy |\n|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| `{r['run']}` | {r['documents']:,} | {r['seconds']:.0f} s | {r['loss_before']:.3f} -> {r['loss_after']:.3f} "
            f"| {r['perplexity_before']:,.0f} -> {r['perplexity_after']:.2f} "
            f"| {100 * r['token_accuracy_before']:.1f} % -> {100 * r['token_accuracy_after']:.1f} % |"
        )
    print(f"record: {write_record('real_data', results, options.output)}")


if __name__ == "__main__":
    main()
