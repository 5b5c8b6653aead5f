"""How long a command takes to begin: fresh processes, one of each kind in turn, medians.

    python benchmarks/start_up.py [--repeats 5] [--output FILE] [--note TEXT]

Measured from outside, from the start of a process to a line that it prints: when imports are done, or when the first optimizer
step is in the log (``train.py`` itself, unchanged, with logging_steps 1); beside it the time to the end of the process, and the
processor's time up to the line, which other programs on the machine disturb less. Two yardsticks stand beside ours: the bare
imports of torch and transformers (which loads nothing of itself before it is used), and what every script with a Trainer
imports; and a plain script with transformers' Trainer on the same model and the same 48 conversations. "cold" and "warm" are the
cache of tokenised data. A first round, which brings files into memory, is not counted.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import conclude, parser, table

ROOT = Path(__file__).resolve().parents[1]
READY = "READY"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE, TRAINER = "import torch, transformers", "import what a Trainer script imports"
WARM, PLAIN = "train.py to its first step, warm cache", "plain Trainer script to its first step"
IMPORT_LIMIT, FIRST_STEP_LIMIT = 0.3, 2.0  # seconds: of hf_sft alone, and of train.py beyond torch and transformers
TRAINER_NAMES = "AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments"
# What the plain script does is the least that gives a step on these conversations; nothing is packed, checked or cached.
PLAIN_SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
model, train, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
rows = [tokenizer.apply_chat_template(json.loads(line), return_dict=False) for line in open(train)]
def collate(batch):
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in batch], batch_first=True)
    return {"input_ids": ids, "labels": ids}
arguments = TrainingArguments(output, max_steps=1, logging_steps=1, use_cpu=True, disable_tqdm=True, report_to="none",
                              save_strategy="no", per_device_train_batch_size=2)
model = AutoModelForCausalLM.from_pretrained(model)
Trainer(model, arguments, train_dataset=[{"input_ids": row} for row in rows], data_collator=collate).train()
"""


@dataclass(frozen=True)
class Command:
    """What is started, and the text of the line that is waited for (None: the end of the process)."""

    words: list[str]
    mark: str | None = None


@dataclass(frozen=True)
class Start:
    """Seconds from the start of a process: to the line, of the processor up to it, and to the end."""

    seconds: float
    processor: float
    end: float


def start(command: Command, environment: Mapping[str, str] | None = None) -> Start:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed, or never printed its line; with what it printed.
    """
    import psutil

    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(environment or {})}
    begun = time.perf_counter()
    process = subprocess.Popen(
        command.words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT
    )  # fmt: skip
    watched = psutil.Process(process.pid)
    told: list[str] = []
    seconds, processor = None, 0.0
    assert process.stdout is not None
    for line in process.stdout:
        told.append(line)
        if seconds is None and command.mark is not None and command.mark in line:
            seconds = time.perf_counter() - begun
            processor = sum(watched.cpu_times()[:2])
    _, status, usage = os.wait4(process.pid, 0)
    end = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or (command.mark is not None and seconds is None):
        raise RuntimeError(f"{command.words} ended with {process.returncode}:\n{''.join(told)}")
    if seconds is None:
        seconds, processor = end, usage.ru_utime + usage.ru_stime
    return Start(seconds, processor, end)


def measure(commands: Mapping[str, Command], repeats: int, before: Mapping[str, Any]) -> dict[str, list[Start]]:
    """``repeats`` starts of each command in turn, after one that does not count; ``before`` prepares some of them."""
    found: dict[str, list[Start]] = {name: [] for name in commands}
    for _ in range(repeats + 1):
        for name, command in commands.items():
            before.get(name, lambda: None)()
            found[name].append(start(command))
    return {name: starts[1:] for name, starts in found.items()}


# ---- what is started ----


def imports(names: str) -> Command:
    return Command([sys.executable, "-c", f"{names}; print({READY!r})"], READY)


def commands(folder: Path) -> tuple[dict[str, Command], dict[str, Any]]:
    """The commands, on a small model and a finished run in ``folder``, and what has to be done before some of them."""
    model, train = write_model(folder / "model"), write_conversations(folder / "train.jsonl")
    run, cold = folder / "run.json", folder / "cold"
    values = dict(
        model_name_or_path=model, train_file=train, max_seq_length=256, per_device_train_batch_size=2, max_steps=1,
        logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, report_to="none", stop_check_samples=0,
    )  # fmt: skip
    run.write_text(json.dumps(values), encoding="utf-8")
    here, script = [sys.executable], str(ROOT / "train.py")
    of_run = [*here, script, str(run), "--output_dir"]
    finished, of_cold, of_warm, of_plain = (str(folder / name) for name in ("finished", "out-c", "out-w", "out-p"))
    warm = ["--data_cache_dir", str(folder / "warm")]
    cli = [*here, "-m", "hf_sft.cli"]
    start(Command([*of_run, finished, *warm]))
    found = {
        "python -c pass": Command([*here, "-c", "pass"]),
        "import hf_sft": imports("import hf_sft"),
        BARE: imports("import torch, transformers"),
        TRAINER: imports(f"import torch; from transformers import {TRAINER_NAMES}"),
        "from hf_sft import SFTTrainer": imports("from hf_sft import SFTTrainer"),
        "train.py to its first step, cold cache": Command([*of_run, of_cold, "--data_cache_dir", str(cold)], "step=1/1"),
        WARM: Command([*of_run, of_warm, *warm], "step=1/1"),
        PLAIN: Command([*here, "-c", PLAIN_SCRIPT, model, train, of_plain], "'loss'"),
        "hf-sft --help": Command([*cli, "--help"]),
        "hf-sft train --help": Command([*cli, "train", "--help"]),
        "hf-sft train --help all": Command([*cli, "train", "--help", "all"]),
        "hf-sft inspect": Command([*cli, "inspect", str(run), *warm]),
        "hf-sft generate": Command([*cli, "generate", finished, "--prompt", "a", "--max_new_tokens", "1"]),
        "hf-sft report": Command([*cli, "report", finished]),
    }  # fmt: skip
    before = {
        "train.py to its first step, cold cache": lambda: _remove(cold, of_cold),
        WARM: lambda: _remove(of_warm),
        PLAIN: lambda: _remove(of_plain),
    }
    return found, before


def _remove(*folders: str | Path) -> None:
    import shutil

    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def write_model(folder: Path) -> str:
    """A Qwen3 of two layers and a byte-level tokenizer with ChatML's tokens; made in a process of its own, as all is here."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"]
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(shape).save_pretrained(folder)
    return str(folder)


def write_conversations(path: Path, count: int = 48) -> str:
    """JSON lines: a question and an answer of random words each."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=4)) for _ in range(words))

    rows = [[{"role": "user", "content": text(4)}, {"role": "assistant", "content": text(8)}] for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- what comes of it ----


def summary(found: Mapping[str, list[Start]]) -> dict[str, Any]:
    """Medians of each command, all its figures, and what a first step takes beyond the yardsticks."""
    rows = {
        name: {
            "seconds": round(statistics.median(each.seconds for each in starts), 3),
            "processor_seconds": round(statistics.median(each.processor for each in starts), 3),
            "seconds_to_the_end": round(statistics.median(each.end for each in starts), 3),
            "all_seconds": [round(each.seconds, 3) for each in starts],
        }
        for name, starts in found.items()
    }
    beyond = {}
    if WARM in rows:
        for kind in ("seconds", "processor_seconds"):
            beyond[kind] = {name: round(rows[WARM][kind] - rows[name][kind], 3) for name in (BARE, TRAINER, PLAIN)}
    return {"commands": rows, "first_step_with_a_warm_cache_beyond": beyond}


def markdown(results: Mapping[str, Any]) -> str:
    """The table of a record."""
    body = []
    for name, row in results["commands"].items():
        body.append([name, *(f"{row[kind]:.2f}" for kind in ("seconds", "processor_seconds", "seconds_to_the_end"))])
    return table(["s", "to the line", "processor", "to the end"], body)


def print_beyond(results: Mapping[str, Any]) -> None:
    for kind, values in results["first_step_with_a_warm_cache_beyond"].items():
        print(f"\n{WARM}, beyond ({kind.replace('_', ' ')}):")
        for name, value in values.items():
            print(f"  {name:<42}{value:>+12.2f}")


def missed(results: Mapping[str, Any]) -> list[str]:
    """The demands that the figures do not meet."""
    found = []
    if (alone := results["commands"]["import hf_sft"]["seconds"]) >= IMPORT_LIMIT:
        found.append(f"import hf_sft takes {alone:.2f} s, and {IMPORT_LIMIT} are demanded")
    if (beyond := results["first_step_with_a_warm_cache_beyond"]["seconds"][BARE]) >= FIRST_STEP_LIMIT:
        found.append(f"train.py takes {beyond:.2f} s beyond the bare imports, and {FIRST_STEP_LIMIT} are demanded")
    return found


def main() -> None:
    options = parser(__doc__, "start_up", repeats=5).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, before = commands(Path(folder))
        results = summary(measure(found, options.repeats, before))
    print(markdown(results))
    print_beyond(results)
    record = {"note": options.note, "missed": missed(results), "repeats": options.repeats, **results}
    conclude("start_up", record, options.output)


if __name__ == "__main__":
    main()
