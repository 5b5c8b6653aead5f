"""Quantised bases: the gradients of QLoRA are right and stay so, on CPU too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_models import arguments, ids_and_labels
from tiny import save_tiny

from hf_sft.arguments import LoraArguments
from hf_sft.models.loading import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_tiny(tmp_path / "base"))


@pytest.mark.parametrize("hidden", [64, 48])  # 48 is no multiple of 32
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_qlora_gradients_survive_an_evaluation(tmp_path, kind, hidden) -> None:
    pytest.importorskip("bitsandbytes")
    source = save_tiny(tmp_path, hidden_size=hidden, intermediate_size=80)
    fields = {"train_mode": "qlora", "quantization": kind, "dtype": "float32"}
    torch.manual_seed(0)
    model = load_model(arguments(source, **fields), LoraArguments(lora_rank=4))
    quantised = [p for p in model.parameters() if p.dtype in (torch.uint8, torch.int8)]
    assert len(quantised) == 14
    assert not any(p.requires_grad for p in quantised)
    assert model.get_output_embeddings().weight.dtype == torch.float32  # the head is not quantised
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        model(**ids_and_labels(), use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(**ids_and_labels(), use_cache=False)
    after = gradients()
    assert all(grad.abs().sum() > 0 for grad in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.005)
    losses = []
    for _ in range(4):
        loss = model(**ids_and_labels(), use_cache=False).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


def test_qlora_learns_as_lora_on_the_dequantised_weights(folder) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    models = []
    for mode in ("qlora", "lora"):
        torch.manual_seed(0)
        models.append(load_model(arguments(folder, train_mode=mode, dtype="float32"), LoraArguments(lora_rank=4)))
    quantised, plain = models
    held = dict(quantised.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            source = held[name]
            state = getattr(source, "quant_state", None)
            parameter.copy_(source if state is None else bnb.functional.dequantize_4bit(source.data, state))
    for model in models:
        model(**ids_and_labels(), use_cache=False).loss.backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(held[name].grad, parameter.grad, rtol=1e-5, atol=1e-7)


def test_qlora_default_is_nf4_twice_quantised_over_bfloat16(folder) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(arguments(folder, train_mode="qlora"))
    settings = model.config.quantization_config
    assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == ("nf4", True)
    assert settings.bnb_4bit_compute_dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    single = load_model(arguments(folder, train_mode="qlora", double_quantization=False))
    assert single.config.quantization_config.bnb_4bit_use_double_quant is False


def test_qlora_of_a_state_space_model_leaves_what_is_read_directly(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(arguments(save_tiny(tmp_path, "mamba"), train_mode="qlora"))
    model(**ids_and_labels(), use_cache=False).loss.backward()
    assert {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad and p.grad is not None} == {
        "in_proj"
    }


def test_qlora_without_bitsandbytes_says_how_to_install_it(folder, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        load_model(arguments(folder, train_mode="qlora"))
