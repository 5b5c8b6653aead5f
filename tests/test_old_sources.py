"""What a whole source says: batches and lengths of old scripts, the command line over a file, lists of data sets."""

from __future__ import annotations

import json

import pytest

from hf_sft.legacy import translate
from hf_sft.parsing import ArgumentsError, parse_args

# ---- what older scripts do without a key for it ----

BATCH = {"per_device_train_batch_size": 4}
PACKING = (
    "packing is now false: a batch is of records there; packing true takes several documents per row and trains faster, in "
    "fewer steps"
)
CUT = "overlength is now truncate: records that are longer are cut, as there"


@pytest.mark.parametrize(
    ("old", "packing"),
    [
        ({"lora_r": 8, **BATCH}, False),
        ({"use_lora": True, "micro_batch_size": 4}, False),
        ({"cache_dir": None, **BATCH}, False),
        ({"stage": "dpo", **BATCH}, False),
        ({"lora_r": 8, "packing": None, **BATCH}, False),
        ({"lora_r": 8, "packing": True, **BATCH}, True),
        ({"lora_r": 8, "neat_packing": True, **BATCH}, True),
        ({"lora_r": 8, "neat_packing": False, **BATCH}, False),
        ({"lora_r": 8}, None),
        ({"lora_r": 8, "per_device_eval_batch_size": 4}, None),
        ({"lora_rank": 8, **BATCH}, None),
        ({"optim": "adamw_hf", "gradient_checkpointing": True, "eval_file": "", **BATCH}, None),
        ({"stage": "pt", **BATCH}, None),
        ({"uft": True, **BATCH}, None),
        ({"lora_r": 8, "objective": "wedlm", **BATCH}, None),
        ({"model_path": "m", "block_size": 8, **BATCH}, None),
        ({"lora_r": 8, "attention_backend": "dense", **BATCH}, None),
        ({"lora_r": 8, "attention_backend": "auto", **BATCH}, False),
    ],
)
def test_a_batch_of_an_old_source_is_of_records(old, packing):
    values, notes, problems = translate(old)
    assert problems == []
    assert values.get("packing") is packing
    assert notes.count(PACKING) == (packing is False)


def test_an_old_flag_does_not_change_what_a_file_of_today_counts():
    today = {"lora_rank": 8, **BATCH}
    assert "packing" not in translate(today, {"lora_r": 4})[0]
    assert translate(today, {"lora_r": 4, "per_device_train_batch_size": 2})[0]["packing"] is False
    for said in ({"packing": True}, {"objective": "wedlm"}, {"task_type": "pretrain"}):
        values = translate({**today, **said}, {"lora_r": 4, "per_device_train_batch_size": 2})[0]
        assert values.get("packing") is said.get("packing")
    assert translate({"lora_r": 8}, BATCH)[0]["packing"] is False
    values, notes, _ = translate({"lora_r": 8, **BATCH}, {"packing": "true"})
    assert values["packing"] == "true"
    assert PACKING not in notes


@pytest.mark.parametrize(
    ("old", "overlength"),
    [
        ({"cutoff_len": 9}, "truncate"),
        ({"max_length": 9, "stage": "dpo"}, "truncate"),
        ({"max_seq_length": 9, "template_name": "qwen"}, "truncate"),
        ({"max_seq_length": 9, "tokenize_num_workers": 2}, "truncate"),
        ({"cutoff_len": 9, "overlength": "error"}, "error"),
        ({"cutoff_len": None}, None),
        ({"max_seq_length": 9, "lora_r": 8}, None),
        ({"template_name": "qwen"}, None),
        ({"cutoff_len": 9, "stage": "pt"}, None),
        ({"max_seq_length": 9, "tokenize_num_workers": 2, "task_type": "pretrain"}, None),
        ({"max_length": 9, "model_path": "m", "block_size": 8}, None),
    ],
)
def test_old_lengths_cut_records(old, overlength):
    values, notes, problems = translate(old)
    assert problems == []
    assert values.get("overlength") == overlength
    assert notes.count(CUT) == (overlength == "truncate")


# ---- the command line ----


def test_keys_of_the_command_line_replace_those_of_the_file(tmp_path):
    adapter = tmp_path / "peft.yaml"
    adapter.write_text("r: 4\nlora_alpha: 8\n")
    file = {"bit": 4, "peft_config_path": "nowhere.yaml", "lr0": 1e-3}
    values, notes, problems = translate(file, {"peft_config_path": str(adapter), "lr0": "1e-4"})
    assert problems == []
    assert values == {
        "quantization": "nf4",
        "train_mode": "qlora",
        "lora_rank": 4,
        "lora_alpha": 8,
        "learning_rate": "1e-4",
    }
    assert (
        sum(note.startswith("peft_config_path") for note in notes) == sum(note.startswith("lr0") for note in notes) == 1
    )


@pytest.mark.parametrize(
    ("file", "line", "new"),
    [
        ({"lora_r": 8}, {"lora_rank": "16"}, {"lora_rank": "16"}),
        ({"lora_rank": 8}, {"lora_r": "16"}, {"lora_rank": "16"}),
        ({"lora_r": 8}, {"lora_dim": "16"}, {"lora_rank": "16"}),
        ({"lora_dim": 8}, {"lora_r": "16"}, {"lora_rank": "16"}),
        ({"data_path": "a", "train_file": "a"}, {"train_file": "b"}, {"train_file": "b"}),
        ({"use_lora": True}, {"train_mode": "full"}, {"train_mode": "full"}),
        ({"use_lora": False}, {"train_mode": "lora"}, {"train_mode": "lora"}),
        ({"train_mode": "full"}, {"use_lora": True}, {"train_mode": "lora"}),
        ({"finetuning_type": "full"}, {"q_lora": True}, {"train_mode": "qlora"}),
        ({"use_lora": True}, {"use_lora": False}, {}),
        ({"bit": 4, "use_lora": True}, {"quantization": "int8"}, {"train_mode": "qlora", "quantization": "int8"}),
        ({"epochs": 4, "warmup_epochs": 1, "optimizer_step_criterion": "epoch"}, {"warmup_steps": "5"},
         {"num_train_epochs": 4, "warmup_steps": "5"}),
        ({"min_lr": 1e-5, "lr_scheduler_type": "linear"}, {"lr_scheduler_type": "cosine"},
         {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}),
    ],
)  # fmt: skip
def test_command_line_wins_under_any_name(file, line, new):
    values, notes, problems = translate(file, line)
    assert problems == []
    assert values == new
    assert len(set(notes)) == len(notes)


def test_contradictions_within_the_command_line_stay_problems():
    assert len(translate({"lora_rank": 4}, {"lora_r": "8", "lora_dim": "16"})[2]) == 1
    assert len(translate({}, {"q_lora": True, "train_mode": "full"})[2]) == 1


def test_shell_script_in_place_of_a_run_file(tmp_path):
    file = tmp_path / "qwen.sh"
    file.write_text("python finetune.py --learning_rate 1e-4\n")
    with pytest.raises(ArgumentsError, match="this is a shell script: hf-sft migrate turns it into a run file"):
        parse_args([str(file)])


# ---- lists of data sets ----


@pytest.fixture
def info(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.json").write_text("[]")
    entries = {
        "a": {"file_name": "a.json"},
        "b": {
            "file_name": "b.json",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "system": "system"},
        },
        "own": {"file_name": "a.json", "columns": {"prompt": "question"}},
        "gone": {"file_name": "c.json"},
        "hub": {"hf_hub_url": "someone/something"},
        "some": {"file_name": "a.json", "num_samples": 5},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    return tmp_path


def test_named_data_sets_become_their_files(info, monkeypatch):
    old = {"dataset": "a, b", "eval_dataset": ["b"], "dataset_dir": str(info)}
    values, notes, problems = translate(old)
    assert problems == []
    assert values == {"train_file": [str(info / "a.json"), str(info / "b.json")], "eval_file": str(info / "b.json")}
    assert len(notes) == 3
    (info / "data").mkdir()
    for name in ("a.json", "dataset_info.json"):
        (info / name).rename(info / "data" / name)
    monkeypatch.chdir(info)
    assert translate({"dataset": "a", "image_max_pixels": 1, "video_max_pixels": 1})[0] == {"train_file": "data/a.json"}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("other", "has no other: name the file itself as train_file"),
        ("a,own", "own has columns of its own in dataset_info.json"),
        ("gone", "and there is no such file: name the file itself as train_file"),
        ("hub", "hub is no local file in"),
        ("some", "some has num_samples in"),
        (["a", 1], "it must be names of data sets"),
    ],
)
def test_data_sets_that_name_no_file_here(name, sentence, info):
    (problem,) = translate({"dataset": name, "dataset_dir": str(info)})[2]
    assert sentence in problem
    assert "name the file itself as train_file" in problem


def test_no_list_of_data_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (problem,) = translate({"dataset": "alpaca"})[2]
    assert "there is no data/dataset_info.json" in problem
    assert "name the file itself as train_file" in problem
    (tmp_path / "dataset_info.json").write_text("{")
    (problem,) = translate({"dataset": "alpaca", "dataset_dir": "."})[2]
    assert "is no valid JSON" in problem
