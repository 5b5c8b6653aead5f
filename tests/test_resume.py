"""A run that is killed and resumed ends where the undisturbed one ends."""

from __future__ import annotations

import json
import signal

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
        runs.train({**values, "resume_from_checkpoint": str(tmp_path / "nothing")})
    assert held == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
