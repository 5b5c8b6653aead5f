"""Training with objective wedlm: the same on every cut, resumed as undisturbed, measured by what the model is used for."""

from __future__ import annotations

import json
import math
import signal

import numpy as np
import pytest
import runs
import tiny
import torch
from test_trainer import assert_same_run, logged, token_rows
from transformers import AutoModelForCausalLM

from hf_sft.arguments import DataArguments, WeDLMArguments
from hf_sft.collators import RATIOS
from hf_sft.models.mask_token import recorded_mask_token
from hf_sft.noise import MaskRule, document_generator, draw_mask, mask_at_ratio
from hf_sft.training.trainer import SFTTrainer
from hf_sft.training_arguments import TrainingArguments

MASK_ID = 258  # of the tiny models; token_rows never hold it
DATA = DataArguments(max_seq_length=128, objective="wedlm")
WEDLM = WeDLMArguments(block_size=8, mask_token_id=MASK_ID)
WORDS = {"objective": "wedlm", "block_size": 8, "mask_token": "<|mask|>"}


def make_trainer(folder, model=None, train=40, evaluation=None, wedlm=WEDLM, data=DATA, **options) -> SFTTrainer:
    trainer_options = {
        key: options.pop(key) for key in ("attention_backend", "compute_metrics", "data_collator") if key in options
    }
    defaults = dict(
        output_dir=str(folder), max_steps=12, learning_rate=1e-2, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=5,
    )  # fmt: skip
    train = token_rows(train) if isinstance(train, int) else train
    return SFTTrainer(
        tiny.tiny_model("qwen3") if model is None else model, TrainingArguments(**{**defaults, **options}),
        train_dataset=train, eval_dataset=evaluation, data_args=data, wedlm_args=wedlm, **trainer_options,
    )  # fmt: skip


def trained(folder, **options) -> SFTTrainer:
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trainer


def exact() -> torch.nn.Module:
    return tiny.tiny_model("qwen3").double()


# ---- one run, however it is cut ----


def test_batch_4_is_1_times_accumulation_4(tmp_path) -> None:
    # Where a gradient is nothing but rounding, Adam would make steps of it that depend on the order of sums.
    settled = {"adam_epsilon": 1e-5}
    want = trained(tmp_path, model=exact(), **settled)
    for batch, accumulation in ((1, 4), (2, 2)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        got = trained(tmp_path, model=exact(), **options, **settled)
        assert_same_run(got, want)
        for key in ("masked_loss", "next_token_loss", "masked_accuracy", "token_accuracy"):
            np.testing.assert_allclose(logged(got, key), logged(want, key), rtol=1e-10)


def test_the_backend_changes_nothing(tmp_path) -> None:
    want = trained(tmp_path, model=exact())
    assert want.layout.name == "segment"
    assert_same_run(trained(tmp_path, model=exact(), attention_backend="dense"), want)


def test_persistent_workers_hear_of_the_epoch(tmp_path) -> None:
    """A worker that kept epoch 0 would draw the same noise again."""
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
    assert_same_run(trained(tmp_path, **options), trained(tmp_path), tolerance=0)


def test_two_processes_learn_what_one_does(tmp_path) -> None:
    values = runs.arguments(
        tmp_path, "qwen3", max_steps=12, learning_rate=1e-3, per_device_train_batch_size=4,
        eval_file=str(tmp_path / "eval.jsonl"), **WORDS,
    )  # fmt: skip
    one = runs.train({**values, "output_dir": str(tmp_path / "one")})
    two = tmp_path / "two"
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    cut = {"output_dir": str(two), "per_device_train_batch_size": 2, **workers}
    process = runs.train_process({**values, **cut}, processes=2)
    assert (two / "trainer_state.json").exists(), process.stderr
    for key in ("loss", "grad_norm", "masked_loss", "next_token_loss", "masked_accuracy", "token_accuracy"):
        np.testing.assert_allclose(runs.history(two, key), runs.history(one, key), rtol=1e-5)
    after = runs.weights(two)
    for name, weight in runs.weights(one).items():
        assert (after[name] - weight).norm() <= 1e-5 * weight.norm(), name
    first, second = (json.loads((folder / "eval_results.json").read_text()) for folder in (one, two))
    for key in ("eval_loss", "eval_any_order_bound", "eval_masked_loss", "eval_masked_accuracy", "eval_perplexity"):
        assert math.isclose(first[key], second[key], rel_tol=1e-5), key


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_killed_and_resumed_equals_undisturbed(tmp_path, mode: str) -> None:
    values = runs.arguments(tmp_path, "qwen3", save_strategy="steps", save_steps=3, max_steps=11, **WORDS)
    values |= {} if mode == "full" else {"train_mode": mode, "lora_rank": 4, "dtype": "float32"}
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
        tiny.save_tiny(tmp_path / "model-qwen3", "qwen3", hidden_size=64, intermediate_size=64)
    # All three are processes: with another number of threads sums are rounded otherwise.
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    process = runs.train_process({**values, "output_dir": str(undisturbed)})
    assert process.returncode == 0, process.stderr
    process = runs.train_process(values, script="tests/die_at_step.py", HF_SFT_DIE_AT="8")
    assert process.returncode == -signal.SIGKILL, process.stderr
    process = runs.train_process({**values, "resume_from_checkpoint": "auto"})
    assert process.returncode == 0, process.stderr
    before, after = runs.weights(undisturbed), runs.weights(out)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert runs.history(out) == runs.history(undisturbed)
    with pytest.raises(ValueError, match="block_size was 8 and is 16"):
        runs.train({**values, "block_size": 16, "resume_from_checkpoint": "auto", "max_steps": 12})


# ---- what is logged and measured ----


def test_the_loss_is_the_sum_of_its_logged_parts(tmp_path) -> None:
    for weight in (1.0, 0.5):
        run = trained(
            tmp_path, wedlm=WeDLMArguments(block_size=8, mask_token_id=MASK_ID, ar_loss_weight=weight), max_steps=3
        )
        for loss, masked, following in zip(
            logged(run), logged(run, "masked_loss"), logged(run, "next_token_loss"), strict=True
        ):
            assert math.isclose(loss, (masked + weight * following) / (1 + weight), rel_tol=1e-6)
    alone = trained(
        tmp_path, wedlm=WeDLMArguments(block_size=8, mask_token_id=MASK_ID, enable_ar_loss=False), max_steps=3
    )
    np.testing.assert_allclose(logged(alone), logged(alone, "masked_loss"), rtol=1e-6)
    assert logged(alone, "next_token_loss") == []


@pytest.mark.parametrize(
    "sampling, weighting", [("reference", "weighted"), ("reference", "uniform"), ("elbo", "uniform")]
)
def test_the_other_schemes_learn(tmp_path, sampling, weighting) -> None:
    wedlm = WeDLMArguments(8, mask_sampling=sampling, loss_weighting_scheme=weighting, mask_token_id=MASK_ID)
    run = trained(tmp_path, wedlm=wedlm, max_steps=20, train=12, per_device_train_batch_size=8)
    losses = logged(run, "masked_loss")
    assert all(map(math.isfinite, losses)) and np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])


def slot_nll(model, ids: np.ndarray, masked: np.ndarray, block: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """nll and correctness of the masked tokens of one block: a causal pass over [prefix; observed; masks]."""
    start, end = block * size, min((block + 1) * size, len(ids))
    order = sorted(range(start, end), key=lambda p: (masked[p], p))
    pos = np.concatenate([np.arange(start), order]).astype(np.int64)
    tokens = np.where(masked[pos] & (pos >= start), MASK_ID, ids[pos])
    logits = model(
        torch.from_numpy(tokens)[None], position_ids=torch.from_numpy(pos)[None], attention_mask=torch.ones(1, len(pos)),
        use_cache=False,
    ).logits[0].double()  # fmt: skip
    slots = [i for i, p in enumerate(pos) if p >= start and masked[p]]
    nll = -torch.log_softmax(logits, -1)[slots, ids[pos[slots]]]
    return nll.detach().numpy(), (logits.argmax(-1)[slots].numpy() == ids[pos[slots]])


def test_evaluation_measures_the_grid_the_bound_and_the_next_token(tmp_path) -> None:
    rows = token_rows(24, seed=9)
    trainer = make_trainer(tmp_path, evaluation=rows, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    model = tiny.tiny_model("qwen3")
    rule, bound, supervised_tokens = MaskRule(8), 0.0, 0
    losses, hits = {r: [] for r in RATIOS}, {r: [] for r in RATIOS}
    next_nll: list[float] = []
    for number, row in enumerate(rows):
        ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
        supervised, generator = labels != -100, document_generator(0, 0, number)
        blocks = -(-len(ids) // 8)
        ratios = np.array([RATIOS[(number + block) % 10] for block in range(blocks)])
        grid = mask_at_ratio(supervised, ratios, rule, generator).masked
        mask = draw_mask(supervised, rule, generator)
        for block in range(blocks):
            own = slice(block * 8, block * 8 + 8)
            nll, correct = slot_nll(model, ids, grid, block, 8)
            losses[ratios[block]] += nll.tolist()
            hits[ratios[block]] += correct.tolist()
            nll, _ = slot_nll(model, ids, mask.masked, block, 8)
            bound += float((mask.weight[own][mask.masked[own]] * nll).sum()) if len(nll) else 0.0
        supervised_tokens += int(supervised.sum())
        logits = model(torch.from_numpy(ids)[None]).logits[0, :-1].double()
        kept = torch.from_numpy(supervised[1:])
        next_nll += torch.nn.functional.cross_entropy(
            logits[kept], torch.from_numpy(ids[1:])[kept], reduction="none"
        ).tolist()
    for ratio in RATIOS:
        assert math.isclose(metrics[f"eval_masked_loss_at_{ratio}"], np.mean(losses[ratio]), rel_tol=1e-6)
        assert metrics[f"eval_masked_accuracy_at_{ratio}"] == np.mean(hits[ratio])
    assert math.isclose(metrics["eval_any_order_bound"], bound / supervised_tokens, rel_tol=1e-6)
    assert math.isclose(metrics["eval_masked_loss"], np.mean([np.mean(losses[r]) for r in RATIOS]), rel_tol=1e-6)
    assert math.isclose(metrics["eval_perplexity"], math.exp(np.mean(next_nll)), rel_tol=1e-5)
    assert math.isclose(metrics["eval_loss"], (bound / supervised_tokens + np.mean(next_nll)) / 2, rel_tol=1e-6)
    assert metrics["eval_supervised_tokens"] == supervised_tokens
    again = trainer.evaluate()
    assert all(
        again[key] == value for key, value in metrics.items() if "_per_second" not in key and "runtime" not in key
    )


def test_functions_on_logits_see_the_clean_stream(tmp_path) -> None:
    def accuracy(prediction) -> dict:
        kept = prediction.label_ids[:, 1:] != -100
        hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"mine": hits[kept].mean()}

    trainer = make_trainer(tmp_path, evaluation=token_rows(7, seed=9), compute_metrics=accuracy)
    metrics = trainer.evaluate()
    assert math.isclose(metrics["eval_mine"], metrics["eval_token_accuracy"]) and "eval_any_order_bound" not in metrics
    assert math.isclose(metrics["eval_loss"], math.log(metrics["eval_perplexity"]), rel_tol=1e-6)


# ---- from a file of conversations or texts to a model that says what its mask is ----


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_train_py_in_every_mode(tmp_path, mode: str) -> None:
    options = {} if mode == "full" else {"train_mode": mode, "lora_rank": 4, "dtype": "float32"}
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
        tiny.save_tiny(tmp_path / "model-qwen3", "qwen3", hidden_size=64, intermediate_size=64)
    values = runs.arguments(tmp_path, "qwen3", eval_file=str(tmp_path / "eval.jsonl"), **WORDS, **options)
    out, trainer = runs.train_in_memory({**values, "max_steps": 30})
    losses = runs.history(out, "masked_loss")
    # What an adapter on a random model can learn is little; tests on a real one follow.
    assert np.mean(losses[-5:]) < (0.9 if mode == "full" else 0.97) * np.mean(losses[:2])
    assert json.loads((out / "args.json").read_text())["resolved"]["mask_token_id"] == 259
    assert {"eval_any_order_bound", "eval_masked_accuracy"} <= json.loads(
        (out / "eval_results.json").read_text()
    ).keys()
    if mode == "full":
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.config.mask_token_id == 259 == recorded_mask_token(model)
    else:
        assert json.loads((out / "generation_config.json").read_text())["mask_token_id"] == 259
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["trainable_token_indices"] == {"model.embed_tokens": [259]}
        saved = runs.weights(out)
        assert not any("lm_head" in name or saved[name].shape[0] > 250 for name in saved), saved.keys()
        moved = trainer.model.get_base_model().get_input_embeddings().token_adapter
        assert (moved.trainable_tokens_delta["default"] - moved.trainable_tokens_original["default"]).norm() > 0
    assert trainer.scorer.chunked


def test_the_tail_comes_right_behind_the_end_of_the_last_turn(tmp_path) -> None:
    values = runs.arguments(tmp_path, "qwen3", max_steps=1, num_learnable_im_end=3, **WORDS)
    _, trainer = runs.train_in_memory(values)
    for number in range(len(trainer.train_dataset.lengths)):
        row = trainer.train_dataset.rows[number]
        ids, labels = row["input_ids"][0].values.to_pylist(), row["labels"][0].values.to_pylist()
        assert ids[-4:] == labels[-4:] == [256] * 4 and ids[-5] != 10  # no line break of the template before them


def test_raw_texts(tmp_path) -> None:
    texts = [f"{word} and {word} again, number {n}" for n, word in enumerate(["sun", "rain", "snow", "fog"] * 4)]
    runs.write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    values = runs.arguments(tmp_path, "qwen3", max_steps=25, task_type="pretrain", **WORDS)
    out = runs.train({**values, "train_file": str(tmp_path / "texts.jsonl")})
    losses = runs.history(out, "masked_loss")
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    report = json.loads((out / "data_report.json").read_text())["train"]
    assert (
        report["tokens"] == sum(len(text) + 1 for text in texts)
        and report["supervised_tokens"] == report["tokens"] - 16
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_token": None, "mask_token_id": 65}, r"mask token id 65 \(from the arguments\) is 'b', ordinary text"),
        ({"mask_token": None}, "151665 .* is beyond the vocabulary of 259 rows"),
        ({"mask_token": "<|im_end|>"}, "the tokenizer's eos_token"),
        ({"mask_token_id": 3}, "leave out one of the two"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 257}, "block_size is 257"),
        ({"attention_backend": "flash"}, "flash kernels know whole causal documents"),
        ({"packing": False}, "two streams need a packed layout"),
        ({"ar_loss_weight": -1}, "ar_loss_weight is -1"),
        ({"enable_ar_loss": False, "ar_loss_weight": 2}, "leave out one of them"),
        ({"num_learnable_im_end": -1}, "num_learnable_im_end is -1"),
        ({"train_on": "all", "num_learnable_im_end": 8}, "train_on is all"),
        ({"objective": "causal"}, "belong to objective wedlm"),
    ],
)  # fmt: skip
def test_wrong_settings(tmp_path, changes: dict, message: str) -> None:
    values = {**runs.arguments(tmp_path, "qwen3"), **WORDS, **changes}
    with pytest.raises(ValueError, match=message):
        runs.train({key: value for key, value in values.items() if value is not None})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["mamba", "gpt2"])
def test_models_without_rotary_positions(tmp_path, family: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2)) if family == "gpt2" else None
    with pytest.raises(ValueError, match="no rotary positions"):
        make_trainer(tmp_path, model=model or tiny.tiny_model(family))


def test_a_text_that_holds_the_mask_token_is_refused_and_counted(tmp_path) -> None:
    values = runs.arguments(tmp_path, "qwen3", max_steps=1, **WORDS)
    records = [
        tiny.conversations(1)[0],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a <|mask|>"}],
    ]
    values["train_file"] = runs.write_jsonl(tmp_path / "masked.jsonl", records)
    with pytest.raises(ValueError, match=r"masked\.jsonl, line 2: it holds the mask token 259"):
        runs.train(values)
    out = runs.train({**values, "bad_records": "skip"})
    assert json.loads((out / "data_report.json").read_text())["train"]["bad"]["count"] == 1
    with pytest.raises(ValueError, match="it holds the mask token 258"):
        make_trainer(tmp_path, train=[{"input_ids": [5, 258, 7], "labels": [5, 258, 7]}])


def test_a_collator_of_ones_own_has_no_noise(tmp_path) -> None:
    with pytest.raises(ValueError, match="data_collator replaces ours"):
        make_trainer(tmp_path, data_collator=lambda rows: rows)


def test_official_code_is_not_run(tmp_path) -> None:
    from test_wedlm_model import renamed

    from hf_sft.arguments import ModelArguments
    from hf_sft.models.loading import load_model

    folder = renamed(tmp_path / "official", "qwen3")
    with pytest.raises(ValueError, match="set trust_remote_code to false"):
        load_model(ModelArguments(model_name_or_path=folder, trust_remote_code=True))


# ---- from Python ----


def python_options(folder, **changes) -> dict:
    args = TrainingArguments(output_dir=str(folder), max_steps=2, use_cpu=True, disable_tqdm=True, save_strategy="no")
    return {
        "args": args, "processing_class": tiny.tiny_tokenizer(), "train_dataset": tiny.conversations(12), "data_args": DATA,
        "wedlm_args": WeDLMArguments(8, mask_token="<|mask|>"), **changes,
    }  # fmt: skip


def test_a_new_mask_token_gets_a_row_from_python_too(tmp_path, caplog) -> None:
    from peft import LoraConfig

    trainer = SFTTrainer(tiny.tiny_model("qwen3"), **python_options(tmp_path))
    assert trainer.embedding_rows == 260 and recorded_mask_token(trainer.model) == 259
    trainer.train()
    for asked, trained_rows in ((None, [259]), ([5], [5, 259]), ({"model.embed_tokens": [7]}, [7, 259])):
        lora = LoraConfig(target_modules=["q_proj"], trainable_token_indices=asked)
        trainer = SFTTrainer(tiny.tiny_model("qwen3"), **python_options(tmp_path, peft_config=lora))
        adapter = trainer.model.get_base_model().get_input_embeddings().token_adapter
        assert adapter.token_indices["default"] == trained_rows and lora.trainable_token_indices == asked
        trainer.train()
        moved = adapter.trainable_tokens_delta["default"] - adapter.trainable_tokens_original["default"]
        assert moved[-1].norm() > 0
    assert "does not train the row" not in caplog.text


def test_a_model_with_an_adapter_of_its_own(tmp_path, caplog) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny.tiny_model("qwen3"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="is new and the model has an adapter already"):
        SFTTrainer(adapted, **python_options(tmp_path))
    SFTTrainer(
        adapted, **python_options(tmp_path, wedlm_args=WEDLM, train_dataset=token_rows(4), processing_class=None)
    )
    assert "does not train the row of the mask token 258" in caplog.text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data_args": DataArguments(max_seq_length=128, objective="casual")}, "objective is 'casual': it must be"),
        ({"wedlm_args": WeDLMArguments("8", mask_token_id=258)}, "block_size is '8': it must be a whole number"),
        (
            {"wedlm_args": WeDLMArguments(8, mask_token_id=999), "processing_class": None},
            "999 .* is beyond the vocabulary",
        ),
        (
            {"wedlm_args": WeDLMArguments(8, mask_token_id=-1), "processing_class": None},
            "-1 .* is beyond the vocabulary",
        ),
        ({"wedlm_args": WeDLMArguments(8, mask_token=" ")}, "mask_token is ' ': name a token that is not blank"),
        ({"wedlm_args": WeDLMArguments(256, mask_token_id=258)}, "block_size is 256"),
    ],
)
def test_wrong_settings_from_python(tmp_path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFTTrainer(tiny.tiny_model("qwen3"), **python_options(tmp_path, train_dataset=token_rows(4), **changes))


def test_the_smallest_bound_is_the_best(tmp_path) -> None:
    import transformers

    plain = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="any_order_bound",
    )  # fmt: skip
    options = python_options(tmp_path, eval_dataset=tiny.conversations(3), args=plain)
    assert SFTTrainer(tiny.tiny_model("qwen3"), **options).args.greater_is_better is False


def test_what_is_measured_does_not_depend_on_the_tail(tmp_path) -> None:
    found = []
    for tail in (0, 8):
        wedlm = WeDLMArguments(8, mask_token="<|mask|>", num_learnable_im_end=tail)
        options = python_options(tmp_path, eval_dataset=tiny.conversations(6), wedlm_args=wedlm)
        metrics = SFTTrainer(tiny.tiny_model("qwen3"), **options).evaluate()
        found.append(
            {
                key: value
                for key, value in metrics.items()
                if "second" not in key and "runtime" not in key and "time" not in key
            }
        )
    assert found[0] == found[1]


def test_token_rows_have_no_tail_to_cut(tmp_path) -> None:
    data = DataArguments(max_seq_length=16, objective="wedlm", overlength="error")
    row = {"input_ids": [1, 2, *[7] * 15], "labels": [-100, 2, *[7] * 15]}
    with pytest.raises(ValueError, match="17 tokens, but max_seq_length is 16"):
        make_trainer(tmp_path, train=[row], data=data)


def test_an_adapter_goes_on_with_its_mask_token(tmp_path) -> None:
    options = {"train_mode": "lora", "lora_rank": 4, "dtype": "float32", "max_steps": 2}
    values = runs.arguments(tmp_path, "qwen3", **WORDS)
    tiny.save_tiny(tmp_path / "padded", "qwen3", vocab_size=300)
    values["model_name_or_path"] = str(tmp_path / "padded")
    first = runs.train({**values, **options})
    again = {key: value for key, value in values.items() if key != "mask_token"}
    again |= {"train_mode": "lora", "dtype": "float32", "max_steps": 2, "adapter_name_or_path": str(first)}
    again |= {"tokenizer_name_or_path": str(first), "output_dir": str(tmp_path / "second")}
    second = runs.train(again)
    assert json.loads((second / "generation_config.json").read_text())["mask_token_id"] == 259


def test_flex_does_not_train_on_a_cpu(tmp_path) -> None:
    with pytest.raises(ValueError, match="no backward pass: choose auto"):
        make_trainer(tmp_path, attention_backend="flex")
    with pytest.raises(ValueError, match="needs MagiAttention"):
        make_trainer(tmp_path, attention_backend="magi")
