"""Liger's kernels reach the layers and never the loss; a stand-in shows what would be asked of the library."""

from __future__ import annotations

import sys
import types

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from hf_sft.models.liger import apply_liger
from hf_sft.training import setup
from hf_sft.training_arguments import TrainingArguments, refusals

OFF = {"cross_entropy": False, "fused_linear_cross_entropy": False}


@pytest.fixture
def asked(monkeypatch) -> list:
    """What the stand-in was asked for; it knows llama, and like Liger has its fused loss on by default."""
    calls: list = []

    def to_llama(
        rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
    ) -> None:
        calls.append((model, rope, rms_norm, swiglu, cross_entropy, fused_linear_cross_entropy))

    def apply(model, **kernels):
        to_llama(model=model, **kernels)

    patch = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN, patch._apply_liger_kernel_to_instance = {"llama": to_llama}, apply
    package, kernels = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    package.transformers, kernels.monkey_patch = kernels, patch
    for module in (package, kernels, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_layers_are_ligers_and_the_loss_is_ours(asked):
    model = tiny.tiny_model()
    assert apply_liger(model, None) == OFF
    assert apply_liger(get_peft_model(model, LoraConfig()), {"rope": False}) == {"rope": False} | OFF
    assert asked == [(model, True, True, True, False, False), (model, False, True, True, False, False)]


def test_what_liger_has_not_is_refused(asked):
    with pytest.raises(ValueError, match="no kernels for models of type gpt2"):
        apply_liger(tiny.tiny_model("gpt2"), None)
    with pytest.raises(ValueError, match="names geglu: for models of type llama Liger has rms_norm, rope, swiglu"):
        apply_liger(tiny.tiny_model(), {"geglu": True})
    assert not asked


def test_without_liger_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        apply_liger(tiny.tiny_model(), None)


def test_the_model_is_prepared_before_it_is_measured(asked, tmp_path):
    """And Trainer, which applies the config again, is told to leave the loss alone."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args.use_liger_kernel = True
    model = tiny.tiny_model()
    setup.prepare_model(model, None, args, None)
    assert asked == [(model, True, True, True, False, False)] and args.liger_kernel_config == OFF


def test_settings_that_cannot_be_are_refused(monkeypatch):
    def found(**values):
        return refusals(values, packing=True)

    assert "needs a GPU" in found(use_liger_kernel=True, use_cpu=True)["use_liger_kernel"]
    assert "needs use_liger_kernel" in found(liger_kernel_config={"rope": True})["liger_kernel_config"]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert found(use_liger_kernel=True) == found(use_liger_kernel=True, liger_kernel_config={"rope": False} | OFF) == {}
    for loss in OFF:
        sentence = found(use_liger_kernel=True, liger_kernel_config={loss: True})["liger_kernel_config"]
        assert f"asks for {loss}:" in sentence and "leave it out" in sentence
    assert "choose one" in found(use_liger_kernel=True, torch_compile=True)["use_liger_kernel"]
