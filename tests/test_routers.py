"""The load-balancing loss of mixtures of experts: its value, its gradient, its weight in a step, its place in the log."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tiny
import torch
from test_trainer import assert_same_run, logged, make_trainer, token_rows, trained

from hf_sft.arguments import DataArguments
from hf_sft.models.routers import RouterRecorder

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]


def recorded(model, **inputs) -> tuple[RouterRecorder, list[torch.Tensor]]:
    recorder = RouterRecorder(model)
    with recorder.recording() as logits:
        model(use_cache=False, **inputs)
    return recorder, logits


@pytest.mark.parametrize("family", MIXTURES)
def test_the_loss_is_transformers_own(family) -> None:
    """With padding, and without any; values and gradients."""
    model = tiny.tiny_model(family)
    ids = torch.randint(255, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 12:] = mask[2, 5:] = 0
    for padding in (None, mask):
        model.zero_grad()
        want = model(input_ids=ids, attention_mask=padding, output_router_logits=True, use_cache=False).aux_loss
        want.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        recorder, logits = recorded(model, input_ids=ids, attention_mask=padding)
        got = recorder.loss(logits, padding)
        got.backward()
        assert recorder.routers == 2 and logits[0].shape == (60, 4)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys() and found
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_balanced_routers_lose_k_and_a_single_expert_loses_most() -> None:
    recorder = RouterRecorder(tiny.tiny_model("mixtral"))
    assert recorder.loss([torch.zeros(8, 4)]).item() == pytest.approx(2)  # k
    one = torch.tensor([[50.0, 0.0, -50.0, -50.0]]).expand(8, 4)
    assert recorder.loss([one]).item() == pytest.approx(4)  # E times the probability of 1


def test_models_without_routers() -> None:
    assert RouterRecorder(tiny.tiny_model()).routers == 0


@pytest.mark.parametrize("packing", [None, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_step_adds_the_mean_over_its_micro_batches(tmp_path, family, packing) -> None:
    """Gradients of a step of two micro-batches: the token loss plus coefficient * mean of their router losses."""
    data = DataArguments(max_seq_length=128, packing=packing)
    model = tiny.tiny_model(family)
    options = dict(data=data, train=9, per_device_train_batch_size=2)
    trainer = make_trainer(tmp_path, model=copy.deepcopy(model), router_aux_loss_coef=0.5, **options)
    bare = make_trainer(tmp_path, model=model, router_aux_loss_coef=0, **options)
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()][:2]
    items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert items[-1] == 2
    want = torch.zeros(())
    for batch in batches:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).backward()
        recorder = RouterRecorder(bare.model)
        with recorder.recording() as logits:
            loss = bare.compute_loss(bare.model, batch, num_items_in_batch=items)
        loss = loss + 0.5 * recorder.loss(logits, batch.get("attention_mask")) / 2
        loss.backward()
        want = want + loss.detach()
    assert any("gate" in name for name, _ in model.named_parameters())
    for (name, a), b in zip(trainer.model.named_parameters(), bare.model.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b[1].grad, rtol=1e-4, atol=1e-7, msg=name)


def test_it_is_logged_apart_from_the_loss(tmp_path) -> None:
    """A line has the mean over the step's micro-batches; the loss stays that of the tokens."""
    model = tiny.tiny_model("mixtral")
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    runs = {
        c: make_trainer(tmp_path / str(c), model=copy.deepcopy(model), router_aux_loss_coef=c, **options)
        for c in (0.0, 1.0)
    }
    recorder = RouterRecorder(runs[0.0].model)
    losses = []
    for batch in list(runs[0.0].get_train_dataloader())[:2]:
        with recorder.recording() as logits:
            runs[0.0].compute_loss(runs[0.0].model, runs[0.0]._prepare_inputs(batch))
        losses.append(recorder.loss(logits).item())
    for trainer in runs.values():
        trainer.train()
    assert not logged(runs[0.0], "router_loss") and len(logged(runs[1.0], "router_loss")) == 2
    assert logged(runs[1.0], "router_loss")[0] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert logged(runs[1.0])[0] == pytest.approx(logged(runs[0.0])[0], rel=1e-6)
    assert logged(runs[1.0])[1] != logged(runs[0.0])[1], "it is learned"


def test_what_fills_up_a_step_counts_nothing(tmp_path) -> None:
    """One bin in a step of two micro-batches: the second has no tokens."""
    rows = token_rows(1)
    options = dict(model=tiny.tiny_model("mixtral"), train=rows, router_aux_loss_coef=0.5, max_steps=3)
    one = trained(
        tmp_path / "a", per_device_train_batch_size=1, **{**options, "model": copy.deepcopy(options["model"])}
    )
    two = trained(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=2, **options)
    assert_same_run(two, one, tolerance=1e-4)
    np.testing.assert_allclose(logged(two, "router_loss"), logged(one, "router_loss"), rtol=1e-5)


def test_activation_checkpointing(tmp_path) -> None:
    model = tiny.tiny_model("mixtral")  # grouped products of experts know no float64
    options = dict(router_aux_loss_coef=0.5, max_steps=3)
    plain = trained(tmp_path / "a", model=copy.deepcopy(model), **options)
    checked = trained(tmp_path / "b", model=copy.deepcopy(model), activation_checkpointing=True, **options)
    assert_same_run(checked, plain, tolerance=1e-5)
    trainer = make_trainer(
        tmp_path,
        model=model,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
        **options,
    )
    with pytest.raises(ValueError, match="the router loss has no gradient here"):
        trainer.train()


@pytest.mark.parametrize("backend", ["segment", "dense"])
def test_a_config_that_asks_for_router_logits_can_be_packed(tmp_path, backend) -> None:
    """transformers' own loss would take the layout's mask for one of padding."""
    rows = token_rows(9)
    model = tiny.tiny_model("mixtral", output_router_logits=True)
    plain = tiny.tiny_model("mixtral")
    asked, want = (
        trained(tmp_path / str(n), model=one, train=rows, attention_backend=backend, max_steps=2)
        for n, one in enumerate((model, plain))
    )
    assert asked.layout.name == backend
    assert_same_run(asked, want, tolerance=1e-5)
    assert logged(asked, "router_loss") == pytest.approx(logged(want, "router_loss"), rel=1e-6)


def test_the_coefficient(tmp_path) -> None:
    """The config's by default; one on a model without routers is refused."""
    assert (
        make_trainer(tmp_path, model=tiny.tiny_model("mixtral", router_aux_loss_coef=0.02)).router_loss_coefficient
        == 0.02
    )
    assert make_trainer(tmp_path).router_loss_coefficient == 0
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        make_trainer(tmp_path, router_aux_loss_coef=0.1)


def test_preferences_have_it_too(tmp_path) -> None:
    """Gradients of a step of two micro-batches: those without it, plus those of the mean router loss."""
    from test_dpo import make_trainer as preferring

    model = tiny.tiny_model("mixtral")
    options = dict(ref_model=tiny.tiny_model("mixtral", seed=1), train=6, per_device_train_batch_size=2)
    trainer, bare = (
        preferring(tmp_path, model=copy.deepcopy(model), router_aux_loss_coef=c, **options) for c in (0.5, 0.0)
    )
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()][:2]
    items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    for batch in batches:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).backward()
        recorder = RouterRecorder(bare.model)
        with recorder.recording() as logits:
            bare.model(**bare._model_inputs(batch))
        (0.5 * recorder.loss(logits) / 2).backward()
        bare.compute_loss(bare.model, batch, num_items_in_batch=items).backward()
    for (name, a), b in zip(trainer.model.named_parameters(), bare.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7, msg=name)
    trainer.train()
    assert len(logged(trainer, "router_loss")) == trainer.state.max_steps
