"""A run that is killed and resumed ends where the undisturbed one ends."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import runs
import torch

MODES = {
    "full": {},
    "lora": {"train_mode": "lora", "lora_rank": 4, "lora_dropout": 0.1, "dtype": "float32"},
    "qlora": {"train_mode": "qlora", "lora_rank": 4, "lora_dropout": 0.1, "dtype": "float32"},
}


def quantisable(folder) -> str:
    """A model whose widths bitsandbytes can pack on every CPU."""
    import tiny

    return tiny.save_tiny(folder / "model-wide", hidden_size=64, intermediate_size=64)


@pytest.mark.parametrize("mode", MODES)
def test_killed_and_resumed_equals_undisturbed(tmp_path, mode: str) -> None:
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
    values = runs.arguments(tmp_path, save_strategy="steps", save_steps=3, max_steps=11, **MODES[mode])
    values["model_name_or_path"] = quantisable(tmp_path)
    values |= {
        "gradient_accumulation_steps": 2,
        "eval_file": str(tmp_path / "eval.jsonl"),
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    undisturbed = runs.train({**values, "output_dir": str(tmp_path / "undisturbed")})

    process = runs.train_process(values, script="tests/die_at_step.py", HF_SFT_DIE_AT="8")
    out = tmp_path / "out"
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (out / "checkpoint-6").is_dir() and not (out / "trainer_state.json").exists()
    # The kill came while a checkpoint was being written: it is passed over.
    (out / "checkpoint-9").mkdir()
    (out / "checkpoint-9" / "trainer_state.json").write_text("{")
    process = runs.train_process({**values, "resume_from_checkpoint": "auto"})
    assert process.returncode == 0, process.stderr
    assert "checkpoint-9" in process.stderr and "Resuming from" in process.stderr

    before, after = runs.weights(undisturbed), runs.weights(out)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name
    assert runs.history(out)[-5:] == runs.history(undisturbed)[-5:]
    results = [json.loads((folder / "eval_results.json").read_text())["eval_loss"] for folder in (undisturbed, out)]
    assert results[0] == results[1]


def test_a_folder_that_holds_another_run_is_left_alone(tmp_path) -> None:
    values = runs.arguments(tmp_path, max_steps=2)
    out = runs.train(values)
    held = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds another run"):
        runs.train(values)
    with pytest.raises(ValueError, match="seed was 3 and is 4"):
        runs.train({**values, "seed": 4, "resume_from_checkpoint": "auto"})
    with pytest.raises(ValueError, match="cannot be resumed"):
        runs.train({**values, "output_dir": str(tmp_path / "new"), "resume_from_checkpoint": str(tmp_path / "nothing")})
    assert not (tmp_path / "new").exists()
    assert held == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


LIMITS = {
    "steps": {"max_steps": 8},  # an epoch has 9
    "epochs": {"num_train_epochs": 2, "max_steps": -1, "packing": False, "per_device_train_batch_size": 12},
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_finished_run_is_not_trained_further(tmp_path, limit: str) -> None:
    """Trainer looks at the limit only after a step."""
    values = runs.arguments(
        tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1, lr_scheduler_type="constant",
        eval_file=str(tmp_path / "eval.jsonl"), **LIMITS[limit],
    )  # fmt: skip
    out = runs.train(values)
    assert (out / "checkpoint-8").is_dir()
    before = contents(out)
    runs.train({**values, "resume_from_checkpoint": "auto"})
    assert contents(out) == before

    # Killed after the last checkpoint and before the results: they are made from it.
    shutil.copytree(out / "checkpoint-8", tmp_path / "killed" / "checkpoint-8")
    shutil.copy(out / "args.json", tmp_path / "killed")
    finished = runs.train({**values, "output_dir": str(tmp_path / "killed"), "resume_from_checkpoint": "auto"})
    assert (finished / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    losses = [json.loads((folder / "eval_results.json").read_text())["eval_loss"] for folder in (out, finished)]
    assert losses[0] == losses[1]
    assert json.loads((finished / "trainer_state.json").read_text())["global_step"] == 8


def test_another_number_of_steps_is_said(tmp_path, capsys) -> None:
    values = runs.arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    runs.train(values)
    out = runs.train({**values, "max_steps": 4, "resume_from_checkpoint": "auto"})
    assert "planned for 2 steps and now takes 4" in capsys.readouterr().err and len(runs.history(out)) == 4


def test_a_finished_run_without_checkpoints_is_not_written_over(tmp_path) -> None:
    values = runs.arguments(tmp_path, max_steps=2)
    before = contents(runs.train(values))
    with pytest.raises(ValueError, match="finished run"):
        runs.train({**values, "resume_from_checkpoint": "auto"})
    assert contents(tmp_path / "out") == before


def test_another_order_or_other_data_is_no_resumption(tmp_path) -> None:
    values = runs.arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    out = runs.train(values)
    again = {**values, "resume_from_checkpoint": "auto", "max_steps": 3}
    for changes, message in (
        ({"gradient_accumulation_steps": 2}, "global_batch_size was 2 and is 4.*repeated or skipped"),
        ({"train_on": "all", "overlength": "truncate"}, "train_on was 'assistant' and is 'all'; overlength"),
        ({"new_special_tokens": ["<|x|>"]}, "new_special_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            runs.train({**again, **changes})
    moved = shutil.copy(values["train_file"], tmp_path / "elsewhere.jsonl")
    runs.train({**again, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "train_file": str(moved)})
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 3
    Path(moved).write_text("".join(reversed(Path(moved).read_text().splitlines(keepends=True))))
    with pytest.raises(ValueError, match="train_file_hash was"):
        runs.train({**again, "train_file": str(moved)})
