"""DPO: what is learned from pairs is what plain code on one pair at a time learns, whatever layout, cut or reference."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
import torch
from test_trainer import OF_TRAINER, arguments, assert_same_run, logged

from hf_sft.arguments import DataArguments, DPOArguments
from hf_sft.collators import PairCollator
from hf_sft.preference_losses import PairLoss
from hf_sft.training.dpo import DPOTrainer

DATA = DataArguments(task_type="dpo", max_seq_length=64)
LOSSES = {
    "sigmoid": {},
    "cdpo": {"label_smoothing": 0.2},
    "normalized": {"dpo_length_normalized": True},
    "with_sft": {"dpo_sft_weight": 0.7},
    "ipo": {"dpo_loss_type": "ipo", "dpo_beta": 0.3},
    "hinge": {"dpo_loss_type": "hinge"},
    "robust": {"dpo_loss_type": "robust", "label_smoothing": 0.1},
    "orpo": {"dpo_loss_type": "orpo"},
    "simpo": {"dpo_loss_type": "simpo", "dpo_beta": 2.0},
}  # fmt: skip


def token_pairs(count: int, seed: int = 0) -> list[dict]:
    """Tokenised pairs of unequal lengths."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(0, 255, rng.integers(low, high)).tolist()

    return [{"prompt_ids": ids(1, 20), "chosen_ids": ids(1, 30), "rejected_ids": ids(1, 30)} for _ in range(count)]


def make_trainer(folder, model=None, train=24, evaluation=None, data=DATA, dpo=None, **options) -> DPOTrainer:
    of_trainer = {name: options.pop(name) for name in list(options) if name in {*OF_TRAINER, "ref_model"}}
    train = token_pairs(train) if isinstance(train, int) else train
    model = exact() if model is None else model
    args = arguments(folder, **{"max_steps": 6, **options})
    return DPOTrainer(
        model, args, train_dataset=train, eval_dataset=evaluation, data_args=data, dpo_args=dpo and DPOArguments(**dpo),
        **of_trainer,
    )  # fmt: skip


def trained(folder, **options) -> DPOTrainer:
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trainer


def exact(family: str = "llama", seed: int = 0, **config) -> torch.nn.Module:
    return tiny.tiny_model(family, seed, **config).double()


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def plain_loss(model, reference, pairs: list[dict], dpo: DPOArguments) -> torch.Tensor:
    """One answer at a time, from whole logits; the formulas are proved in test_preference_losses.py."""

    def answer(of, pair: dict, side: str) -> torch.Tensor:
        ids = torch.tensor(pair["prompt_ids"] + pair[side])
        logps = of(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        return logps.gather(1, ids[1:, None])[len(pair["prompt_ids"]) - 1 :].sum()

    loss = PairLoss(dpo.dpo_loss_type, dpo.dpo_beta, dpo.label_smoothing, dpo.simpo_gamma, dpo.dpo_length_normalized)
    losses, chosen = [], torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        logps = torch.stack([answer(model, pair, side) for side in ("chosen_ids", "rejected_ids")])
        with torch.no_grad():
            held = torch.stack([answer(reference, pair, side) for side in ("chosen_ids", "rejected_ids")])
        tokens = torch.tensor([len(pair["chosen_ids"]), len(pair["rejected_ids"])])
        losses.append(loss.losses(loss.rewards(logps, held if loss.needs_reference else None, tokens)))
        chosen = chosen - logps[0]
    auxiliary = dpo.dpo_sft_weight + (dpo.dpo_loss_type == "orpo")
    return torch.cat(losses).mean() + auxiliary * chosen / sum(len(pair["chosen_ids"]) for pair in pairs)


def one_batch(trainer: DPOTrainer) -> torch.Tensor:
    """The loss of all of the training pairs as one batch; gradients stay in the model."""
    rows = [trainer.train_dataset[0, number] for number in range(len(trainer.train_dataset))]
    batch = PairCollator(trainer.layout.backend is not None, 0)(rows)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("packing", [None, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_plain_code(tmp_path, name, packing) -> None:
    """In float64, to the last digits; the policy is not the reference."""
    pairs, dpo = token_pairs(7, seed=3), DPOArguments(**LOSSES[name])
    policy, reference = exact(seed=1), exact(seed=2)
    data = DataArguments(task_type="dpo", max_seq_length=64, packing=packing)
    with_reference = {"ref_model": reference} if PairLoss(dpo.dpo_loss_type).needs_reference else {}
    trainer = make_trainer(
        tmp_path, model=copy.deepcopy(policy), train=pairs, data=data, dpo=LOSSES[name], **with_reference
    )
    got = one_batch(trainer)
    want = plain_loss(policy, reference, pairs, dpo)
    want.backward()
    torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=0)
    for (key, a), b in zip(trainer.model.named_parameters(), policy.parameters(), strict=True):
        scale = b.grad.abs().max().item()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11 * scale, msg=lambda text: f"{key}: {text}")  # noqa: B023


@pytest.mark.parametrize("family", ["gemma2", "mistral", "mamba"])
def test_families(tmp_path, family) -> None:
    """Soft caps, sliding windows, and a model that cannot be packed."""
    pairs = token_pairs(5, seed=4)
    policy = exact(family, seed=1)
    trainer = make_trainer(tmp_path, model=copy.deepcopy(policy), train=pairs, ref_model=exact(family, seed=2))
    assert (trainer.layout.backend is None) == (family == "mamba")
    got = one_batch(trainer)
    want = plain_loss(policy, exact(family, seed=2), pairs, DPOArguments())
    want.backward()
    rounding = {"mistral": 1e-11, "gemma2": 1e-7, "mamba": 1e-6}[family]  # float32 in Gemma's softmax and Mamba's scan
    torch.testing.assert_close(got, want.detach(), rtol=rounding, atol=0)
    for a, b in zip(trainer.model.parameters(), policy.parameters(), strict=True):
        scale = b.grad.abs().max().item()
        torch.testing.assert_close(a.grad, b.grad, rtol=100 * rounding, atol=10 * rounding * scale)


@pytest.mark.parametrize("name", ["sigmoid", "normalized", "with_sft", "ipo", "hinge", "robust"])
def test_trl_computes_the_same(tmp_path, name) -> None:
    """Loss and gradients of TRL's DPOTrainer on the same pairs, policy and reference, in float64. (Its sigmoid has no label
    smoothing.)"""
    trl = pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    settings = LOSSES[name]
    kinds = ["sigmoid_norm" if settings.get("dpo_length_normalized") else settings.get("dpo_loss_type", "sigmoid")]
    weights = [1.0]
    if settings.get("dpo_sft_weight"):
        kinds, weights = [*kinds, "sft"], [1.0, settings["dpo_sft_weight"]]
    pairs = token_pairs(7, seed=3)
    policy = exact(seed=1)
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), loss_type=kinds, loss_weights=weights, beta=settings.get("dpo_beta", 0.1),
        label_smoothing=settings.get("label_smoothing", 0.0), use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False,
    )  # fmt: skip
    from datasets import Dataset

    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    theirs = trl.DPOTrainer(
        model=copy.deepcopy(policy), ref_model=exact(seed=2), args=config, train_dataset=text,
        processing_class=tiny.tiny_tokenizer(),
    )  # fmt: skip
    want = theirs.compute_loss(theirs.model, DataCollatorForPreference(pad_token_id=0)(pairs))
    want.backward()
    trainer = make_trainer(tmp_path, model=copy.deepcopy(policy), train=pairs, dpo=settings, ref_model=exact(seed=2))
    got = one_batch(trainer)
    # TRL takes log-probabilities in float32 for some heads: what is left beyond that would be another loss.
    torch.testing.assert_close(got, want.detach().double(), rtol=1e-6, atol=0)
    gradients = {key: value.grad for key, value in theirs.model.named_parameters()}
    for key, value in trainer.model.named_parameters():
        other = gradients[key]
        torch.testing.assert_close(value.grad, other, rtol=1e-4, atol=1e-6 * other.abs().max().item())


# ---- the reference ----


@pytest.mark.parametrize("packing", [None, False], ids=["packed", "padded"])
def test_references_agree(tmp_path, packing) -> None:
    """The base with the adapter off, a copy of it, and its log-probabilities computed beforehand: the same training."""
    data = DataArguments(task_type="dpo", max_seq_length=64, packing=packing)
    kinds = {"adapter_off": {}, "precomputed": {}, "model": {"ref_model": exact()}}
    got = {
        kind: trained(
            tmp_path / kind, dpo={"dpo_reference": kind}, peft_config=lora(), data=data, train=token_pairs(4),
            learning_rate=3e-2, evaluation=token_pairs(5, seed=9), **more
        )
        for kind, more in kinds.items()
    }  # fmt: skip
    for other in ("precomputed", "model"):
        assert_same_run(got[other], got["adapter_off"], tolerance=1e-9)
        for key in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
            np.testing.assert_allclose(logged(got[other], key), logged(got["adapter_off"], key), rtol=1e-6, atol=1e-9)
    evaluations = [trainer.evaluate() for trainer in got.values()]
    for one in evaluations[1:]:
        assert one["eval_rewards/margins"] == pytest.approx(evaluations[0]["eval_rewards/margins"], rel=1e-8)
    assert logged(got["model"], "rewards/margins")[0] == pytest.approx(0, abs=1e-12), "it begins as its reference"
    assert max(logged(got["model"], "rewards/margins")) > 0.05


def test_full_training_from_a_copy_and_from_the_cache(tmp_path) -> None:
    copied = trained(tmp_path / "a", dpo={"dpo_reference": "model"}, ref_model=exact())
    computed = trained(tmp_path / "b")  # auto
    assert_same_run(computed, copied, tolerance=1e-9)


def test_auto_says_what_it_chose(tmp_path, caplog) -> None:
    cases = [
        ({"peft_config": lora()}, "the reference is adapter_off (the adapter is new)"),
        ({}, "the reference is precomputed (the model has no adapter)"),
        ({"ref_model": exact()}, "the reference is model (one is named)"),
        ({"peft_config": lora(bias="all"), "model": exact("qwen2")}, "precomputed (the adapter trains biases"),
        ({"peft_config": lora(modules_to_save=["lm_head"])}, "precomputed (the adapter has a copy of the whole head"),
    ]
    for options, sentence in cases:
        caplog.clear()
        with caplog.at_level("INFO", logger="hf_sft"):
            make_trainer(tmp_path, **options)
        assert sentence in caplog.text
    model = make_trainer(tmp_path, peft_config=lora()).model
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(1.0)
    caplog.clear()
    with caplog.at_level("INFO", logger="hf_sft"):
        make_trainer(tmp_path, model=model)
    assert "the reference is precomputed (the adapter has been trained before)" in caplog.text


def test_a_head_of_the_adapters_own_is_compared_with_the_base(tmp_path) -> None:
    """modules_to_save with the head, and trained biases: precomputed equals a second model."""
    for number, options in enumerate([{"modules_to_save": ["lm_head"]}, {"bias": "all"}]):
        got = trained(tmp_path / f"{number}a", model=exact("qwen2"), peft_config=lora(**options))
        want = trained(
            tmp_path / f"{number}b", model=exact("qwen2"), peft_config=lora(**options), ref_model=exact("qwen2")
        )
        assert_same_run(got, want, tolerance=1e-9)


@pytest.mark.parametrize("kind", ["adapter_off", "model", "precomputed"])
def test_dropout_is_off_in_the_reference(tmp_path, kind) -> None:
    """The base has dropout, and so has the policy while it learns."""
    model = exact("gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)
    with_reference = {"ref_model": copy.deepcopy(model).train()} if kind == "model" else {}
    trainer = make_trainer(tmp_path, model=model, peft_config=lora(), dpo={"dpo_reference": kind}, **with_reference)
    if kind == "precomputed":
        computed(trainer)
    trainer.model.train()
    batch = PairCollator(trainer.layout.backend is not None, 0)([trainer.train_dataset[0, 0]])
    both = [trainer.reference.logps(trainer.model, batch) for _ in range(2)]
    assert torch.equal(*both) and trainer.model.training
    quiet = exact("gpt2")
    want = -plain_loss(quiet, quiet, token_pairs(24)[:1], DPOArguments(dpo_sft_weight=1.0)) + np.log(2)
    row = next(n for n, members in enumerate(trainer.train_dataset.bins) if 0 in members)
    place = trainer.train_dataset.bins[row].index(0)
    batch = PairCollator(trainer.layout.backend is not None, 0)([[trainer.train_dataset[0, row][place]]])
    got = trainer.reference.logps(trainer.model, batch)[0] / len(token_pairs(24)[0]["chosen_ids"])
    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-6, atol=0)


def test_a_head_that_is_not_scored_in_chunks(tmp_path) -> None:
    """Its logits are whole for the scored rows: the same loss and gradients."""
    found = []
    for chunked in (True, False):
        trainer = make_trainer(
            tmp_path, model=exact(seed=1), ref_model=exact(seed=2), train=5, dpo={"dpo_sft_weight": 0.7}
        )
        assert trainer.scorer.chunked
        trainer.scorer.chunked = chunked
        loss = one_batch(trainer)
        found.append([loss, *(parameter.grad for parameter in trainer.model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ---- how a batch is cut ----


@pytest.mark.parametrize("name", ["sigmoid", "with_sft", "orpo"])
def test_accumulation_does_not_matter(tmp_path, name) -> None:
    options = {"peft_config": lora(), "dpo": LOSSES[name]}
    whole = trained(tmp_path / "a", **options)
    for batch in (1, 2):
        cut = trained(
            tmp_path / f"b{batch}", per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch, **options
        )
        assert_same_run(cut, whole, tolerance=1e-9)


def test_activation_checkpointing_changes_nothing(tmp_path) -> None:
    plain = trained(tmp_path / "a", peft_config=lora())
    checked = trained(tmp_path / "b", peft_config=lora(), activation_checkpointing=True)
    assert_same_run(checked, plain, tolerance=1e-9)


def test_evaluation_counts_pairs_once(tmp_path) -> None:
    held_out = token_pairs(11, seed=8)
    found = []
    for batch in (1, 3, 11):
        trainer = make_trainer(
            tmp_path,
            model=exact(seed=1),
            ref_model=exact(seed=2),
            evaluation=held_out,
            per_device_eval_batch_size=batch,
        )
        found.append({k: v for k, v in trainer.evaluate().items() if "per_second" not in k and "time" not in k})
    for one in found[1:]:
        assert one == pytest.approx(found[0], rel=1e-9)
    assert found[0]["eval_pairs"] == 11
    want = plain_loss(exact(seed=1), exact(seed=2), held_out, DPOArguments())
    assert found[0]["eval_loss"] == pytest.approx(want.item(), rel=1e-10)
    assert (
        found[0]["eval_rewards/accuracies_low"]
        < found[0]["eval_rewards/accuracies"]
        < found[0]["eval_rewards/accuracies_high"]
    )


# ---- resuming ----


def test_resumed_is_undisturbed(tmp_path) -> None:
    """With precomputed log-probabilities, which are those of the model that training began with."""
    whole = trained(tmp_path / "a", evaluation=token_pairs(4, seed=9))
    trained(tmp_path / "b", max_steps=6, save_strategy="steps", save_steps=3)
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    resumed = make_trainer(tmp_path / "b", evaluation=token_pairs(4, seed=9))
    resumed.train(resume_from_checkpoint="auto")
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


def test_a_resume_without_the_cache(tmp_path, monkeypatch, caplog) -> None:
    """The run keeps a copy, on which a damaged cache falls back; without any it cannot go on."""
    whole = trained(tmp_path / "a")
    trained(tmp_path / "b", save_strategy="steps", save_steps=3)
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    shutil.copytree(tmp_path / "b", tmp_path / "c", symlinks=True)
    for file in Path(os.environ["HF_SFT_CACHE"]).rglob("reference_logps.npy"):
        file.write_bytes(b"no array")
    resumed = make_trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint="auto")
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    assert "is damaged and is not used" in caplog.text
    monkeypatch.setenv("HF_SFT_CACHE", str(tmp_path / "empty"))
    shutil.rmtree(tmp_path / "c" / "reference_logps")
    with pytest.raises(ValueError, match=r"as training found it are kept in none of .*start in a new output_dir"):
        make_trainer(tmp_path / "c").train(resume_from_checkpoint="auto")


def computed(trainer: DPOTrainer) -> np.ndarray:
    """The precomputed log-probabilities of the training pairs."""
    trainer.reference.remember(trainer.model)
    trainer.reference.prepare(trainer.model, [trainer.train_dataset], untrained=True)
    return trainer.train_dataset.notes["reference_logps"]


def test_what_is_kept_belongs_to_model_pairs_and_settings(tmp_path) -> None:
    """Whatever a log-probability depends on makes another entry; the same comes from the cache."""
    from peft import get_peft_model

    pairs = token_pairs(3, seed=1)
    model = exact()
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0}
    other = type(model)(config).double()
    other.load_state_dict(model.state_dict())

    def adapted(alpha: int):
        wrapped = get_peft_model(exact(), lora(lora_alpha=alpha))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                parameter.fill_(0.01) if "lora_B" in name else None
        return wrapped

    def relabelled(pair: dict, labels: slice) -> dict:
        ids = pair["prompt_ids"] + pair["chosen_ids"] + pair["prompt_ids"] + pair["rejected_ids"]
        learned = [-100] * len(ids)
        learned[labels] = ids[labels]
        learned[-1] = ids[-1]
        return {
            "input_ids": ids,
            "labels": learned,
            "rejected_start": np.int64(len(pair["prompt_ids"] + pair["chosen_ids"])),
        }

    long = [{"prompt_ids": [1, 2], "chosen_ids": list(range(9)), "rejected_ids": [3]}]
    moved = [{**relabelled(long[0], slice(3, 9)), "rejected_start": 10}]
    cases = {
        "weights": ({"model": exact(seed=1)}, {"model": exact(seed=2)}),
        "config": ({"model": model}, {"model": other}),
        "scaling": ({"model": adapted(4)}, {"model": adapted(64)}),
        "pairs": ({"train": pairs}, {"train": pairs[::-1]}),
        "labels": ({"train": [relabelled(long[0], slice(3, 9))]}, {"train": [relabelled(long[0], slice(5, 9))]}),
        "borders": ({"train": [relabelled(long[0], slice(3, 9))]}, {"train": moved}),
    }
    for name, (first, second) in cases.items():
        made = [
            make_trainer(tmp_path / f"{name}{n}", dpo={"dpo_reference": "precomputed"}, **{"train": pairs, **options})
            for n, options in enumerate((first, second))
        ]
        kept = [computed(trainer) for trainer in made]
        assert not np.array_equal(*kept), name
        again = make_trainer(tmp_path / f"{name}2", dpo={"dpo_reference": "precomputed"}, **{"train": pairs, **first})
        again.reference.compute = None  # what is kept must do
        assert np.array_equal(computed(again), kept[0]), name
    one = make_trainer(tmp_path / "x", train=pairs, dpo={"dpo_reference": "precomputed"})
    padded = DataArguments(task_type="dpo", max_seq_length=64, packing=False)
    two = make_trainer(tmp_path / "y", train=pairs, data=padded, dpo={"dpo_reference": "precomputed"})
    computed(one)
    two.reference.compute = None
    with pytest.raises(TypeError):
        computed(two)


def test_a_trained_model_is_never_its_own_reference(tmp_path) -> None:
    """Training on with a new data set, in the same process."""
    trainer = trained(tmp_path)
    trainer.eval_dataset = trainer._bins(token_pairs(3, seed=7), None, evaluation=True)
    with pytest.raises(ValueError, match="give all data sets to the trainer before it trains"):
        trainer.train()


def test_new_adapters_are_told_from_trained_ones() -> None:
    from peft import get_peft_model

    from hf_sft.training.reference import is_new_adapter

    settings = [{"trainable_token_indices": {"embed_tokens": [3, 5]}}, {"modules_to_save": ["embed_tokens"]}]
    for extra, moved in zip(settings, ("trainable_tokens_delta", "modules_to_save"), strict=True):
        model = get_peft_model(exact(), lora(**extra))
        assert is_new_adapter(model)
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if moved in n).add_(0.1)
        assert not is_new_adapter(model)


def test_a_reference_that_is_named(tmp_path) -> None:
    """From Python as from the command line; another vocabulary is refused."""
    other = tiny.save_tiny(tmp_path / "other", seed=7)
    named = make_trainer(tmp_path, model=tiny.tiny_model(), dpo={"reference_model_name_or_path": other})
    given = make_trainer(tmp_path, model=tiny.tiny_model(), ref_model=tiny.tiny_model(seed=7))
    batch = PairCollator(True, 0)([named.train_dataset[0, 0]])
    assert torch.equal(*(trainer.reference.logps(trainer.model, batch) for trainer in (named, given)))
    with pytest.raises(ValueError, match="300 rows in its vocabulary and the model 259"):
        make_trainer(tmp_path, ref_model=exact(vocab_size=300))


def test_a_data_set_that_comes_too_late(tmp_path) -> None:
    trainer = trained(tmp_path)
    with pytest.raises(ValueError, match="dpo_reference is precomputed, and the log-probabilities"):
        trainer.evaluate(token_pairs(3, seed=7))


# ---- data ----


def test_prompts_are_cut_in_front_and_answers_behind(tmp_path) -> None:
    """The end of an answer that is cut is not taught, the last tokens of the prompt stay."""
    tokenizer = tiny.tiny_tokenizer()
    record = {"prompt": "0123456789" * 3, "chosen": "abc" * 20, "rejected": "no"}
    data = DataArguments(task_type="dpo", max_seq_length=40, overlength="truncate")
    trainer = make_trainer(
        tmp_path, train=[record], data=data, dpo={"max_prompt_length": 24}, processing_class=tokenizer
    )
    (row,) = trainer.train_dataset[0, 0]
    row = {**row, "input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()}
    chosen, rejected = row["input_ids"][: row["rejected_start"]], row["input_ids"][row["rejected_start"] :]
    prompt = "9" + "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(chosen).endswith(prompt + "abcabcabcabcabca") and len(chosen) == 40
    assert tokenizer.decode(rejected).endswith(prompt + "no<|im_end|>\n")
    labels = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(labels) == "abcabcabcabcabca" + "no<|im_end|>"
    assert chosen[:24] == rejected[:24]


def test_the_most_tokens_of_an_answer(tmp_path) -> None:
    """The first ones stay, and an answer that is cut is counted."""
    pairs = [{"prompt_ids": [9] * 5, "chosen_ids": list(range(10)), "rejected_ids": [1, 2, 3]}]
    trainer = make_trainer(tmp_path, train=pairs, dpo={"max_answer_length": 4, "max_prompt_length": 2})
    (row,) = trainer.train_dataset[0, 0]
    assert row["input_ids"].tolist() == [9, 9, 0, 1, 2, 3, 9, 9, 1, 2, 3] and row["rejected_start"] == 6
    assert [label for label in row["labels"].tolist() if label != -100] == [0, 1, 2, 3, 1, 2, 3]


def test_a_tie_counts_half(tmp_path) -> None:
    trainer = make_trainer(tmp_path, model=exact(), ref_model=exact(), evaluation=token_pairs(6, seed=2))
    results = trainer.evaluate()
    assert results["eval_rewards/accuracies"] == 0.5 and results["eval_loss"] == pytest.approx(np.log(2), rel=1e-12)


def test_what_is_learned_of_a_conversation(tmp_path) -> None:
    """Turns of the prompt are context, those of the answer are learned."""
    tokenizer = tiny.tiny_tokenizer()
    record = {
        "prompt": [
            {"role": "user", "content": "one"}, {"role": "assistant", "content": "earlier"}, {"role": "user", "content": "two"},
        ],
        "chosen": [{"role": "assistant", "content": "yes"}], "rejected": [{"role": "assistant", "content": "no"}],
    }  # fmt: skip
    trainer = make_trainer(
        tmp_path, train=[record], data=DataArguments(task_type="dpo", max_seq_length=128), processing_class=tokenizer
    )
    (row,) = trainer.train_dataset[0, 0]
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "yes<|im_end|>no<|im_end|>"


def test_pairs_of_no_use_are_counted(tmp_path) -> None:
    from hf_sft.data.pipeline import prepare_examples

    tokenizer = tiny.tiny_tokenizer()
    records = [
        {"prompt": "a", "chosen": "good", "rejected": "bad"},
        {"prompt": "a", "chosen": "x" * 90, "rejected": "bad"},  # too long
        {"prompt": "a", "chosen": "y" * 90, "rejected": "y" * 91},  # the same once it is cut
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": "a", "chosen": "only"},
    ]
    options = {"task_type": "dpo", "max_seq_length": 64, "bad_records": "skip"}
    dropped = prepare_examples(records, tokenizer, data=DataArguments(**options)).report
    assert (dropped["kept"], dropped["dropped"]["overlength"], dropped["bad"]["count"]) == (1, 2, 2)
    assert dropped["longest"] <= 64 and dropped["formats"] == {"preference": 3}
    cut = prepare_examples(records, tokenizer, data=DataArguments(**options, overlength="truncate")).report
    assert (cut["kept"], cut["truncated"], cut["dropped"]["no_supervised_token"]) == (2, 1, 1)
    with pytest.raises(
        ValueError, match=r"a side has .* tokens, but max_seq_length is 64; raise it, set max_prompt_length"
    ):
        prepare_examples(records, tokenizer, data=DataArguments(**options, overlength="error"))


@pytest.mark.parametrize("live", ["streaming", "lazy_preprocess"])
def test_live_data(tmp_path, live) -> None:
    options: dict = {"streaming": {"streaming": True}, "lazy_preprocess": {"lazy_preprocess": True}}[live]
    data = DataArguments(task_type="dpo", max_seq_length=64, **options)
    trainer = trained(tmp_path, data=data, peft_config=lora())
    assert logged(trainer)[-1] < logged(trainer)[0] == pytest.approx(np.log(2), abs=1e-9)
    with pytest.raises(ValueError, match="dpo_reference is precomputed, and the training data are tokenised while"):
        make_trainer(tmp_path, data=data, dpo={"dpo_reference": "precomputed"})


# ---- train.py ----


def write_pairs(folder: Path, count: int = 24) -> str:
    records = [
        {"prompt": f"Question {n}?", "chosen": f"A good answer, {n * n}.", "rejected": "No idea." + "." * (n % 5)}
        for n in range(count)
    ]
    return runs.write_jsonl(folder / "pairs.jsonl", records)


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_train_py(tmp_path, mode) -> None:
    model = tiny.save_tiny(tmp_path / "wide", hidden_size=64, intermediate_size=64)
    values = runs.arguments(
        tmp_path, model_name_or_path=model, train_mode=mode, task_type="dpo", train_file=write_pairs(tmp_path), eval_split=4,
        eval_strategy="epoch", metric_for_best_model="rewards/accuracies", load_best_model_at_end=True, save_strategy="epoch",
        num_train_epochs=3, max_steps=-1, warmup_steps=0,
    )  # fmt: skip
    folder = runs.train(values)
    assert runs.history(folder)[0] == pytest.approx(np.log(2), abs=1e-2 if mode == "qlora" else 1e-3)
    assert runs.history(folder, "rewards/margins")[-1] > 0.2
    results = json.loads((folder / "eval_results.json").read_text())
    assert (
        results["eval_pairs"] == 4 and 0 <= results["eval_rewards/accuracies_low"] <= results["eval_rewards/accuracies"]
    )
    record = json.loads((folder / "args.json").read_text())
    assert record["preferences"]["dpo_beta"] == 0.1 and record["resolved"]["reference"] == (
        "precomputed" if mode == "full" else "adapter_off"
    )
    report = json.loads((folder / "data_report.json").read_text())
    assert report["train"]["records"] == 20 and report["train"]["formats"] == {"preference": 20}
    assert list(folder.glob("*.safetensors"))


def test_wrong_settings(tmp_path) -> None:
    from hf_sft.parsing import ArgumentsError, parse_args

    base = {"model_name_or_path": "m", "train_file": "d.jsonl", "output_dir": str(tmp_path / "o"), "task_type": "dpo"}
    for changes, sentence in [
        ({"dpo_beta": 0}, "dpo_beta is 0: use a positive number"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5: the share of wrong preferences lies in"),
        ({"dpo_loss_type": "ipo", "label_smoothing": 0.1}, "dpo_loss_type ipo knows none"),
        ({"dpo_loss_type": "orpo", "dpo_reference": "model"}, "dpo_loss_type orpo needs no reference"),
        ({"dpo_reference": "adapter_off"}, "train_mode is full, which has no adapter"),
        ({"dpo_reference": "precomputed", "reference_model_name_or_path": "x"}, "leave one of them out"),
        ({"simpo_gamma": 1}, "simpo_gamma belongs to dpo_loss_type simpo"),
        ({"max_prompt_length": 4096}, "it lies between 1 and max_seq_length - 1"),
        ({"objective": "wedlm"}, "preferences are learned with objective causal"),
        ({"train_on": "all"}, "which compares the answers alone"),
        ({"data_format": "alpaca"}, "which reads preference pairs"),
        ({"task_type": "sft", "dpo_beta": 0.2}, "dpo_beta belongs to task_type dpo"),
        ({"metric_for_best_model": "perplexity"}, "metric_for_best_model is 'perplexity'"),
    ]:  # fmt: skip
        with pytest.raises(ArgumentsError) as caught:
            parse_args(runs.words({**base, **changes}))
        assert sentence in str(caught.value)


def test_wrong_use_from_python(tmp_path) -> None:
    from peft import PromptTuningConfig

    other = exact("qwen2")
    model = exact()
    for options, sentence in [
        ({"compute_metrics": len}, "DPOTrainer takes no compute_metrics"),
        ({"ref_model": other}, "the reference must be of the same architecture"),
        ({"model": model, "ref_model": model}, "ref_model is the model that is trained"),
        ({"ref_model": exact(), "dpo": {"dpo_reference": "precomputed"}}, "ref_model is given and dpo_reference is precomputed"),
        ({"dpo": {"dpo_reference": "adapter_off"}}, "dpo_reference is adapter_off, and the model has no adapter"),
        ({"dpo": {"dpo_reference": "model"}}, "the model has no name to load it again by"),
        ({"data": DataArguments(task_type="pretrain")}, "data_args.task_type is 'pretrain', and this trainer is for dpo"),
        ({"dpo": {"dpo_loss_type": "orpo"}, "ref_model": other}, "dpo_loss_type orpo needs no reference"),
        ({"dpo": {"reference_model_name_or_path": "x"}, "ref_model": other}, "are both given"),
        ({"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}, "tokens of its own before each row"),
        ({"dpo": {"dpo_loss_type": "kto"}}, "dpo_loss_type is 'kto'"),
        ({"train": [{"input_ids": [1], "labels": [1]}]}, "chosen and rejected are missing"),
        ({"train": [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [999]}]}, "999"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            make_trainer(tmp_path, **options)


# ---- several processes ----


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path) -> None:
    """DDP, ZeRO-2, ZeRO-3 and FSDP2; adapter off and precomputed."""
    from test_engines import ENGINES, LORA, WITHIN, furthest, launch

    data = write_pairs(tmp_path)
    runs.arguments(tmp_path)  # the model
    cases = {
        "lora": {**LORA, "dpo_reference": "adapter_off"},
        "cached": {**LORA, "dpo_reference": "precomputed"},
        "full": {"dpo_sft_weight": 0.5},
        "other": {"model_name_or_path": tiny.save_tiny(tmp_path / "other", seed=9)},  # with the same cache
    }

    def values(name: str, engine: str, processes: int) -> dict:
        return runs.arguments(
            tmp_path, task_type="dpo", train_file=data, eval_file=data, max_eval_samples=5, max_steps=6,
            per_device_train_batch_size=2 // processes, gradient_accumulation_steps=2,
            data_cache_dir=str(tmp_path / f"cache-{engine}"), output_dir=str(tmp_path / engine / name),
            **ENGINES.get(engine, {}), **cases[name],
        )  # fmt: skip

    launch(tmp_path, [values(name, "one", 1) for name in cases], 1)
    for engine in ("ddp", "zero2", "zero3", "fsdp2"):
        launch(tmp_path, [values(name, engine, 2) for name in cases], 2)
        for name in cases:
            one, two = tmp_path / "one" / name, tmp_path / engine / name
            for key in ("loss", "grad_norm", "rewards/margins"):
                before, after = (torch.tensor(runs.history(folder, key)) for folder in (one, two))
                torch.testing.assert_close(after, before, rtol=0, atol=WITHIN, msg=f"{engine} {name} {key}")
            assert furthest(runs.weights(one), runs.weights(two)) <= WITHIN
            if name != "full":
                assert runs.history(two)[0] == pytest.approx(np.log(2), abs=1e-5), "the reference is the model's own"
            results = [json.loads((folder / "eval_results.json").read_text()) for folder in (one, two)]
            assert results[1]["eval_rewards/margins"] == pytest.approx(results[0]["eval_rewards/margins"], abs=1e-4)
    assert runs.history(tmp_path / "one" / "lora", "rewards/margins")[-1] > 0.1
