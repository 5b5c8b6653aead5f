"""Continued pretraining on a real text: held-out perplexity before and after, and how long it took.

    python benchmarks/pretrain.py [--output results.json]

stories260k learns the first nine tenths of ../shared/data/text/tinyshakespeare.txt by ``train.py``: as one text, which
``documents`` and ``concat`` cut alike, and with each speech as a text of its own, packed whole (``documents``) or joined
(``concat``). All are measured on the same rows, the last tenth as one text.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from records import write_record

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RUNS = {
    "one text, documents": ("book.txt", "documents"),
    "speeches, documents": ("speeches.jsonl", "documents"),
    "speeches, concat": ("speeches.jsonl", "concat"),
}
SETTINGS: dict[str, Any] = {
    "model_name_or_path": str(DATA / "models" / "stories260k"), "task_type": "pretrain", "max_seq_length": 512,
    "num_train_epochs": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "weight_decay": 0.01, "logging_steps": 50, "eval_on_start": True,
    "save_strategy": "no", "seed": 42, "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def write_texts(folder: Path) -> int:
    """The training texts in both forms, and the held-out text, whose letters are counted."""
    text = (DATA / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    border = text.rindex("\n\n", 0, len(text) * 9 // 10)
    book, held_out = text[:border], text[border + 2 :]
    (folder / "book.txt").write_text(book, encoding="utf-8")
    lines = (json.dumps({"text": speech}) + "\n" for speech in book.split("\n\n"))
    (folder / "speeches.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "held-out.txt").write_text(held_out, encoding="utf-8")
    return len(held_out)


def measure(name: str, folder: Path, letters: int) -> dict[str, Any]:
    file, packing = RUNS[name]
    out = folder / name.replace(", ", "-").replace(" ", "-")
    values = {**SETTINGS, "train_file": str(folder / file), "eval_file": str(folder / "held-out.txt")}
    values |= {"pretrain_packing": packing, "output_dir": str(out), "data_cache_dir": str(folder / "cache")}
    config = folder / f"{out.name}.json"
    config.write_text(json.dumps(values), encoding="utf-8")
    subprocess.run([sys.executable, "train.py", "--train_args_file", str(config)], cwd=ROOT, check=True)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    before = next(line for line in history if "eval_loss" in line)
    after = json.loads((out / "eval_results.json").read_text())
    report = json.loads((out / "data_report.json").read_text())
    result = {
        "run": name,
        "texts": report["train"]["kept"],
        "rows": report["train"]["rows"],
        "learned_tokens": report["train"]["supervised_tokens"],
        "seconds": json.loads((out / "train_results.json").read_text())["train_runtime"],
        "held_out_tokens": after["eval_supervised_tokens"],
        "held_out_characters": letters,
    }
    for when, line in (("before", before), ("after", after)):
        result[f"perplexity_{when}"] = line["eval_perplexity"]
        bits = line["eval_loss"] * after["eval_supervised_tokens"] / math.log(2)
        result[f"bits_per_character_{when}"] = bits / letters
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="where to write the record; default: benchmarks/records/pretrain.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        letters = write_texts(Path(folder))
        results = [measure(name, Path(folder), letters) for name in RUNS]
    print(
        "| run | texts | tokens learned | training | held-out perplexity | bits per character |\n|---|---|---|---|---|---|"
    )
    for r in results:
        print(
            f"| {r['run']} | {r['texts']:,} | {r['learned_tokens']:,} | {r['seconds']:.0f} s "
            f"| {r['perplexity_before']:.1f} -> {r['perplexity_after']:.2f} "
            f"| {r['bits_per_character_before']:.2f} -> {r['bits_per_character_after']:.2f} |"
        )
    print(f"record: {write_record('pretrain', results, options.output)}")


if __name__ == "__main__":
    main()
