"""Data preparation: gsm8k train to packed, labelled token rows on disk, beside the bare minimum and beside TRL.

    python benchmarks/prepare.py [--data ../shared/data] [--repeats 5] [--output results.json]

- bare: rendering by the chat template and one ``encode_batch``, nothing else: what no preparation can do without.
- hf_sft: reading, checking, rendering, tokenising, labelling, writing to Arrow, packing.
- TRL: the same from the same file: load_dataset, map to prompt and completion (loss on the answers), the preparation of its
  SFTTrainer with best-fit packing.

Demanded: at most a third of TRL's time. The three alternate in one process; figures are medians. Memory is what a process holds
at most while it prepares a file, and one ten times as large, without mapped files. The warm start is a second preparation of the
same file up to the first batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from records import conclude, parser, table

from hf_sft.arguments import DataArguments
from hf_sft.collators import CausalCollator
from hf_sft.data.bins import Bins
from hf_sft.data.pipeline import prepare_dataset

LENGTH = 2048
SHARE_OF_TRL = 1 / 3


def turns(record: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]


def bare(path: Path, tokenizer: Any) -> int:
    texts = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            texts.append(tokenizer.apply_chat_template(turns(json.loads(line)), tokenize=False))
    return sum(len(each.ids) for each in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))


def prepared(path: Path, tokenizer: Any, cache: Path, rebuild: bool = True, **changes: Any) -> Bins:
    data = DataArguments(max_seq_length=LENGTH, data_cache_dir=str(cache), rebuild_cache=rebuild, **changes)
    return Bins(prepare_dataset(path, tokenizer, data=data).rows, LENGTH)


class TrlPreparation:
    """TRL's ``SFTTrainer._prepare_dataset`` on a trainer that is built once, with a model that is never run."""

    def __init__(self, path: Path, tokenizer: Any, folder: Path) -> None:
        import datasets
        from transformers import Qwen3Config, Qwen3ForCausalLM
        from trl import SFTConfig, SFTTrainer

        datasets.disable_caching()
        datasets.disable_progress_bars()
        self.path, self.tokenizer, self.folder = path, tokenizer, folder
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                num_key_value_heads=1, head_dim=8,
            )
        )  # fmt: skip
        self.args = SFTConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, max_length=LENGTH, packing=True, report_to="none",
            disable_tqdm=True,
        )  # fmt: skip
        first = datasets.Dataset.from_list([self.columns({"question": "?", "answer": "!"})] * 8)
        self.trainer = SFTTrainer(model=model, args=self.args, train_dataset=first, processing_class=tokenizer)

    def columns(self, record: dict[str, str]) -> dict[str, Any]:
        question, answer = turns(record)
        return {"prompt": [question], "completion": [answer]}

    def __call__(self) -> int:
        import datasets

        with tempfile.TemporaryDirectory(dir=self.folder.parent) as cache:
            records = datasets.load_dataset("json", data_files=str(self.path), split="train", cache_dir=cache)
            records = records.map(self.columns, remove_columns=["question", "answer"])
            return len(self.trainer._prepare_dataset(records, self.tokenizer, self.args, True, None, "train"))


def peak_memory(path: Path, tokenizer_folder: Path) -> dict[str, float]:
    """MB at the peak of a process that prepares the file, and before it does."""
    words = [sys.executable, __file__, "--measure_memory", str(path), "--tokenizer", str(tokenizer_folder)]
    answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return json.loads(answer.splitlines()[-1])


def measure_memory(path: Path, tokenizer_folder: Path) -> None:
    import psutil
    from transformers import AutoTokenizer

    tokenizer, process, seen, ended = AutoTokenizer.from_pretrained(tokenizer_folder), psutil.Process(), [], False

    def held() -> int:  # without files that are mapped, whose pages the system takes back
        found = process.memory_info()
        return found.rss - found.shared

    def watch() -> None:
        while not ended:
            seen.append(held())
            time.sleep(0.01)

    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.jsonl"
        small.write_text("".join(line for _, line in zip(range(2000), path.open(), strict=False)))
        prepared(small, tokenizer, Path(folder))  # what is loaded once
        before = held()
        watcher = threading.Thread(target=watch)
        watcher.start()
        bins = prepared(path, tokenizer, Path(folder))
        ended = True
        watcher.join()
    mega = 2**20
    print(json.dumps({"documents": len(bins.lengths), "before": before / mega, "peak": max(seen) / mega}))


def ten_times(path: Path, target: Path) -> Path:
    """Ten times the records, no two alike."""
    lines = [json.loads(line) for line in path.open(encoding="utf-8")]
    with target.open("w", encoding="utf-8") as file:
        for copy in range(10):
            for record in lines:
                file.write(json.dumps({**record, "question": f"{copy}. {record['question']}"}) + "\n")
    return target


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run(data: Path, repeats: int) -> dict[str, Any]:
    from transformers import AutoTokenizer

    path, tokenizer_folder = data / "gsm8k" / "train.jsonl", data / "tokenizers" / "qwen2.5"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    with tempfile.TemporaryDirectory() as folder:
        trl = TrlPreparation(path, tokenizer, Path(folder) / "trl")
        cache = Path(folder) / "cache"
        actions: dict[str, Callable[[], Any]] = {
            "bare": lambda: bare(path, tokenizer),
            "hf_sft": lambda: prepared(path, tokenizer, cache),
            "TRL": trl,
        }
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(repeats):
            for name, action in actions.items():
                seconds[name].append(timed(action))
        bins = prepared(path, tokenizer, cache, rebuild=False)
        warm = [
            timed(lambda: CausalCollator(True, 0)([prepared(path, tokenizer, cache, rebuild=False)[0, 0]]))
            for _ in range(repeats)
        ]
        packing = [timed(lambda: Bins(bins.rows, LENGTH)) for _ in range(repeats)]
        memory = [peak_memory(each, tokenizer_folder) for each in (path, ten_times(path, Path(folder) / "large.jsonl"))]
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "documents": len(bins.lengths),
        "tokens": sum(bins.lengths),
        "bins": len(bins),
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "median": median,
        "hf_sft / bare": median["hf_sft"] / median["bare"],
        "hf_sft / TRL": median["hf_sft"] / median["TRL"],
        "packing": statistics.median(packing),
        "packing / hf_sft": statistics.median(packing) / median["hf_sft"],
        "warm start to the first batch": statistics.median(warm),
        "memory in MB": memory,
    }


def missed(results: dict[str, Any]) -> list[str]:
    """What was demanded and is not met."""
    return ["a third of TRL's time"] if results["hf_sft / TRL"] > SHARE_OF_TRL else []


def markdown(results: dict[str, Any]) -> str:
    """The table of a record."""
    ours = results["median"]["hf_sft"]
    body = [[name, f"{seconds:.2f}", f"{seconds / ours:.2f} times"] for name, seconds in results["median"].items()]
    return table(["gsm8k train, 7,473 conversations", "s", "beside ours"], body)


def main() -> None:
    words = parser(__doc__, "prepare", repeats=5)
    words.add_argument("--data", type=Path, default=Path("../shared/data"))
    words.add_argument("--measure_memory", type=Path, help=argparse.SUPPRESS)
    words.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    options = words.parse_args()
    if options.measure_memory:
        measure_memory(options.measure_memory, options.tokenizer)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    results = {"note": options.note, **run(options.data, options.repeats)}
    results["missed"] = missed(results)
    print(markdown(results))
    for name in ("hf_sft / bare", "hf_sft / TRL", "packing", "warm start to the first batch", "memory in MB"):
        print(f"{name:32} {results[name]}")
    conclude("prepare", results, options.output)


if __name__ == "__main__":
    main()
