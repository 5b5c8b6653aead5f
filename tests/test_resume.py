"""A run that is killed and resumed ends where the undisturbed one ends."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import runs
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_sft.checkpoints import incomplete
from hf_sft.checkpoints.progress import Progress, go_on
from hf_sft.checkpoints.writing import clear_leftovers
from hf_sft.data.bins import EMPTY, Bins
from hf_sft.training.sharded_trainer import STATE_FILE, check_engine_of
from hf_sft.training.trainer import SFTTrainer

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

    # Killed after the last checkpoint and in the results, one of them cut off: they are made from it.
    shutil.copytree(out / "checkpoint-8", tmp_path / "killed" / "checkpoint-8")
    (tmp_path / "killed" / "all_results.json").write_text("")
    shutil.copy(out / "args.json", tmp_path / "killed")
    finished = runs.train({**values, "output_dir": str(tmp_path / "killed"), "resume_from_checkpoint": "auto"})
    assert (finished / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    losses = [json.loads((folder / "eval_results.json").read_text())["eval_loss"] for folder in (out, finished)]
    assert losses[0] == losses[1] == json.loads((finished / "all_results.json").read_text())["eval_loss"]
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
        ({"train_on": "all", "overlength": "truncate"}, "train_on was 'assistant' and is 'all'; overlength"),
        ({"new_special_tokens": ["<|x|>"]}, "new_special_tokens"),
        ({"data_seed": 9}, "data_seed was None and is 9"),
    ):
        with pytest.raises(ValueError, match=message):
            runs.train({**again, **changes})
    moved = shutil.copy(values["train_file"], tmp_path / "elsewhere.jsonl")
    runs.train({**again, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "train_file": str(moved)})
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 3
    Path(moved).write_text("".join(reversed(Path(moved).read_text().splitlines(keepends=True))))
    with pytest.raises(ValueError, match="train_file_hash was"):
        runs.train({**again, "train_file": str(moved)})
    elsewhere = {"output_dir": str(tmp_path / "new"), "resume_from_checkpoint": str(out / "checkpoint-3")}
    with pytest.raises(ValueError, match=r"checkpoint .* holds a run with other settings.*train_file_hash was"):
        runs.train({**again, "train_file": str(moved), **elsewhere})
    assert not (tmp_path / "new").exists()


# ---- another batch ----


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, int]]:
    """(epoch, bin) of all bins that are read from now on."""
    found: list[tuple[int, int]] = []
    read = Bins.__getitem__

    def reading(self: Bins, index: tuple[int, int]) -> list:
        if index[1] != EMPTY:
            found.append(index)
        return read(self, index)

    monkeypatch.setattr(Bins, "__getitem__", reading)
    return found


def test_no_bin_is_lost_or_repeated_when_the_batch_changes(tmp_path, seen, capsys) -> None:
    """An epoch has 48 documents; it is cut into steps of 10, then of 6, 4 and 14."""
    values = runs.arguments(
        tmp_path, packing=False, save_strategy="steps", save_steps=1, resume_from_checkpoint="auto", num_train_epochs=3,
        max_steps=-1,
    )  # fmt: skip
    stages: list[dict[str, Any]] = [
        {"max_steps": 3, "per_device_train_batch_size": 10},  # 30 of the first epoch
        {"max_steps": 8, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},  # the rest, and 12 more
        {"max_steps": 10, "per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 2, "learning_rate": 1e-3},
    ]
    for stage in stages:
        out = runs.train({**values, **stage})
    said = capsys.readouterr().err
    whole = [(epoch, number) for epoch in range(3) for number in range(48)]
    assert sorted(seen) == whole
    order = [np.random.default_rng([3, epoch]).permutation(48).tolist() for epoch in range(3)]
    sizes = [10, 10, 10, *[6] * 3, 6, 6, 4, 4, 14, 14, *[14] * 3, 6]  # of the steps, as far as the epochs have bins
    position = 0
    for size in sizes:
        step = seen[position : position + size]
        epoch, start = divmod(position, 48)
        assert sorted(number for _, number in step) == sorted(order[epoch][start : start + size])
        position += size
    assert position == 3 * 48
    state = json.loads((out / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"], state["num_train_epochs"]) == (16, 3.0, 3)
    progress = json.loads((out / "checkpoint-10" / "progress.json").read_text())
    assert (progress["epoch"], progress["bins"], progress["documents"], progress["global_batch"]) == (1, 20, 68, 4)
    assert "per_device_train_batch_size was 4 and is 7" in said and "learning_rate was 0.01 and is 0.001" in said
    assert "planned for 10 steps and now takes 16" in said
    rates = [line["learning_rate"] for line in state["log_history"] if "learning_rate" in line]
    assert max(rates[-6:]) <= 1e-3  # what is asked for now counts


def test_packed_bins_and_their_documents(tmp_path, seen) -> None:
    values = runs.arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=4, per_device_train_batch_size=3)
    runs.train(values)
    runs.train({**values, "max_steps": 8, "per_device_train_batch_size": 1, "resume_from_checkpoint": "auto"})
    assert len(seen) == len(set(seen)) == 12 + 4
    progress = json.loads((tmp_path / "out" / "checkpoint-8" / "progress.json").read_text())
    out = runs.train({**values, "output_dir": str(tmp_path / "all"), "max_steps": 6})
    whole = json.loads((out / "checkpoint-6" / "progress.json").read_text())
    assert (progress["bins"], progress["bins_in_epoch"]) == (16, 17)
    assert (whole["bins"], whole["epoch"], whole["documents"]) == (0, 1, 48)
    assert 40 < progress["documents"] < 48


def test_a_stream_goes_on_in_whole_steps(tmp_path) -> None:
    values = runs.arguments(
        tmp_path, streaming=True, save_strategy="steps", save_steps=3, per_device_train_batch_size=2
    )
    whole = runs.train(
        {**values, "max_steps": 6, "output_dir": str(tmp_path / "whole"), "lr_scheduler_type": "constant"}
    )
    out = runs.train({**values, "max_steps": 3, "lr_scheduler_type": "constant"})
    again = {**values, "resume_from_checkpoint": "auto", "lr_scheduler_type": "constant"}
    with pytest.raises(ValueError, match=r"behind 6 bins, and a step now takes 4.*divides 6"):
        runs.train({**again, "max_steps": 6, "gradient_accumulation_steps": 2})
    runs.train({**again, "max_steps": 4, "per_device_train_batch_size": 6})
    assert len(runs.history(out)) == 4
    shutil.rmtree(out)
    runs.train({**values, "max_steps": 3, "lr_scheduler_type": "constant"})
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}  # the same steps, in smaller pieces
    runs.train({**again, "max_steps": 6, **cut})
    for name, weight in runs.weights(whole).items():
        assert torch.allclose(weight, runs.weights(out)[name], rtol=0, atol=1e-5), name


def test_a_checkpoint_of_a_plain_trainer_counts_steps(tmp_path) -> None:
    values = runs.arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2, lr_scheduler_type="constant")
    out = runs.train(values)
    whole = runs.train({**values, "max_steps": 4, "output_dir": str(tmp_path / "whole")})
    for name in ("progress.json", "complete.json", "args.json"):
        (out / "checkpoint-2" / name).unlink()
    again = {**values, "max_steps": 4, "resume_from_checkpoint": "auto"}
    with pytest.raises(ValueError, match=r"counts steps.*global_batch_size was 2 and is 4: rows would be repeated"):
        runs.train({**again, "gradient_accumulation_steps": 2})
    runs.train(again)
    assert runs.history(out) == runs.history(whole)
    assert json.loads((out / "checkpoint-4" / "progress.json").read_text())["bins"] == 8


@given(
    bins=st.integers(1, 60), epochs=st.integers(1, 4), sizes=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    taken=st.lists(st.integers(0, 9), min_size=3, max_size=3),
)  # fmt: skip
def test_every_bin_is_counted_once_however_steps_are_cut(
    bins: int, epochs: int, sizes: list[int], taken: list[int]
) -> None:
    """Steps of several sizes, one after another; the last goes on to the end."""
    progress, steps = Progress(0, 0, 0, bins, 0, sizes[0], 1), [0] * epochs
    for place, size in enumerate(sizes):
        plan = go_on(progress, size, epochs=epochs, max_steps=-1)
        assert plan.epochs == max(epochs, plan.epoch + 1) and plan.epoch == progress.epoch
        left = plan.last - progress.step
        step, epoch, behind = progress.step, progress.epoch, progress.bins
        for _ in range(left if place == len(sizes) - 1 else min(left, taken[place])):
            steps[epoch] += min(size, bins - behind)
            behind, step = behind + size, step + 1
            if behind >= bins:
                epoch, behind = epoch + 1, 0
        progress = Progress(step, epoch, behind, bins, 0, size, 1)
        if epoch == epochs:
            break
    assert steps == [bins] * epochs


# ---- another number of processes ----


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_another_number_of_processes(tmp_path, first: int) -> None:
    """One process that accumulates two micro-batches, and two processes: one goes on where the other stopped."""
    values = runs.arguments(tmp_path, save_strategy="steps", save_steps=4, per_device_train_batch_size=1, max_steps=11)
    ways = {1: {"gradient_accumulation_steps": 2}, 2: {"gradient_accumulation_steps": 1}}
    undisturbed = runs.train({**values, **ways[1], "output_dir": str(tmp_path / "undisturbed")})
    process = runs.train_process({**values, **ways[first]}, first, "tests/die_at_step.py", HF_SFT_DIE_AT="6")
    assert process.returncode != 0 and (tmp_path / "out" / "checkpoint-4").is_dir(), process.stderr
    process = runs.train_process({**values, **ways[3 - first], "resume_from_checkpoint": "auto"}, 3 - first)
    assert process.returncode == 0, process.stderr
    assert (
        f"processes was {first} and is {3 - first}" in process.stderr
        and "another number of processes" in process.stderr
    )
    assert f"gradient_accumulation_steps was {3 - first} and is {first}" in process.stderr
    assert "global_batch_size was" not in process.stderr
    for name, weight in runs.weights(undisturbed).items():
        assert torch.allclose(weight, runs.weights(tmp_path / "out")[name], rtol=0, atol=1e-5), name
    assert runs.history(tmp_path / "out") == pytest.approx(runs.history(undisturbed), abs=1e-5)


def test_a_branch_does_not_fall_back_to_what_it_left_behind(tmp_path) -> None:
    """Resumed from an older checkpoint and stopped again: auto goes on with the branch, and its results are its own."""
    values = runs.arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=8, lr_scheduler_type="constant")
    out = runs.train(values)
    first = runs.weights(out)
    branch = {**values, "learning_rate": 1e-3}
    (tmp_path / "copy").mkdir()
    shutil.copytree(out / "checkpoint-2", tmp_path / "copy" / "checkpoint-2")
    shutil.copy(out / "args.json", tmp_path / "copy")
    undisturbed = runs.train({**branch, "output_dir": str(tmp_path / "copy"), "resume_from_checkpoint": "auto"})
    runs.train({**branch, "max_steps": 5, "resume_from_checkpoint": str(out / "checkpoint-2")})
    assert sorted(path.name for path in out.glob("left-behind-*")) == [f"left-behind-checkpoint-{n}" for n in (4, 6, 8)]
    runs.train({**branch, "resume_from_checkpoint": "auto"})
    for name, weight in runs.weights(undisturbed).items():
        assert torch.equal(runs.weights(out)[name], weight) and not torch.equal(first[name], weight), name


def test_results_of_another_branch_are_not_taken_for_the_end(tmp_path) -> None:
    """Killed between the last step and the saving of the result, where an older result stands."""
    values = runs.arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4, lr_scheduler_type="constant")
    out = runs.train(values)
    branch = {**values, "learning_rate": 1e-3, "resume_from_checkpoint": str(out / "checkpoint-2")}
    save = SFTTrainer.save_model

    def killed(trainer: SFTTrainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            raise KeyboardInterrupt
        save(trainer, output_dir, _internal_call)

    with mock.patch.object(SFTTrainer, "save_model", killed), pytest.raises(KeyboardInterrupt):
        runs.train(branch)
    runs.train({**branch, "resume_from_checkpoint": "auto"})
    held = load_file(out / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(runs.weights(out)[name], weight) for name, weight in held.items())


def test_the_two_kinds_of_engines_do_not_mix(tmp_path) -> None:
    plain, sharded = SimpleNamespace(deepspeed=None, fsdp=None), SimpleNamespace(deepspeed=None, fsdp=True)
    check_engine_of(tmp_path, plain)
    with pytest.raises(ValueError, match="written without DeepSpeed and FSDP"):
        check_engine_of(tmp_path, sharded)
    (tmp_path / STATE_FILE).touch()
    check_engine_of(tmp_path, sharded)
    with pytest.raises(ValueError, match="written under DeepSpeed or FSDP"):
        check_engine_of(tmp_path, plain)


def test_a_sealed_checkpoint_without_its_name_gets_it(tmp_path) -> None:
    """Killed between the two renames of one that is written again."""
    out = runs.train(runs.arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4))
    (out / "checkpoint-4").rename(out / ".checkpoint-4.writing")
    (out / ".checkpoint-2.removing").mkdir()
    clear_leftovers(out)
    assert incomplete(out / "checkpoint-4") is None and not list(out.glob(".checkpoint-*"))


def test_fused_experts_are_restored(tmp_path) -> None:
    """They are stored one by one."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        **{**tiny._COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model-llama")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model-llama")
    values = runs.arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    undisturbed = runs.train(values)
    (tmp_path / "again").mkdir()
    shutil.copytree(undisturbed / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    shutil.copy(undisturbed / "args.json", tmp_path / "again")
    again = runs.train({**values, "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": "auto"})
    for name, weight in runs.weights(undisturbed).items():
        assert torch.equal(runs.weights(again)[name], weight), name
