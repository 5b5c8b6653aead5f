"""What is written is complete, secrets stay out, and a folder of another run is not touched."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

from hf_sft.checkpoints import (
    CheckpointError,
    check_checkpoint,
    check_output_dir,
    differences,
    identity,
    incomplete,
    last_complete_checkpoint,
    resolve_resume,
    save_arguments,
    verify_weights,
)
from hf_sft.checkpoints.writing import beside, clear_leftovers, link, move_result, publish, rotate, seal

# Weights


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_weights_pass(tmp_path, family, tied) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
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


# Writing beside


def test_a_sealed_folder_gets_its_name_over_an_older_one(tmp_path) -> None:
    target = tmp_path / "checkpoint-3"
    for content in ("first", "second"):
        written = beside(target)
        (written / "below").mkdir(parents=True)
        (written / "below" / "note.txt").write_text(content)
        seal(written, {"step": 3, "resumable": False})
        assert not (tmp_path / "checkpoint-3" / "below").exists() or content == "second"
        publish(written, target)
        assert (target / "below" / "note.txt").read_text() == content
    assert incomplete(target) == "it holds the model alone (save_only_model)"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    (beside(target)).mkdir()
    (beside(target) / "optimizer.pt").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt.*not written to its end"):
        seal(beside(target), {})


def test_only_our_own_leftovers_are_cleared(tmp_path) -> None:
    for name in (
        ".checkpoint-3.writing",
        ".checkpoint-12.removing",
        ".result.writing",
        ".git",
        ".checkpoint-3",
        "checkpoint-3.writing",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".checkpoint-4.writing").write_text("a file")
    clear_leftovers(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".git", ".checkpoint-3", "checkpoint-3.writing", ".checkpoint-4.writing"}


def test_rotation_keeps_the_newest_the_best_and_what_lies_ahead(tmp_path) -> None:
    for step in (2, 4, 6, 8, 20):
        checkpoint(tmp_path, step)
    rotate(tmp_path / "checkpoint-8", None)
    rotate(tmp_path / "checkpoint-8", 4)
    assert len(list(tmp_path.iterdir())) == 5
    rotate(tmp_path / "checkpoint-8", 2, [tmp_path / "checkpoint-2"])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-8", "checkpoint-20"}
    rotate(tmp_path / "checkpoint-8", 1, [tmp_path / "checkpoint-2"])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-8", "checkpoint-20"}
    rotate(tmp_path / "checkpoint-8", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-20"}


def test_links(tmp_path, monkeypatch) -> None:
    for step in (1, 2):
        checkpoint(tmp_path, step)
        assert link(tmp_path, "last", tmp_path / f"checkpoint-{step}") is None
        assert os.readlink(tmp_path / "last") == f"checkpoint-{step}"
    (tmp_path / "best").mkdir()
    assert "somebody's" in str(link(tmp_path, "best", tmp_path / "checkpoint-1"))

    def refused(*parts: object, **keywords: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refused)
    assert link(tmp_path, "last", tmp_path / "checkpoint-1") == "no links here"
    assert os.readlink(tmp_path / "last") == "checkpoint-2"


def test_a_result_takes_the_place_of_one_in_another_number_of_files(tmp_path) -> None:
    sizes = ["60KB", "1GB", "60KB", "30KB"]
    for seed, size in enumerate(sizes):
        model = tiny_model(seed=seed)
        (tmp_path / "note.safetensors").touch()
        model.save_pretrained(tmp_path / ".result.writing", max_shard_size=size)
        verify_weights(tmp_path / ".result.writing", model)
        names = {path.name for path in (tmp_path / ".result.writing").iterdir()}
        move_result(tmp_path / ".result.writing", tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == names | {"note.safetensors"}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())


def test_no_moment_of_a_move_shows_a_mixture(tmp_path, monkeypatch) -> None:
    """A folder that is half moved loads as the old model, as the new one, or not at all."""
    replaced: list[str] = []
    replace = os.replace

    def stopping(source: Any, target: Any) -> None:
        if len(replaced) == stop:
            raise KeyboardInterrupt
        replace(source, target)
        replaced.append(Path(target).name)

    monkeypatch.setattr("os.replace", stopping)
    models = [tiny_model(seed=seed) for seed in (1, 2)]
    loads = set()
    for stop in range(12):
        for sizes in (("60KB", "60KB"), ("60KB", "1GB"), ("1GB", "60KB")):
            folder = tmp_path / f"{stop}-{'-'.join(sizes)}"
            models[0].save_pretrained(folder, max_shard_size=sizes[0])
            models[1].save_pretrained(folder / ".result.writing", max_shard_size=sizes[1])
            replaced.clear()
            with suppress(KeyboardInterrupt):
                move_result(folder / ".result.writing", folder)
            try:
                loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
            except OSError:
                loads.add("not")
                continue
            same = [all(torch.equal(w, loaded[name]) for name, w in model.state_dict().items()) for model in models]
            assert any(same), (stop, sizes)
            loads.add("old" if same[0] else "new")
    assert loads == {"not", "old", "new"}


# The output folder


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "args.json").read_text())


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
    later = {**GROUPS, "run": {"global_batch_size": 16, "train_file_hash": "b"}, "resolved": {"seed": 7}}
    check_output_dir(tmp_path, identity(later), "auto")  # the record is of a version that did not write these
    save_arguments(tmp_path, {**GROUPS, "run": {"global_batch_size": 8, "train_file_hash": "a"}})
    with pytest.raises(ValueError, match=r"other settings.*: train_file_hash was 'a' and is 'b'\. Set"):
        check_output_dir(tmp_path, identity(later), "auto")
    lines = differences(
        read(tmp_path), {**later, "training": {**later["training"], "learning_rate": 0.5, "output_dir": "x"}}
    )
    assert lines == ["learning_rate was 0.0001 and is 0.5", "global_batch_size was 8 and is 16"]
    newest = checkpoint(tmp_path, 3)
    same = {**later, "run": {"global_batch_size": 8, "train_file_hash": "a"}}
    assert check_checkpoint(newest, same) == []
    with pytest.raises(ValueError, match=r"checkpoint .*checkpoint-3' holds a run with other settings.*'a' and is 'b'"):
        check_checkpoint(newest, later)
    with pytest.raises(ValueError, match=r"global_batch_size was 8 and is 16: rows would be repeated or skipped"):
        check_checkpoint(newest, {**same, "run": {**same["run"], "global_batch_size": 16}})
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        check_output_dir(tmp_path, identity(GROUPS), "auto")
