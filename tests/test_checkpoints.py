"""What is written is complete, secrets stay out, and a folder of another run is not touched."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_sft.checkpoints import (
    CheckpointError,
    check_output_dir,
    identity,
    last_complete_checkpoint,
    resolve_resume,
    save_arguments,
    verify_weights,
)

# Weights


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
def test_whole_weights_pass(tmp_path, family, tied) -> None:
    if family in FAMILIES:
        model = tiny_model(family, tie_word_embeddings=tied)
    else:  # its experts are stored one by one and held as one tensor
        config = AutoConfig.for_model(
            family, vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=tied,
            bos_token_id=None, eos_token_id=256, pad_token_id=257,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    verify_weights(tmp_path, model)
    verify_weights(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path))
    with torch.device("meta"):
        verify_weights(tmp_path, AutoModelForCausalLM.from_config(model.config))


def test_damaged_weights_are_found(tmp_path) -> None:
    model = tiny_model()
    file = tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    whole, tensors = file.read_bytes(), load_file(file)

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            verify_weights(tmp_path, model)
        file.write_bytes(whole)
        verify_weights(tmp_path, model)

    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, file)
    refused(r"1 of 21 tensors are missing, for example lm_head\.weight")
    save_file({**tensors, "lm_head.weight": torch.zeros(0, 32)}, file)
    refused("empty")
    save_file({**tensors, "lm_head.weight": torch.zeros(258, 32)}, file)
    refused(r"\(258, 32\), the model has \(259, 32\)")
    file.write_bytes(whole[:-8])
    refused("cannot be read")
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        verify_weights(tmp_path, model)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        verify_weights(tmp_path, model)


# Arguments


def test_arguments_are_saved_without_secrets(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    groups = {
        "model": {
            "model_name_or_path": "m",
            "tokenizer_name_or_path": "t",
            "new_special_tokens": ["<|a|>"],
            "mask_token": "<m>",
        },
        "training": {
            "hub_token": "hf_secret",
            "push_to_hub_token": "hf_secret",
            "hub_model_id": "org/name",
            "max_tokens": 3,
            "engine": {
                "wandb_api_key": "hf_secret",
                "password": "hf_secret",
                "stages": [{"client_secret": "hf_secret"}],
            },
        },
    }
    path = Path(save_arguments(tmp_path / "out", groups))
    assert path == tmp_path / "out" / "args.json"
    text = path.read_text()
    saved = json.loads(text)
    assert "hf_" not in text.replace("hf_sft", "")
    assert saved["model"] == groups["model"]
    assert saved["training"] == {"hub_model_id": "org/name", "max_tokens": 3, "engine": {"stages": [{}]}}
    assert {"python", "hf_sft", "torch", "transformers", "peft"} <= set(saved["versions"])
    assert [p.name for p in path.parent.iterdir()] == ["args.json"]


def test_a_failed_write_leaves_the_old_arguments(tmp_path, monkeypatch) -> None:
    save_arguments(tmp_path, {"model": {"seed": 1}})
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_arguments(tmp_path, {"model": {"seed": 2}})
    assert json.loads((tmp_path / "args.json").read_text())["model"] == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["args.json"]


# Checkpoints


def checkpoint(folder: Path, step: int, model: str = "model") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, path / f"{model}.safetensors")
    if model != "model":
        (path / "adapter_config.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(3)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


@pytest.mark.parametrize("model", ["model", "adapter_model"])
def test_the_newest_complete_checkpoint_by_number(tmp_path, model) -> None:
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    for step in (10, 9, 100):
        checkpoint(tmp_path, step, model)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    assert resolve_resume(tmp_path, "auto") == str(tmp_path / "checkpoint-100")


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_incomplete_checkpoints_are_skipped_with_the_reason(tmp_path, caplog, name, damage) -> None:
    checkpoint(tmp_path, 1)
    file = checkpoint(tmp_path, 2) / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert "checkpoint-2" in caplog.text
    assert name in caplog.text
    with pytest.raises(ValueError, match=f"(?s){name}.*complete checkpoint-N"):
        resolve_resume(tmp_path, str(tmp_path / "checkpoint-2"))


def test_resolve_resume(tmp_path) -> None:
    path = str(checkpoint(tmp_path, 3))
    for value in (None, False, "false", "False", "none", ""):
        assert resolve_resume(tmp_path, value) is None
    for value in (True, "true", "auto", "AUTO"):
        assert resolve_resume(tmp_path, value) == path
        assert resolve_resume(tmp_path / "new", value) is None
    assert resolve_resume(tmp_path / "new", path) == path
    with pytest.raises(ValueError, match="no folder"):
        resolve_resume(tmp_path, str(tmp_path / "checkpoint-4"))


# The output folder


GROUPS = {
    "model": {"model_name_or_path": "m", "train_mode": "lora"},
    "lora": {"lora_rank": 16, "lora_target_modules": ["all-linear"]},
    "training": {"seed": 42, "learning_rate": 1e-4},
}


def test_identity_leaves_out_what_may_change() -> None:
    assert identity(GROUPS) == {
        "model_name_or_path": "m",
        "train_mode": "lora",
        "lora_rank": 16,
        "lora_target_modules": ["all-linear"],
        "seed": 42,
    }


@pytest.mark.parametrize(
    "name", ["args.json", "checkpoint-5", "model.safetensors", "adapter_config.json", "eval_results.json"]
)
def test_a_folder_of_another_run_is_refused(tmp_path, name) -> None:
    check_output_dir(tmp_path / "new", identity(GROUPS), None)
    check_output_dir(tmp_path, identity(GROUPS), None)
    (tmp_path / "notes.txt").write_text("mine")
    check_output_dir(tmp_path, identity(GROUPS), None)
    (tmp_path / name).write_text("{}")
    for resume in (None, False, "false"):
        with pytest.raises(ValueError, match=f"(?s)another run.*{name}.*resume_from_checkpoint.*another output_dir"):
            check_output_dir(tmp_path, identity(GROUPS), resume)
    if name in ("args.json", "checkpoint-5"):  # killed before its first checkpoint was whole
        check_output_dir(tmp_path, identity(GROUPS), "auto")
    else:
        with pytest.raises(ValueError, match=f"(?s)finished run.*{name}.*another output_dir"):
            check_output_dir(tmp_path, identity(GROUPS), "auto")
        checkpoint(tmp_path, 6)
        check_output_dir(tmp_path, identity(GROUPS), "auto")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for below in ("notes.txt", "notes.txt/out", "notes.txt/a/b"):
        with pytest.raises(ValueError, match=r"notes\.txt' is a file; name another folder"):
            check_output_dir(tmp_path / below, identity(GROUPS), None)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match="cannot be written to; name another folder"):
        check_output_dir(tmp_path / "a" / "b", identity(GROUPS), None)


def test_resuming_another_run_is_refused_with_both_values(tmp_path) -> None:
    save_arguments(tmp_path, GROUPS)
    check_output_dir(tmp_path, identity(GROUPS), "auto")
    faster = {**GROUPS, "training": {"seed": 42, "learning_rate": 1.0}}
    check_output_dir(tmp_path, identity(faster), True)
    other = {**GROUPS, "lora": {"lora_rank": 8, "lora_target_modules": ["q_proj"]}}
    with pytest.raises(
        ValueError, match=r"lora_rank was 16 and is 8; lora_target_modules was \['all-linear'\] and is \['q_proj'\]"
    ):
        check_output_dir(tmp_path, identity(other), "auto")
    larger = {**GROUPS, "run": {"global_batch_size": 16, "train_file_hash": "b"}, "resolved": {"seed": 7}}
    check_output_dir(tmp_path, identity(larger), "auto")  # the record is of a version that did not write these
    save_arguments(tmp_path, {**GROUPS, "run": {"global_batch_size": 8, "train_file_hash": "a"}})
    with pytest.raises(ValueError) as refused:
        check_output_dir(tmp_path, identity(larger), "auto")
    for part in ("global_batch_size was 8 and is 16", "train_file_hash was 'a' and is 'b'", "repeated or skipped"):
        assert part in str(refused.value)
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        check_output_dir(tmp_path, identity(GROUPS), "auto")
