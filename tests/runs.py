"""Runs of train.py: in this process, and as real processes under torchrun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import tiny

ROOT = Path(__file__).resolve().parents[1]


def write_jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def arguments(folder: Path, family: str = "llama", **changes: Any) -> dict[str, Any]:
    """Arguments of a small run on 48 conversations; files are written below ``folder`` once."""
    model, data, held_out = folder / f"model-{family}", folder / "train.jsonl", folder / "eval.jsonl"
    if not model.exists():
        tiny.save_tiny(model, family)
    if not data.exists():
        write_jsonl(data, tiny.conversations(48, seed=1))
        write_jsonl(held_out, tiny.conversations(9, seed=2))
    base = dict(
        model_name_or_path=str(model), train_file=str(data), output_dir=str(folder / "out"), max_seq_length=256, seed=3,
        per_device_train_batch_size=2, max_steps=8, learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2,
        weight_decay=0.1, logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, stop_check_samples=0,
    )  # fmt: skip
    return {**base, **changes}


def train(values: dict[str, Any]) -> Path:
    """Run ``hf-sft train`` in this process; returns the output folder."""
    from hf_sft.commands.train import main

    assert main(words(values)) == 0
    return Path(values["output_dir"])


def train_in_memory(values: dict[str, Any]) -> tuple[Path, Any]:
    """As ``train``; returns the trainer, with the trained model, as well."""
    from hf_sft import tasks

    kept: list[Any] = []
    build = tasks.build_trainer
    with mock.patch.object(tasks, "build_trainer", side_effect=lambda *parts: kept.append(build(*parts)) or kept[0]):
        return train(values), kept[0]


def train_process(
    values: dict[str, Any], processes: int = 1, script: str = "train.py", **environment: str
) -> subprocess.CompletedProcess:
    """Run train.py as a user does, under torchrun with more than one process."""
    return launch([str(ROOT / script), *words(values)], processes, **environment)


def launch(command: list[str], processes: int = 1, **environment: str) -> subprocess.CompletedProcess:
    """Run a script with its arguments in one process, or in several under torchrun (gloo)."""
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([*launcher, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def history(folder: Path, key: str = "loss") -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [line[key] for line in state["log_history"] if key in line]


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    (file,) = list(folder.glob("*.safetensors"))
    return load_file(file)


def words(values: dict[str, Any]) -> list[str]:
    words = []
    for key, value in values.items():
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            words += [f"--{key}", json.dumps(value) if isinstance(value, (dict, bool)) else str(value)]
    return words
