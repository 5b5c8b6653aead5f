"""Weights that are not trained, or not before a step: patterns, a plain loop beside it, resuming, several processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy

from hf_sft.arguments import DataArguments
from hf_sft.models.freezing import freeze, frozen_parameters
from hf_sft.parsing import parse_values
from hf_sft.training.trainer import SFTTrainer
from hf_sft.training_arguments import TrainingArguments

FIRST = "model.layers.0.*"
RATE, DECAY, CLIP, BATCH = 1e-2, 0.1, 0.3, 3


# ---- patterns ----


@pytest.mark.parametrize(
    "patterns, wanted",
    [
        (["model.embed_tokens.*"], lambda name: name == "model.embed_tokens.weight"),
        (["model.layers.[01].*"], lambda name: ".layers." in name),
        ([FIRST, "lm_head.weight"], lambda name: ".layers.0." in name or name == "lm_head.weight"),
        (["*", "!*norm*"], lambda name: "norm" not in name),
        (["*", "!model.layers.*", "*.self_attn.*"], lambda name: ".layers." not in name or "self_attn" in name),
    ],
)
def test_what_patterns_name(patterns: list[str], wanted: Any) -> None:
    model = tiny.tiny_model()
    names = freeze(model, patterns)
    assert set(names) == {name for name, _ in model.named_parameters() if wanted(name)}
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == set(names)


@pytest.mark.parametrize(
    "patterns, message",
    [
        (["model.layer.*"], r"'model\.layer\.\*', which matches no weight of the model; those that are trained are "
                            r"model\.embed_tokens\.weight, .*, \.\.\., lm_head\.weight"),
        ([FIRST, "!lmhead"], "'!lmhead', which matches no weight"),
        (["*"], "leaves nothing to train"),
        (["lm_head.*", "!*"], "nothing is frozen"),
    ],
)  # fmt: skip
def test_patterns_that_do_not_fit(patterns: list[str], message: str) -> None:
    model = tiny.tiny_model()
    with pytest.raises(ValueError, match=message):
        freeze(model, patterns)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_tied_weight_goes_by_both_names() -> None:
    for pattern in ("lm_head.*", "model.embed_tokens.weight"):
        model = tiny.tiny_model(tie_word_embeddings=True)
        assert freeze(model, [pattern]) == ["model.embed_tokens.weight"]
        assert not model.lm_head.weight.requires_grad
    model = tiny.tiny_model(tie_word_embeddings=True)
    assert "model.embed_tokens.weight" not in freeze(model, ["*", "!lm_head.*"])


def adapted(**options: Any) -> PeftModel:
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    return get_peft_model(tiny.tiny_model(), LoraConfig(**config))


def test_under_an_adapter_a_pattern_names_what_the_adapter_trains() -> None:
    own = "model.layers.0.self_attn.q_proj.lora_{}.default.weight"
    both = [own.format("A"), own.format("B")]
    assert freeze(adapted(), ["model.layers.0.self_attn.q_proj.weight"]) == both
    assert freeze(adapted(), ["model.layers.0.*q_proj*"]) == both
    first = freeze(adapted(), ["*.lora_A.*"])
    assert len(first) == 4 and all(".lora_A." in name for name in first)
    model = adapted(modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [1, 2]})
    assert freeze(model, ["lm_head.weight"]) == ["lm_head.modules_to_save.default.weight"]
    (row,) = freeze(model, ["model.embed_tokens.weight"])
    assert "trainable_tokens_delta" in row
    with pytest.raises(ValueError, match=r"norm\.weight', which matches no weight that is trained \(under an adapter"):
        freeze(adapted(), ["model.norm.weight"])
    with pytest.raises(ValueError, match="nothing to train"):
        freeze(adapted(), ["model.layers.*"])


def test_settings_that_contradict() -> None:
    base = {"model_name_or_path": "m", "train_file": "d.jsonl", "output_dir": "o"}
    for changes, message in (
        ({"thaw_at_step": 3}, "freeze is not set"),
        ({"freeze": ["a"], "thaw_at_step": 0}, "thaw_at_step is 0: use at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_values({**base, **changes})
    args = TrainingArguments(use_cpu=True)
    for options, message in (
        ({"thaw_at_step": 3}, "freeze names nothing"),
        ({"freeze": [FIRST], "thaw_at_step": 0}, "at least 1 step"),
        ({"freeze": FIRST}, "must be a list"),
        ({"freeze": ["x*"]}, "matches no weight"),
    ):
        with pytest.raises(ValueError, match=message):
            SFTTrainer(tiny.tiny_model(), args, train_dataset=token_rows(2), **options)


# ---- against a plain loop ----


def token_rows(count: int) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(4)
    ids = [rng.integers(0, 255, int(length)).tolist() for length in rng.integers(5, 20, count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def make_trainer(folder: Path, model: torch.nn.Module, steps: int = 8, **options: Any) -> SFTTrainer:
    own = {name: options.pop(name) for name in ("freeze", "thaw_at_step", "callbacks") if name in options}
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=RATE, weight_decay=DECAY, lr_scheduler_type="constant",
        per_device_train_batch_size=BATCH, train_sampling_strategy="sequential", logging_steps=1, use_cpu=True,
        save_strategy="no", disable_tqdm=True, **{"max_grad_norm": CLIP, **options},
    )  # fmt: skip
    data = DataArguments(max_seq_length=64, packing=False)
    return SFTTrainer(model, args, train_dataset=token_rows(steps * BATCH), data_args=data, **own)


def plain_loop(model: torch.nn.Module, frozen: set[str], thaw: int | None, steps: int, clip: float) -> list[float]:
    """AdamW as it is in torch; from step ``thaw`` on a second one, new, for what was frozen. Gives the norms of gradients."""
    named = dict(model.named_parameters())

    def adamw(names: set[str]) -> torch.optim.Optimizer:
        plain = {name for name in names if "norm" in name or "bias" in name}
        groups = [
            {"params": [named[name] for name in sorted(chosen)], "weight_decay": decay}
            for chosen, decay in ((names - plain, DECAY), (plain, 0.0)) if chosen
        ]  # fmt: skip
        return torch.optim.AdamW(groups, lr=RATE)

    for name in frozen:
        named[name].requires_grad_(False)
    optimizers, norms, rows = [adamw(set(named) - frozen)], [], token_rows(steps * BATCH)
    model.train()
    for step in range(steps):
        if step == thaw:
            for name in frozen:
                named[name].requires_grad_(True)
            optimizers.append(adamw(frozen))
        batch = [torch.tensor(row["input_ids"]) for row in rows[step * BATCH : (step + 1) * BATCH]]
        nll = [cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum") for ids in batch]
        share = float(np.float32(1 / sum(len(ids) - 1 for ids in batch)))  # weights of rows have 32 bits in every model
        (sum(nll) * share).backward()
        trained = [parameter for parameter in named.values() if parameter.grad is not None]
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, clip or float("inf"))))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return norms


def exact(**config: Any) -> torch.nn.Module:
    """float64 throughout: this family's norms do not compute in float32."""
    return tiny.tiny_model("gpt_neox", **config).double()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("clip", [CLIP, 0.0])
@pytest.mark.parametrize("thaw", [None, 1, 5])
def test_the_trajectory_is_that_of_a_plain_loop(tmp_path, tied: bool, clip: float, thaw: int | None) -> None:
    patterns = ["gpt_neox.layers.0.*", "lm_head.*", "gpt_neox.final_layer_norm.*"]
    before, model, want = (exact(tie_word_embeddings=tied) for _ in range(3))
    trainer = make_trainer(tmp_path, model, freeze=patterns, thaw_at_step=thaw, max_grad_norm=clip)
    held_until: list[bool] = []
    names = frozen_parameters(before, patterns)
    trainer.add_callback(_AtEachStep(lambda: held_until.append(_same(before, model, names))))
    trainer.train()
    norms = plain_loop(want, set(names), thaw, 8, clip)
    for (name, got), wanted in zip(model.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12, msg=name)
    logged = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    np.testing.assert_allclose(logged, norms, rtol=1e-10)
    assert held_until == [thaw is None or n <= thaw for n in range(1, 9)]  # bit for bit, weight decay included
    states = trainer.optimizer.state
    frozen = [parameter for name, parameter in model.named_parameters() if name in names]
    if thaw is None:
        held = [each for group in trainer.optimizer.param_groups for each in group["params"]]
        assert not {id(each) for each in held} & {id(each) for each in frozen}
        assert all(each.grad is None and each not in states for each in frozen)
    else:
        assert {float(states[each]["step"]) for each in frozen} == {8.0 - thaw}


def _same(before: torch.nn.Module, now: torch.nn.Module, names: Any) -> bool:
    one, two = dict(before.named_parameters()), dict(now.named_parameters())
    return all(torch.equal(one[name], two[name]) for name in names)


def test_gradients_of_several_micro_batches_are_dropped_together(tmp_path) -> None:
    want, got = exact(), exact()
    make_trainer(tmp_path, want, freeze=["*layers.0.*"], thaw_at_step=3).train()
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}
    trainer = SFTTrainer(
        got,
        TrainingArguments(
            output_dir=str(tmp_path), max_steps=8, learning_rate=RATE, weight_decay=DECAY, lr_scheduler_type="constant",
            train_sampling_strategy="sequential", use_cpu=True, save_strategy="no", disable_tqdm=True, max_grad_norm=CLIP,
            **cut,
        ),
        train_dataset=token_rows(8 * BATCH), data_args=DataArguments(max_seq_length=64, packing=False),
        freeze=["*layers.0.*"], thaw_at_step=3,
    )  # fmt: skip
    trainer.train()
    for (name, a), b in zip(got.named_parameters(), want.parameters(), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_behind_a_frozen_embedding_learn(tmp_path, reentrant: bool) -> None:
    models = []
    for options in (
        {},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        models.append(exact())
        make_trainer(tmp_path, models[-1], 3, freeze=["*.embed_in.*"], **options).train()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14), name


# ---- through train.py ----


def _AtEachStep(action: Any) -> Any:
    from transformers import TrainerCallback

    class AtEachStep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            action()

    return AtEachStep()


WAYS: dict[str, dict[str, Any]] = {
    "full": {"freeze": [FIRST, "model.embed_tokens.*"]},
    "lora": {"freeze": ["*.lora_A.*", FIRST], "train_mode": "lora", "lora_rank": 3, "dtype": "float32"},
    "thawed": {"freeze": [FIRST], "thaw_at_step": 4},
    "lora thawed": {"freeze": [FIRST], "thaw_at_step": 4, "train_mode": "lora", "lora_rank": 3, "dtype": "float32"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_goes_on_exactly(tmp_path, way: str) -> None:
    values = runs.arguments(tmp_path, save_strategy="steps", save_steps=3, **WAYS[way])
    whole = runs.train({**values, "output_dir": str(tmp_path / "whole")})
    record = json.loads((whole / "args.json").read_text())["model"]
    assert record["freeze"] == WAYS[way]["freeze"] and record["thaw_at_step"] == WAYS[way].get("thaw_at_step")
    for step in (3, 6):  # before step 4, and behind it
        stopped = tmp_path / f"stopped-{step}"
        stopped.mkdir()
        shutil.copytree(whole / f"checkpoint-{step}", stopped / f"checkpoint-{step}")
        shutil.copy(whole / "args.json", stopped)
        runs.train({**values, "output_dir": str(stopped), "resume_from_checkpoint": "auto"})
        for name, weight in runs.weights(whole).items():
            assert torch.equal(weight, runs.weights(stopped)[name]), (step, name)
        assert runs.history(stopped) == runs.history(whole)


def test_a_run_goes_on_with_what_it_trains(tmp_path, caplog) -> None:
    values = runs.arguments(tmp_path, save_strategy="steps", save_steps=3, max_steps=3, **WAYS["thawed"])
    out = runs.train(values)
    again = {**values, "max_steps": 6, "resume_from_checkpoint": "auto"}
    with pytest.raises(ValueError, match=r"freeze was \['model.layers.0.\*'\] and is \['lm_head.\*'\]"):
        runs.train({**again, "freeze": ["lm_head.*"]})
    del again["thaw_at_step"]
    with pytest.raises(ValueError, match="of other weights than this run trains"):
        runs.train(again)
    caplog.set_level("INFO", logger="hf_sft")
    runs.train({**again, "thaw_at_step": 5})
    before, after = (runs.weights(path) for path in (out / "checkpoint-3", out))
    assert any(not torch.equal(before[name], after[name]) for name in before if ".layers.0." in name)


def test_what_is_frozen_is_told(tmp_path, capsys) -> None:
    tiny.save_tiny(tmp_path / "model-llama", tie_word_embeddings=True)
    changes = {
        "objective": "wedlm",
        "mask_token": "<|mask|>",
        "freeze": ["lm_head.*"],
        "thaw_at_step": 5,
        "max_steps": 1,
    }
    runs.train(runs.arguments(tmp_path, **changes))
    told = capsys.readouterr().err
    assert "1 of 20 weights that are trained, " in told and "stay as they are for the first 5 steps" in told
    assert "lm_head.weight is tied to model.embed_tokens.weight, and both are one weight" in told
    assert "thaw_at_step is 5 and the run has 1 steps: nothing is thawed" in told
    assert "freeze holds the row of the mask token 259" in told


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_learn_what_one_does(tmp_path, way: str) -> None:
    values = runs.arguments(tmp_path, learning_rate=1e-3, max_steps=8, **WAYS[way])
    one = runs.train({**values, "output_dir": str(tmp_path / "one")})
    two = tmp_path / "two"
    process = runs.train_process({**values, "output_dir": str(two), "per_device_train_batch_size": 1}, processes=2)
    assert (two / "trainer_state.json").exists(), process.stderr
    after = runs.weights(two)
    for name, weight in runs.weights(one).items():
        assert (after[name] - weight).norm() <= 1e-5 * weight.norm(), name
    np.testing.assert_allclose(runs.history(two, "grad_norm"), runs.history(one, "grad_norm"), rtol=1e-5)


# ---- engines ----

ENGINES: dict[str, dict[str, Any]] = {
    "zero2": {"zero_stage": 2},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}},
    "fsdp2": {"fsdp": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_that_shard(tmp_path, engine: str) -> None:
    """Frozen for good: the result of one process, also after a resume. To be thawed: refused."""
    frozen = {way: WAYS[way] for way in ("full", "lora")}
    base = runs.arguments(tmp_path, learning_rate=1e-3, save_strategy="steps", save_steps=4, max_steps=8)
    jobs = []
    for way, changes in frozen.items():
        values = {**base, **changes, **ENGINES[engine], "per_device_train_batch_size": 1}
        runs.train({**base, **changes, "output_dir": str(tmp_path / f"{way}-one")})
        jobs.append({**values, "output_dir": str(tmp_path / f"{way}-short"), "max_steps": 4})
        jobs.append({**values, "output_dir": str(tmp_path / f"{way}-two")})
        resumed = {"resume_from_checkpoint": str(tmp_path / f"{way}-two" / "checkpoint-4")}
        jobs.append({**values, **resumed, "output_dir": str(tmp_path / f"{way}-resumed")})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    launched = runs.launch(
        ["tests/engine_runs.py", str(tmp_path / "jobs.json")], 2, PYTHONPATH=f"{runs.ROOT}:{runs.ROOT}/tests"
    )
    for way in frozen:
        want = runs.weights(tmp_path / f"{way}-one")
        for name in ("two", "resumed"):
            assert (tmp_path / f"{way}-{name}" / "trainer_state.json").is_file(), launched.stderr[-6000:]
            got = runs.weights(tmp_path / f"{way}-{name}")
            assert want.keys() == got.keys()
            for key, weight in want.items():
                assert (got[key] - weight).norm() <= 1e-5 * weight.norm(), (way, name, key)
    thawing = {**base, **WAYS["thawed"], **ENGINES[engine], "output_dir": str(tmp_path / "thawed")}
    refused = runs.train_process({**thawing, "per_device_train_batch_size": 1}, processes=2)
    assert refused.returncode != 0 and "DeepSpeed and FSDP keep gradients" in refused.stderr
