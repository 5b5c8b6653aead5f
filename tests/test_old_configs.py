"""Configurations of older scripts train as they are, and what they save loads."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import old_runs
import pytest
import runs

from hf_sft.commands.train import main
from hf_sft.parsing import parse_args

SECRET = "s3cr3t-0123456789"
IN_PROCESS = [path for path in old_runs.SAMPLES if "deepspeed" not in path.name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return old_runs.make_folder(tmp_path_factory.mktemp("old"))


@pytest.fixture
def here(folder, monkeypatch) -> Path:
    """Samples name their files relative to the folder in which they run."""
    monkeypatch.chdir(folder)
    return folder


def check_saved(mode: str, output: Path, base_name: str = "") -> None:
    """Three steps were taken, and the result loads."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    if mode == "full":
        AutoModelForCausalLM.from_pretrained(output)
        return
    from transformers import AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(base_name)
    base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(output)))
    PeftModel.from_pretrained(base, output)


@pytest.mark.parametrize("path", IN_PROCESS, ids=lambda path: path.name)
def test_sample_trains_and_loads(path, here, caplog, capfd):
    arguments = parse_args(old_runs.words(path))
    assert main(old_runs.words(path)) == 0
    check_saved(arguments.model.train_mode, Path(arguments.training.output_dir), arguments.model.model_name_or_path)
    out, err = capfd.readouterr()
    for note in arguments.notes:
        assert note in err
    assert SECRET not in out + err
    written = [file for file in here.rglob("*") if file.is_file()]
    assert [file for file in written if SECRET.encode() in file.read_bytes()] == []


@pytest.mark.slow
def test_sample_with_deepspeed_trains_and_loads(here):
    pytest.importorskip("deepspeed")
    path = old_runs.sample("wedlm-deepspeed.yaml")
    places = {"model_name_or_path": "models/qwen3", "train_file": "data/train.jsonl", "output_dir": "output/deepspeed"}
    words = [str(path), *runs.words({key: here / place for key, place in places.items()})]
    done = runs.launch([str(runs.ROOT / "train.py"), *words])
    assert done.returncode == 0, done.stderr
    assert "DeepSpeed ZeRO-2" in done.stderr
    check_saved("full", here / "output/deepspeed")


def test_an_epoch_has_the_steps_that_it_had(here, tmp_path, capfd):
    """24 records, 2 in a batch; the bins of packed documents would be far fewer."""
    words = [str(old_runs.sample("llama-factory-dpo.yaml")), "--per_device_train_batch_size", "2", "--max_steps", "-1",
             "--num_train_epochs", "1", "--output_dir", str(tmp_path), "--save_strategy", "no"]  # fmt: skip
    assert main(words) == 0
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 12
    assert "packing is now false: a batch is of records there" in capfd.readouterr().err


def test_what_the_samples_say(here):
    """The meaning of each style, in today's words."""
    firefly = parse_args(old_runs.words(old_runs.sample("firefly.json")))
    assert (firefly.data.chat_template, firefly.data.eval_file) == ("chatml", None)
    assert firefly.training.lr_scheduler_type == "cosine_with_min_lr"
    assert firefly.training.lr_scheduler_kwargs == {"min_lr": 1e-5}

    wedlm = parse_args(old_runs.words(old_runs.sample("wedlm.yaml")))
    assert wedlm.data.objective == "wedlm"
    assert (wedlm.engine.zero_stage, wedlm.engine.offload_optimizer) == (None, None)
    assert wedlm.environment == {"WANDB_PROJECT": "wedlm-sft", "WANDB_ENTITY": "a-team", "WANDB_API_KEY": SECRET,
                                 "WANDB_BASE_URL": "https://wandb.example.com"}  # fmt: skip

    qwen = parse_args(old_runs.words(old_runs.sample("qwen.sh")))
    assert (qwen.model.train_mode, qwen.lora.lora_target_modules) == ("lora", ["q_proj", "k_proj", "v_proj"])
    assert (qwen.data.max_seq_length, qwen.data.lazy_preprocess) == (256, True)
    assert qwen.lora.adapter_name_or_path is None

    assert (qwen.data.packing, qwen.data.overlength) == (False, "truncate")
    options = parse_args(old_runs.words(old_runs.sample("qwen-options.sh")))
    assert (options.model.model_name_or_path, options.data.train_file) == ("models/qwen2", "data/train.json")

    pygmalion = parse_args(old_runs.words(old_runs.sample("pygmalion.sh")))
    assert pygmalion.lora.lora_target_modules == ["query_key_value", "dense"]
    assert parse_args(old_runs.words(old_runs.sample("pygmalion-uft.sh"))).data.task_type == "pretrain"

    full = parse_args(old_runs.words(old_runs.sample("lr0.yaml")))
    assert (full.model.model_name_or_path, full.training.output_dir) == ("models/tiny", "output/lr0/full")
    assert (full.training.max_steps, full.training.warmup_steps, full.training.learning_rate) == (3, 1, 1e-3)
    assert full.training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert (full.training.use_cpu, full.training.fsdp, full.training.activation_checkpointing) == (True, None, True)

    lora = parse_args(old_runs.words(old_runs.sample("lr0-lora.yaml")))
    assert (lora.model.train_mode, lora.model.dtype, lora.lora.lora_rank) == ("lora", "bfloat16", 4)
    assert (lora.training.eval_strategy, lora.data.max_eval_samples) == ("epoch", 4)
    assert lora.training.lr_scheduler_kwargs == {"lr_end": 1e-5, "power": 1.0}
    assert lora.training.warmup_steps == 0.1

    dpo = parse_args(old_runs.words(old_runs.sample("llama-factory-dpo.yaml")))
    assert (dpo.data.task_type, dpo.dpo.dpo_sft_weight, dpo.dpo.label_smoothing) == ("dpo", 0.1, 0.1)


def test_wandb_finds_its_variables_in_the_environment(here, monkeypatch, tmp_path):
    """Set when the run begins, where it reports to wandb; what the file says wins over the shell."""
    from hf_sft.commands import train as command

    seen = {}
    monkeypatch.setattr(command, "run", lambda arguments: seen.update(os.environ) or 0)
    monkeypatch.setattr("hf_sft.checks.find_spec", lambda name: object())
    monkeypatch.setattr(os, "environ", {**os.environ, "WANDB_ENTITY": "of the shell"})
    file = tmp_path / "wandb.yaml"
    text = old_runs.sample("wedlm.yaml").read_text()
    file.write_text(text.replace("use_wandb: false", "use_wandb: true"))
    assert main([str(file)]) == 0
    found = {key: value for key, value in seen.items() if key.startswith("WANDB")}
    assert found == {"WANDB_PROJECT": "wedlm-sft", "WANDB_ENTITY": "a-team", "WANDB_API_KEY": SECRET,
                     "WANDB_BASE_URL": "https://wandb.example.com"}  # fmt: skip
    assert SECRET not in repr(parse_args([str(file)]))
    seen.clear()
    os.environ.pop("WANDB_API_KEY")
    assert main([str(old_runs.sample("wedlm.yaml"))]) == 0
    assert "WANDB_API_KEY" not in seen


def test_secrets_stay_out_of_errors(tmp_path, caplog):
    from hf_sft.parsing import ArgumentsError

    caplog.set_level(logging.DEBUG)
    bad = tmp_path / "bad.yaml"
    bad.write_text(f'train_data: a\nwandb_key: "{SECRET}\nhub_token: {SECRET}\n')
    for words in (
        [str(bad)],
        ["--wandb_key", SECRET, "more"],
        ["--wandb_key", SECRET, "--wandb_api_key", "another"],
        ["--hub_token", SECRET, "--push_to_hub_token", "another"],
        ["--wandb_ky", SECRET],
    ):
        with pytest.raises(ArgumentsError) as caught:
            parse_args(words)
        assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text


def test_token_rows_of_arrow_files(here):
    """Lists, or one token per row and one text per record batch; neither needs a chat template."""
    from hf_sft.data.files import read_records

    rows = old_runs.token_rows()
    flat = [record.value for record in read_records("data/uft.arrow", part="train", texts=True)]
    assert flat == [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    lists = [record.value for record in read_records("data/train.arrow", part="train", texts=False)]
    assert [{name: row[name] for name in ("input_ids", "labels")} for row in lists] == rows


def test_conversations_need_a_template_still(here, tmp_path):
    words = [
        "--model_name_or_path",
        "models/neox",
        "--train_file",
        "data/train.jsonl",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    with pytest.raises(ValueError, match="The tokenizer has no chat template, and conversations cannot be written"):
        main([*words, "--use_cpu", "--max_steps", "1"])
    assert not (tmp_path / "o").exists()
