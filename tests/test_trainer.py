"""What the Trainer learns does not depend on how it is cut, laid out, interrupted or called."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import runs
import tiny
import torch

from hf_sft.arguments import DataArguments
from hf_sft.collators import CausalCollator
from hf_sft.training.trainer import SFTTrainer
from hf_sft.training_arguments import TrainingArguments

DATA = DataArguments(max_seq_length=128)


def token_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows whose supervised share goes from almost nothing to almost all."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = rng.integers(0, 255, rng.integers(2, 60))
        labels = np.where(rng.random(len(ids)) < rng.random(), ids, -100)
        labels[-1] = ids[-1]
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


OF_TRAINER = {  # keywords of the trainer; others are training arguments
    "model", "data_collator", "attention_backend", "router_aux_loss_coef", "compute_metrics", "callbacks", "peft_config",
    "processing_class",
}  # fmt: skip


def arguments(folder, **options) -> TrainingArguments:
    defaults = dict(
        output_dir=str(folder), max_steps=20, learning_rate=1e-2, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=5,
    )  # fmt: skip
    return TrainingArguments(**{**defaults, **options})


def make_trainer(folder, model=None, data: DataArguments = DATA, train=40, evaluation=None, **options) -> SFTTrainer:
    trainer_options = {key: options.pop(key) for key in list(options) if key in OF_TRAINER}
    train = token_rows(train) if isinstance(train, int) else train
    model = tiny.tiny_model() if model is None else model
    return SFTTrainer(
        model,
        arguments(folder, **options),
        train_dataset=train,
        eval_dataset=evaluation,
        data_args=data,
        **trainer_options,
    )


def logged(trainer: SFTTrainer, key: str = "loss") -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def trained(folder, **options) -> SFTTrainer:
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trainer


def exact(**config) -> torch.nn.Module:
    """A model in float64: what differs there beyond 1e-10 is no rounding, though Adam divides by the size of a gradient."""
    return tiny.tiny_model(**config).double()


def assert_same_run(got: SFTTrainer, want: SFTTrainer, tolerance: float = 1e-10) -> None:
    # Trainer adds the losses of micro-batches up in float32: one unit in its last place is left.
    np.testing.assert_allclose(logged(got), logged(want), rtol=max(tolerance, 2e-7))
    np.testing.assert_allclose(logged(got, "grad_norm"), logged(want, "grad_norm"), rtol=tolerance)
    for (name, a), b in zip(got.model.named_parameters(), want.model.parameters(), strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), name


def test_batch_4_is_1_times_accumulation_4(tmp_path) -> None:
    want = trained(tmp_path, model=exact())
    assert len(logged(want)) == 20 and logged(want)[-1] < logged(want)[0]
    for batch, accumulation in ((1, 4), (2, 2)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        assert_same_run(trained(tmp_path, model=exact(), **options), want)
    single = trained(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)  # float32
    np.testing.assert_allclose(logged(single), logged(trained(tmp_path)), rtol=1e-5)


def test_two_processes_learn_what_one_does(tmp_path) -> None:
    values = runs.arguments(
        tmp_path,
        max_steps=20,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        eval_file=str(tmp_path / "eval.jsonl"),
    )
    one = runs.train({**values, "output_dir": str(tmp_path / "one")})
    two = tmp_path / "two"
    process = runs.train_process({**values, "output_dir": str(two), "per_device_train_batch_size": 2}, processes=2)
    assert (two / "trainer_state.json").exists(), process.stderr
    for key in ("loss", "grad_norm", "token_accuracy", "supervised_share"):
        np.testing.assert_allclose(runs.history(two, key), runs.history(one, key), rtol=1e-5)
    after = runs.weights(two)
    for name, weight in runs.weights(one).items():
        assert (after[name] - weight).norm() <= 1e-5 * weight.norm(), name
    metrics = [json.loads((folder / "eval_results.json").read_text()) for folder in (one, two)]
    assert metrics[0]["eval_supervised_tokens"] == metrics[1]["eval_supervised_tokens"]
    assert math.isclose(metrics[0]["eval_loss"], metrics[1]["eval_loss"], rel_tol=1e-5)


def test_packed_or_padded_in_any_backend_is_the_same_run(tmp_path) -> None:
    """All documents in every step, so that bins and rows hold the same ones."""
    rows = token_rows(12)
    options = {"train": rows, "per_device_train_batch_size": 12}
    want = trained(tmp_path, model=exact(), data=DataArguments(max_seq_length=128, packing=False), **options)
    for backend in ("segment", "dense"):
        got = trained(tmp_path, model=exact(), attention_backend=backend, **options)
        assert got.layout.name == backend and len(got.train_dataset) < 12
        assert_same_run(got, want)


def test_loader_workers_change_nothing(tmp_path) -> None:
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
    assert_same_run(trained(tmp_path, **options), trained(tmp_path), tolerance=0)


def test_every_document_is_seen_once_per_epoch_on_every_cut(tmp_path) -> None:
    for batch, accumulation in ((1, 1), (3, 2), (40, 1)):
        trainer = make_trainer(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        loader = trainer.get_train_dataloader()
        orders = []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            orders.append(
                [
                    tuple(doc.tolist())
                    for b in loader
                    if b["num_tokens"]
                    for doc in b["input_ids"][0].split(b["doc_lengths"])
                ]
            )
        want = sorted(tuple(row["input_ids"]) for row in token_rows(40))
        assert sorted(orders[0]) == sorted(orders[1]) == want and orders[0] != orders[1]


def test_evaluation_is_a_mean_over_tokens(tmp_path) -> None:
    rows = token_rows(11, seed=9)
    trainer = make_trainer(tmp_path, evaluation=rows, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    model, total, correct, count = trainer.model, 0.0, 0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"])[1:]
        kept = labels != -100
        total += torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum").item()
        correct += (logits.argmax(-1) == labels)[kept].sum().item()
        count += kept.sum().item()
    assert metrics["eval_supervised_tokens"] == count
    assert math.isclose(metrics["eval_loss"], total / count, rel_tol=1e-6)
    assert math.isclose(metrics["eval_perplexity"], math.exp(total / count), rel_tol=1e-5)
    assert metrics["eval_token_accuracy"] == correct / count
    assert math.isclose(
        trainer.evaluate(rows[:3], metric_key_prefix="part")["part_loss"], trainer.evaluate(rows[:3])["eval_loss"]
    )


def test_the_log_says_what_was_learned(tmp_path) -> None:
    trainer = trained(tmp_path, max_steps=4, logging_steps=2)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    # The loss of a line is a mean over its tokens, not over its steps, which are of uneven size.
    steps = trained(tmp_path, max_steps=4)
    batches = [int(batch["num_items"][0]) for batch in make_trainer(tmp_path).get_train_dataloader()]
    batches += [0] * 4  # 3 steps an epoch: the fourth begins the second
    loader = make_trainer(tmp_path).get_train_dataloader()
    loader.set_epoch(1)
    batches[3] = int(next(iter(loader))["num_items"][0])
    means = [np.average(logged(steps)[i : i + 2], weights=batches[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(logged(trainer), means, rtol=1e-6)
    np.testing.assert_allclose(logged(trainer, "train_loss"), np.average(logged(steps), weights=batches[:4]), rtol=1e-6)
    for line in lines:
        assert 0 <= line["token_accuracy"] <= 1 and 0 < line["supervised_share"] <= 1 and line["tokens_per_second"] > 0
    assert trainer.state.total_flos > 0


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_with_nothing_to_learn_gives_a_connected_zero(tmp_path, packed: bool) -> None:
    trainer = make_trainer(tmp_path, data=DataArguments(max_seq_length=128, packing=packed or False))
    for documents in ([], [{"input_ids": [1, 2, 3], "labels": [-100] * 3}]):
        batch = trainer._prepare_inputs(CausalCollator(packed)([documents]))
        loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=torch.tensor([0.0, 0.0]))
        loss.backward()
        assert loss.item() == 0
        for name, parameter in trainer.model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() == 0, name


def test_more_ranks_than_documents_is_no_special_case(tmp_path) -> None:
    trainer = trained(
        tmp_path, train=token_rows(1), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=3
    )
    assert all(math.isfinite(loss) for loss in logged(trainer))
    np.testing.assert_allclose(logged(trainer), logged(trained(tmp_path, train=token_rows(1), max_steps=3)), rtol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_mixed_precision_keeps_float32_weights(tmp_path, bf16: bool) -> None:
    trainer, seen = make_trainer(tmp_path, bf16=bf16, max_steps=5), set()
    projection = trainer.model.model.layers[0].mlp.up_proj
    projection.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16 if bf16 else torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    # bf16 products are good to 2**-8; the loss of 5 steps moves with them.
    np.testing.assert_allclose(logged(trainer), logged(trained(tmp_path, max_steps=5)), rtol=1e-2 if bf16 else 1e-6)


def test_compute_metrics_sees_logits_and_labels_as_in_trainer(tmp_path) -> None:
    rows, seen = token_rows(7, seed=4), {}

    def compute_metrics(prediction):
        logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        kept = labels != -100
        seen["count"] = int(kept.sum())
        return {"mine": float((logits.argmax(-1) == labels)[kept].mean())}

    metrics = make_trainer(
        tmp_path, evaluation=rows, compute_metrics=compute_metrics, per_device_eval_batch_size=2
    ).evaluate()
    plain = make_trainer(tmp_path, evaluation=rows).evaluate()
    assert seen["count"] == plain["eval_supervised_tokens"]
    assert metrics["eval_mine"] == pytest.approx(plain["eval_token_accuracy"])
    assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)


def test_a_users_collator_learns_the_same(tmp_path) -> None:
    from transformers import DataCollatorForSeq2Seq

    rows = token_rows(12)
    collator = DataCollatorForSeq2Seq(tiny.tiny_tokenizer())
    options = {"train": rows, "per_device_train_batch_size": 5, "max_steps": 6}
    got = trained(tmp_path, data_collator=collator, **options)
    assert_same_run(
        got, trained(tmp_path, data=DataArguments(max_seq_length=128, packing=False), **options), tolerance=0
    )


def test_head_and_bias_of_every_kind(tmp_path) -> None:
    """Untied, tied, trained beside an adapter, and with an adapter on the head: the loss is that of the full logits."""
    from peft import LoraConfig, get_peft_model

    def with_rows(**config):
        layers = {name: [5, 77] for name in ("embed_tokens", "lm_head")[: 2 - config["tie_word_embeddings"]]}
        lora = LoraConfig(target_modules=["q_proj"], trainable_token_indices=layers)
        return get_peft_model(tiny.tiny_model(**config), lora)

    kinds = {
        "untied": (lambda: tiny.tiny_model(), True),
        "tied": (lambda: tiny.tiny_model(tie_word_embeddings=True), True),
        "saved": (
            lambda: get_peft_model(
                tiny.tiny_model(), LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"])
            ),
            True,
        ),
        "rows": (lambda: with_rows(tie_word_embeddings=False), True),
        "tied rows": (lambda: with_rows(tie_word_embeddings=True), True),
        "adapted": (lambda: get_peft_model(tiny.tiny_model(), LoraConfig(target_modules=["q_proj", "lm_head"])), True),
    }
    rows = token_rows(3)
    for name, (make, chunked) in kinds.items():
        trainer = make_trainer(tmp_path, model=make(), train=rows)
        assert trainer.scorer.chunked is chunked, name
        trainer.model.eval()
        batch = trainer._prepare_inputs(CausalCollator()([rows]))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        got = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.model.zero_grad()
        assert not name.endswith("rows") or any("trainable_tokens" in n and got[n].norm() > 0 for n in got), name
        nll = []
        for row in rows:
            logits, labels = (
                trainer.model(torch.tensor([row["input_ids"]])).logits[0, :-1],
                torch.tensor(row["labels"])[1:],
            )
            nll.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != -100])
        want = torch.cat(nll).mean()
        want.backward()
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
        for n, p in trainer.model.named_parameters():
            if p.grad is not None:
                assert (got[n] - p.grad).norm() <= 1e-5 * p.grad.norm(), (name, n)


def test_arguments_that_cannot_be_honoured_are_refused_together(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)label_smoothing_factor.*dataloader_drop_last|dataloader_drop_last.*label_smoothing"
    ):
        make_trainer(tmp_path, label_smoothing_factor=0.1, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="max_seq_length"):
        make_trainer(tmp_path, data=DataArguments(max_seq_length=100_000))


def test_the_python_example_trains_and_saves(tmp_path) -> None:
    model = tiny.save_tiny(tmp_path / "model")
    script = runs.ROOT / "examples" / "sft_from_python.py"
    code = [line for line in script.read_text().splitlines() if line and not line.startswith(('"""', "#"))]
    assert len(code) <= 15
    env = {
        "PYTHONPATH": str(runs.ROOT),
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "HF_SFT_CACHE": str(tmp_path / "cache"),
    }
    subprocess.run(
        [sys.executable, script, model, tmp_path / "out"], check=True, env=env, capture_output=True, timeout=120
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert not torch.equal(saved.lm_head.weight, tiny.tiny_model().lm_head.weight)


def test_metrics_on_two_ranks_see_each_document_once(tmp_path) -> None:
    """5, 9 and 11 rows on 2 ranks x 2: the last batches are filled up, and cut again before compute_metrics."""
    script = tmp_path / "metrics.py"
    script.write_text(
        "import sys, json, torch\n"
        f"sys.path[:0] = [{str(runs.ROOT)!r}, {str(runs.ROOT / 'tests')!r}]\n"
        "from test_trainer import make_trainer, token_rows\n"
        "def metrics(p):\n"
        "    kept = p.label_ids[:, 1:] != -100\n"
        "    right = (p.predictions[:, :-1].argmax(-1) == p.label_ids[:, 1:])[kept]\n"
        "    return {'rows': len(p.label_ids), 'mine': float(right.mean()), 'count': int(kept.sum())}\n"
        "t = make_trainer(sys.argv[1], compute_metrics=metrics, per_device_eval_batch_size=2)\n"
        "found = {n: t.evaluate(token_rows(n, seed=n)) for n in (5, 9, 11)}\n"
        "found['predicted'] = len(t.predict(token_rows(9, seed=9)).predictions)\n"
        "if t.is_world_process_zero(): json.dump(found, open(sys.argv[1] + '/found.json', 'w'))\n"
        "torch.distributed.is_initialized() and torch.distributed.destroy_process_group()\n"
    )
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        process = runs.launch([str(script), str(folder)], processes)
        assert (folder / "found.json").exists(), process.stderr
        found.append(json.loads((folder / "found.json").read_text()))
    for rows in ("5", "9", "11"):
        assert found[1][rows]["eval_rows"] == int(rows)
        for key in ("eval_mine", "eval_count", "eval_token_accuracy", "eval_supervised_tokens"):
            assert found[0][rows][key] == found[1][rows][key]
    assert found[0]["predicted"] == found[1]["predicted"] == 9


def test_predict_returns_logits_and_labels(tmp_path) -> None:
    rows = token_rows(5)
    output = make_trainer(tmp_path, per_device_eval_batch_size=2).predict(rows)
    assert output.predictions.shape[0] == output.label_ids.shape[0] == 5 and output.metrics["test_loss"] > 0
    first = tiny.tiny_model()(torch.tensor([rows[0]["input_ids"]])).logits[0].detach().numpy()
    np.testing.assert_allclose(output.predictions[0][: len(first)], first, rtol=1e-5, atol=1e-6)


def test_dropout_does_not_stop_chunking(tmp_path) -> None:
    model = tiny.tiny_model("llama", attention_dropout=0.5).train()
    model.model.embed_tokens.register_forward_hook(lambda m, i, out: torch.nn.functional.dropout(out, 0.5, m.training))
    assert make_trainer(tmp_path, model=model).scorer.chunked and model.training


def test_a_model_from_python_learns_its_pad_token_too(tmp_path) -> None:
    """Where pad is eos, an embedding's padding_idx would keep the end of turn from learning."""
    model = tiny.tiny_model(pad_token_id=256)
    assert model.model.embed_tokens.padding_idx == 256
    trainer = make_trainer(tmp_path, model=model, train=[{"input_ids": [256, 1, 2], "labels": [-100, 1, 2]}])
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch).backward()
    assert model.model.embed_tokens.weight.grad[256].norm() > 0


def test_the_template_of_the_training_is_saved(tmp_path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    data = DataArguments(max_seq_length=128, chat_template="plain")
    trainer = make_trainer(tmp_path, data=data, train=tiny.conversations(8), processing_class=tokenizer, max_steps=1)
    trainer.train()
    trainer.save_model()
    from transformers import AutoTokenizer

    assert (
        "Assistant:" in AutoTokenizer.from_pretrained(tmp_path).chat_template and tokenizer.chat_template == tiny.CHATML
    )


def test_features_of_trainer_work(tmp_path) -> None:
    """Callbacks, several eval sets, epochs, the best model at the end, early stopping."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1
            kwargs["model"].generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0)

    count, evaluation = Count(), {"a": token_rows(3, seed=1), "b": token_rows(4, seed=2)}
    trainer = make_trainer(
        tmp_path, evaluation=evaluation, callbacks=[count, EarlyStoppingCallback(2)], max_steps=-1, num_train_epochs=6,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="a_perplexity",
        save_total_limit=1, learning_rate=1.0, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "eval_a_loss")
    best = int(np.argmin(losses))
    assert count.steps == trainer.state.global_step == 3 * len(losses) and len(losses) == min(6, best + 3)
    assert trainer.state.best_metric == pytest.approx(math.exp(losses[best]), rel=1e-6)
    assert trainer.evaluate(evaluation["a"])["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    half = trained(tmp_path, max_steps=-1, num_train_epochs=1.5)
    assert half.state.global_step == 5 and half.state.epoch == pytest.approx(5 / 3)


def test_activation_checkpointing_and_peft_config_change_only_what_they_say(tmp_path) -> None:
    from peft import LoraConfig

    def options():
        torch.manual_seed(0)
        return {"model": exact(), "peft_config": LoraConfig(r=4, target_modules="all-linear"), "max_steps": 6}

    torch.manual_seed(0)
    want = trained(tmp_path, **options())
    trainable = {name for name, p in want.model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    for reentrant in (True, False):
        checkpointing = {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
        assert_same_run(trained(tmp_path, **options(), **checkpointing), want)


def test_a_line_of_a_users_own_is_left_alone(tmp_path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.log({"loss": 123.0})
    assert logged(trainer) == [123.0]


def test_a_second_trainer_may_choose_another_layout(tmp_path) -> None:
    model = tiny.tiny_model()
    for choice, data in (
        ("segment", DATA),
        ("dense", DATA),
        ("auto", DataArguments(max_seq_length=128, packing=False)),
    ):
        trainer = make_trainer(tmp_path, model=model, attention_backend=choice, data=data)
        assert trainer.layout.name == ("padded" if choice == "auto" else choice)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokenizer": None}, "use processing_class"),
        ({"max_seq_length": 128}, "DataArguments"),
        ({"compute_loss_func": print}, "overrides compute_loss"),
        ({"args": {"output_dir": "x"}}, "args is a dict"),
        ({"model": None}, "model is None"),
        ({"train_dataset": {"train": []}}, "dict of train"),
        ({"train_dataset": [{"input_ids": [1, 300], "labels": [1, 300]}]}, "token id 300.*259 embedding rows"),
    ],
)
def test_wrong_calls_get_a_sentence(tmp_path, options: dict, message: str) -> None:
    defaults = {"model": tiny.tiny_model(), "args": TrainingArguments(output_dir=str(tmp_path), use_cpu=True)}
    with pytest.raises(ValueError, match=message):
        SFTTrainer(**{**defaults, "train_dataset": token_rows(3), **options})


def test_an_adapter_on_an_adapter_and_bfloat16_weights(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="leave out one"):
        make_trainer(tmp_path, model=get_peft_model(tiny.tiny_model(), config), peft_config=config)
    with pytest.warns(UserWarning, match=r"trained in torch.bfloat16.*hardly move"):
        make_trainer(tmp_path, model=tiny.tiny_model().bfloat16())


def test_the_seed_draws_the_adapter_too(tmp_path) -> None:
    from peft import LoraConfig

    def first_rows(seed: int) -> torch.Tensor:
        config = LoraConfig(r=4, target_modules=["q_proj"])
        model = make_trainer(tmp_path, peft_config=config, seed=seed).model
        return next(p for name, p in model.named_parameters() if "lora_A" in name).detach().clone()

    assert torch.equal(first_rows(1), first_rows(1)) and not torch.equal(first_rows(1), first_rows(2))


def test_conversations_without_a_tokenizer_and_collators_that_do_not_pad(tmp_path) -> None:
    from transformers import DataCollatorForLanguageModeling

    with pytest.raises(ValueError, match="pass it as processing_class"):
        make_trainer(tmp_path, train=tiny.conversations(3))
    collator = DataCollatorForLanguageModeling(tiny.tiny_tokenizer(), mlm=False)
    with pytest.raises(ValueError, match="DataCollatorForSeq2Seq"):
        make_trainer(tmp_path, data_collator=collator).train()


def test_a_sharding_engine_begins_with_the_training(tmp_path) -> None:
    trainer = make_trainer(tmp_path, evaluation=token_rows(3))
    with mock.patch.object(SFTTrainer, "is_sharded", True), pytest.raises(ValueError, match="evaluate after train"):
        trainer.evaluate()
