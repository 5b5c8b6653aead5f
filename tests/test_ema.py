"""The moving average of the weights: a plain recomputation, what is evaluated, saved and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_sft import EMAArguments, SFTTrainer
from hf_sft.models.averages import AVERAGE_FILE, WeightAverage
from hf_sft.parsing import ArgumentsError, parse_values

DECAY = 0.8
LORA = {"train_mode": "lora", "lora_rank": 4, "lora_dropout": 0.1, "dtype": "float32"}


class Weights(TrainerCallback):
    """The trained weights before the first step and after each."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **_) -> None:
        self.seen.append({k: v.detach().clone() for k, v in model.named_parameters() if v.requires_grad})

    on_step_end = on_train_begin


def recomputed(weights: list[dict[str, torch.Tensor]], first: int) -> dict[str, torch.Tensor]:
    average = {name: value.double() for name, value in weights[first].items()}
    for later in weights[first + 1 :]:
        average = {name: DECAY * value + (1 - DECAY) * later[name].double() for name, value in average.items()}
    return average


def trained(values, monkeypatch):
    """A run of train.py with the weights of each of its steps."""
    seen = Weights()
    build = SFTTrainer.__init__

    def with_callback(self, *parts, **named) -> None:
        build(self, *parts, **named)
        self.add_callback(seen)

    monkeypatch.setattr(SFTTrainer, "__init__", with_callback)
    out, trainer = runs.train_in_memory(values)
    monkeypatch.undo()
    return out, trainer, seen.seen


@pytest.mark.parametrize("mode", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("first", [0, 3])
def test_average_is_a_plain_recomputation(tmp_path, monkeypatch, mode, first) -> None:
    values = runs.arguments(tmp_path, max_steps=6, ema_decay=DECAY, ema_start_step=first, ema_cpu=first > 0, **mode)
    out, trainer, weights = trained(values, monkeypatch)
    assert len(weights) == 7
    wanted = recomputed(weights, first)
    assert wanted.keys() == trainer.average.average.keys()
    for name, value in trainer.average.average.items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-6, atol=1e-8)
        assert not torch.equal(value, weights[-1][name])
    # The result is the average, and the model in memory goes on with its weights.
    for name, parameter in trainer.model.named_parameters():
        assert not parameter.requires_grad or torch.equal(parameter, weights[-1][name])
    saved = AutoModelForCausalLM.from_pretrained(values["model_name_or_path"] if mode else out)
    saved = PeftModel.from_pretrained(saved, out, is_trainable=True) if mode else saved
    held = {name: value for name, value in saved.named_parameters() if value.requires_grad}
    assert held.keys() >= wanted.keys()
    assert all(torch.equal(held[name], value) for name, value in trainer.average.average.items())
    assert not (out / AVERAGE_FILE).exists()


def test_best_before_the_average_begins(tmp_path) -> None:
    values = runs.arguments(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=2, ema_decay=DECAY, ema_start_step=3, eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="token_accuracy", greater_is_better=True,
        eval_file=str(tmp_path / "eval.jsonl"), eval_strategy="steps",
    )  # fmt: skip
    out, trainer = runs.train_in_memory(values)
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    raw = load_file(out / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(value, raw[name]) for name, value in runs.weights(out).items())


def test_answers_are_of_the_average(tmp_path, monkeypatch) -> None:
    from hf_sft.training import answering_trainer

    used, answer = [], answering_trainer.answer_prompts

    def answered(prompts, answerer, *parts, **named):
        used.append({k: v.detach().clone() for k, v in answerer.model.named_parameters()})
        return answer(prompts, answerer, *parts, **named)

    monkeypatch.setattr(answering_trainer, "answer_prompts", answered)
    changes = dict(generation_eval_steps=2, generation_max_new_tokens=2, eval_file=str(tmp_path / "eval.jsonl"))
    _, trainer = runs.train_in_memory(runs.arguments(tmp_path, max_steps=2, ema_decay=DECAY, **changes))
    assert len(used) == 2
    assert all(torch.equal(weights[k], v) for weights in used for k, v in trainer.average.average.items())


def test_evaluation_is_of_the_average(tmp_path) -> None:
    changes = dict(
        max_steps=4, ema_decay=DECAY, eval_file=str(tmp_path / "eval.jsonl"), eval_strategy="steps", eval_steps=4
    )
    out, trainer = runs.train_in_memory(runs.arguments(tmp_path, **changes))
    averaged = trainer.evaluate()["eval_loss"]
    assert runs.history(out, "eval_loss") == [averaged]
    average, trainer.average = trainer.average, None
    assert abs(trainer.evaluate()["eval_loss"] - averaged) > 1e-3
    with average.applied(), average.applied():  # in itself
        assert trainer.evaluate()["eval_loss"] == averaged


@pytest.mark.parametrize("mode", [{}, LORA], ids=["full", "lora"])
def test_resumed_average_is_the_undisturbed_one(tmp_path, mode) -> None:
    values = runs.arguments(
        tmp_path, max_steps=6, save_strategy="steps", save_steps=2, ema_decay=DECAY, ema_start_step=1,
        eval_file=str(tmp_path / "eval.jsonl"), eval_strategy="steps", eval_steps=2, **mode,
    )  # fmt: skip
    plain, whole = runs.train_in_memory({**values, "output_dir": str(tmp_path / "whole")})
    out = runs.train({**values, "max_steps": 4, "lr_scheduler_type": "constant", "output_dir": str(tmp_path / "other")})
    assert (out / "checkpoint-4" / AVERAGE_FILE).is_file()
    for number in (4, 6):
        (plain / f"checkpoint-{number}").rename(tmp_path / f"gone-{number}")
    again, resumed = runs.train_in_memory({**values, "output_dir": str(plain), "resume_from_checkpoint": "auto"})
    assert all(torch.equal(value, whole.average.average[name]) for name, value in resumed.average.average.items())
    assert (
        runs.history(again, "eval_loss")
        == [line["eval_loss"] for line in whole.state.log_history if "eval_loss" in line][:3]
    )
    raw, average = (
        load_file(again / "checkpoint-6" / name)
        for name in ("adapter_model.safetensors" if mode else "model.safetensors", AVERAGE_FILE)
    )
    result = runs.weights(again)
    assert any(not torch.equal(result[name], value) for name, value in raw.items())
    assert len(average) == len(resumed.average.average)


@pytest.mark.parametrize("metric", ["loss", "token_accuracy"])  # the worst accuracy: another checkpoint
def test_the_best_average_is_the_result(tmp_path, metric) -> None:
    values = runs.arguments(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=2, ema_decay=DECAY, load_best_model_at_end=True,
        metric_for_best_model=metric, greater_is_better=False, eval_file=str(tmp_path / "eval.jsonl"),
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    out, trainer = runs.train_in_memory(values)
    values = dict(zip((2, 4), runs.history(out, f"eval_{metric}"), strict=True))
    best = min(values, key=values.__getitem__)
    assert best == (4 if metric == "loss" else 2)
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    average = load_file(out / f"checkpoint-{best}" / AVERAGE_FILE)
    result = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(value, average[name]) for name, value in result.named_parameters())
    assert json.loads((out / "eval_results.json").read_text())[f"eval_{metric}"] == values[best]


def test_a_checkpoint_without_an_average(tmp_path, caplog) -> None:
    values = runs.arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    runs.train(values)
    _, trainer = runs.train_in_memory({**values, "max_steps": 4, "ema_decay": DECAY, "resume_from_checkpoint": "auto"})
    assert trainer.average is not None


def test_low_precision_weights_come_back_exactly() -> None:
    layer = nn.Linear(8, 8).bfloat16()
    before = layer.weight.detach().clone()
    average = WeightAverage({"weight": layer.weight}, 0.9)
    assert average.average["weight"].dtype == torch.float32
    average.average["weight"].add_(1e-4)
    kept = average.average["weight"].clone()
    with average.applied():
        assert torch.equal(layer.weight, kept.bfloat16())
    assert torch.equal(layer.weight, before) and torch.equal(average.average["weight"], kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_decay": 1.0}, "ema_decay is 1: it lies between 0 and 1"),
        ({"ema_decay": 0.9, "ema_start_step": -1}, "ema_start_step is -1"),
        ({"ema_cpu": True}, "ema_cpu belongs to an average"),
        ({"ema_decay": 0.9, "zero_stage": 2}, "DeepSpeed is in use"),
    ],
)
def test_what_is_refused(no_engine_starts, changes, message) -> None:
    with pytest.raises(ArgumentsError, match=message):
        parse_values({"model_name_or_path": "m", "train_file": "t", "output_dir": "o", "use_cpu": True, **changes})


def test_other_weights_are_refused(tmp_path) -> None:
    WeightAverage({"weight": nn.Linear(4, 4).weight}, 0.9).save(tmp_path)
    with pytest.raises(ValueError, match="is the average of other weights than are trained here: bias"):
        WeightAverage({"bias": nn.Linear(4, 4).bias}, 0.9).load(tmp_path)
    with pytest.raises(ValueError, match="ema_decay is 2"):
        SFTTrainer(tiny.tiny_model(), processing_class=tiny.tiny_tokenizer(), ema_args=EMAArguments(ema_decay=2.0))


def test_a_run_that_begins_from_weights_beside_their_average(tmp_path, capsys) -> None:
    values = runs.arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, ema_decay=DECAY)
    begun = runs.train(values) / "checkpoint-1"
    runs.train({**values, "model_name_or_path": str(begun), "output_dir": str(tmp_path / "next")})
    assert (
        f"{begun} holds an average of its weights beside them, and training begins from the weights"
        in capsys.readouterr().err
    )
