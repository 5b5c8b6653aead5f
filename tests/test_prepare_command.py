"""``hf-sft prepare``: from files to a folder, and from the folder through train.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file

from hf_sft.cli import main


def prepare(*words: str) -> int:
    return main(["prepare", *words])


@pytest.fixture
def values(tmp_path) -> dict:
    return runs.arguments(tmp_path, eval_file=str(tmp_path / "eval.jsonl"))


def run_file(folder: Path, values: dict) -> str:
    path = folder / "run.json"
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "output_dir"}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("objective", ["causal", "wedlm"])
def test_training_on_the_folder_is_training_on_the_files(tmp_path, values, objective: str, capsys) -> None:
    if objective == "wedlm":
        values |= {"objective": "wedlm", "mask_token": "<|mask|>", "block_size": 8}
    direct = runs.train({**values, "output_dir": str(tmp_path / "direct")})
    folder = tmp_path / "tokens"
    assert prepare("--train_args_file", run_file(tmp_path, values), "--output_dir", str(folder)) == 0
    printed = capsys.readouterr().out
    assert "train: 48 records, 48 kept, 0 dropped, 0 bad;" in printed and "eval: 9 records" in printed
    assert {path.name for path in folder.iterdir()} == {
        "train.arrow",
        "eval.arrow",
        "prepared.json",
        "data_report.json",
    }
    values = {**values, "train_file": str(folder), "output_dir": str(tmp_path / "out")}
    del values["eval_file"]  # the folder brings it
    taken = runs.train(values)
    one, two = (load_file(each / "model.safetensors") for each in (direct, taken))
    assert all(torch.equal(one[key], two[key]) for key in one)
    reports = [json.loads((each / "data_report.json").read_text()) for each in (direct, taken, folder)]
    assert reports[0] == reports[1]
    assert reports[2]["train"] == reports[0]["train"]
    results = [json.loads((each / "eval_results.json").read_text())["eval_loss"] for each in (direct, taken)]
    assert results[0] == results[1]


def test_a_tokenizer_is_enough(tmp_path, values, capsys) -> None:
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = ["--model", str(tmp_path / "tokenizer"), "--file", values["train_file"], values["eval_file"]]
    assert prepare(*words, "--max_seq_length", "256", "--output_dir", str(tmp_path / "tokens")) == 0
    assert len(Dataset.from_file(str(tmp_path / "tokens" / "train.arrow"))) == 57
    # The model's tokenizer is the same; another template is not.
    trained = {**values, "train_file": str(tmp_path / "tokens"), "max_steps": 1}
    runs.train({**trained, "output_dir": str(tmp_path / "one")})
    with pytest.raises(ValueError, match=r"was prepared for another run:\n  chat_template is"):
        runs.train({**trained, "chat_template": tiny.CHATML + " ", "output_dir": str(tmp_path / "two")})
    assert not (tmp_path / "two").exists()


def test_wrong_input(tmp_path, values, capsys) -> None:
    run = run_file(tmp_path, values)
    (tmp_path / "there").mkdir()
    assert prepare("--train_args_file", run) == 2
    assert prepare("--train_args_file", run, "--output_dir", str(tmp_path / "there")) == 2
    assert prepare("--train_args_file", run, "--output_dir", str(tmp_path / "new"), "--lazy_preprocess", "true") == 2
    assert prepare("--train_args_file", run, "--output_dir", str(tmp_path / "new"), "--train_file", "missing") == 2
    errors = capsys.readouterr().err
    for part in ("needs --output_dir", "exists already", "tokenise while the model trains", "missing"):
        assert part in errors
    assert not (tmp_path / "new").exists() and not list((tmp_path / "there").iterdir())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
