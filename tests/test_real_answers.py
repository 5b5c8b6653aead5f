"""Answers while a real model trains on real data, through train.py: a killed run reports the figures of an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs

from hf_sft.reports import read_run, report_page

pytestmark = pytest.mark.slow

CHANGES = {
    "max_train_samples": 200, "max_eval_samples": 24, "max_steps": 9, "logging_steps": 1, "save_strategy": "steps",
    "save_steps": 3, "save_total_limit": 3, "eval_strategy": "steps", "eval_steps": 3, "generation_eval_steps": 3,
    "generation_eval_samples": 4, "generation_max_new_tokens": 24, "stop_check_samples": 2, "use_cpu": True,
    "disable_tqdm": True, "resume_from_checkpoint": "auto",
}  # fmt: skip


def start(arguments: dict[str, Any], folder: Path) -> subprocess.Popen[bytes]:
    """train.py as a user starts it."""
    file = folder / "run.json"
    file.write_text(json.dumps(arguments))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_SFT_CACHE": str(folder / "cache")}
    log = (folder / "log.txt").open("ab")
    command = [sys.executable, str(runs.ROOT / "train.py"), "--train_args_file", str(file)]
    return subprocess.Popen(command, cwd=runs.ROOT, env=environment, stdout=log, stderr=log)


def figures(out: Path) -> dict[str, Any]:
    """What the report shows, but for times and what the machine says."""
    run = read_run(out)
    timed = ("runtime", "per_second", "gib", "mfu", "time")
    logged = {key: run.points(key) for key in run.logged() if not key.endswith(timed)}
    answers = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    evaluations = [line["step"] for line in lines if "eval_loss" in line]
    return {
        "logged": logged,
        "evaluations": evaluations,
        "answers": answers,
        "stop": json.loads((out / "stop_check.json").read_text()),
    }


def test_killed_and_resumed_yields_the_same_report(shared_data, tmp_path) -> None:
    given = json.loads((runs.ROOT / "train_args" / "stories260k-gsm8k-full.json").read_text())
    given |= {
        "train_file": str(shared_data / "gsm8k" / "train.jsonl"),
        "eval_file": str(shared_data / "gsm8k" / "test.jsonl"),
    }
    given |= {"model_name_or_path": str(shared_data / "models" / "stories260k"), **CHANGES}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start({**given, "output_dir": str(whole)}, tmp_path).wait(300) == 0, (tmp_path / "log.txt").read_text()

    process = start({**given, "output_dir": str(killed)}, tmp_path)
    deadline = time.monotonic() + 300
    while not (killed / "checkpoint-6").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (killed / "checkpoint-6").is_dir() and not (killed / "model.safetensors").exists()
    assert start({**given, "output_dir": str(killed)}, tmp_path).wait(300) == 0, (tmp_path / "log.txt").read_text()

    expected, found = figures(whole), figures(killed)
    assert {"loss", "eval_loss", "eval_bleu", "eval_chrf", "eval_rougeL", "eval_final_answer"} <= set(
        expected["logged"]
    )
    assert expected["evaluations"] == [0, 3, 6, 9, 9]  # the last one of the result
    assert len(expected["answers"]) == 12 and expected["answers"][0]["reference"].rstrip().endswith("18")
    assert found == expected
    for out in (whole, killed):
        assert (out / "report.html").read_text() and "Janet" in report_page([read_run(out)])
