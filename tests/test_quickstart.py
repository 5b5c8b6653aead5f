"""The quickstart's parts: data that cannot be remembered, and a model that learns the task."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import runs

QUICKSTART = runs.ROOT / "examples" / "quickstart"


def make_data(folder, *words: str) -> None:
    subprocess.run([sys.executable, QUICKSTART / "make_data.py", folder, *words], check=True, timeout=120)


def digits(conversation: list[dict]) -> str:
    return "".join(sorted(character for character in conversation[0]["content"] if character.isdigit()))


def test_held_out_prompts_are_new_and_answers_right(tmp_path) -> None:
    make_data(tmp_path, "--records", "500")
    files = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("train", "eval")}
    rows = {name: [json.loads(line) for line in lines] for name, lines in files.items()}
    assert len(rows["train"]) == 500 and len(rows["eval"]) == 200
    assert not {digits(row) for row in rows["train"]} & {digits(row) for row in rows["eval"]}
    for question, answer in rows["train"] + rows["eval"]:
        given = sorted(character for character in question["content"] if character.isdigit())
        downwards = any(word in question["content"] for word in ("backwards", "largest"))
        assert answer["content"].split() == (given[::-1] if downwards else given)
    make_data(tmp_path / "again", "--records", "500")
    assert (tmp_path / "again" / "train.jsonl").read_text().splitlines() == files["train"]


@pytest.mark.slow
@pytest.mark.alone
def test_the_quickstart_model_answers_prompts_it_has_never_seen(tmp_path) -> None:
    data = tmp_path / "data"
    make_data(data)
    model, run = str(data / "model"), tmp_path / "run"
    values = {
        "train_args_file": "train_args/quickstart.json",
        "config_name_or_path": model,
        "tokenizer_name_or_path": model,
    }
    values |= {"train_file": str(data / "train.jsonl"), "eval_file": str(data / "eval.jsonl"), "output_dir": str(run)}
    process = runs.train_process(values, OMP_NUM_THREADS="2")
    assert process.returncode == 0, process.stderr
    ask = subprocess.run(
        [sys.executable, QUICKSTART / "ask.py", run, data / "eval.jsonl", "--at_least", "90"],
        capture_output=True,
        text=True,
    )
    assert ask.returncode == 0, ask.stdout + ask.stderr
