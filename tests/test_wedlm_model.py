"""The native WeDLM classes: official configs load, and the network is Qwen's, to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import runs
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_sft.arguments import ModelArguments
from hf_sft.attention.selfcheck import choose_layout
from hf_sft.models.loading import load_model, load_tokenizer
from hf_sft.models.wedlm import WeDLMConfig, WeDLMForCausalLM

IDS = torch.tensor([[1, 5, 9, 200, 3]])


def renamed(folder, family: str, **fields):
    """A Qwen checkpoint with an official-looking config: type wedlm, qk_norm, remote code named, rope_theta at the top."""
    tiny.save_tiny(folder, family)
    config = json.loads((folder / "config.json").read_text())
    for key in ("layer_types", "rope_parameters", "dtype"):
        config.pop(key, None)
    config |= {
        "model_type": "wedlm", "architectures": ["WeDLMForCausalLM"], "qk_norm": family == "qwen3", "rope_theta": 10000.0,
        "attention_bias": family != "qwen3", "rope_scaling": None, "mask_token_id": 258, "torch_dtype": "float32",
        "head_dim": 8, "auto_map": {"AutoConfig": "configuration_wedlm.WeDLMConfig"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return str(folder)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_same_weights_give_the_same_logits(tmp_path, family: str) -> None:
    model = load_model(ModelArguments(model_name_or_path=renamed(tmp_path / "a", family)))
    assert isinstance(model, WeDLMForCausalLM) and model.config.mask_token_id == 258
    want = tiny.tiny_model(family)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in want.named_parameters()}
    assert torch.equal(model(IDS).logits, want(IDS).logits)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_saved_and_loaded_again_by_the_auto_classes(tmp_path, family: str) -> None:
    model = load_model(ModelArguments(model_name_or_path=renamed(tmp_path / "a", family)))
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert isinstance(again, WeDLMForCausalLM) and torch.equal(again(IDS).logits, model(IDS).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "b"), WeDLMConfig)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["mask_token_id"] == 258


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_it_can_be_packed(tmp_path, family: str) -> None:
    model = load_model(ModelArguments(model_name_or_path=renamed(tmp_path / "a", family)))
    assert choose_layout(model).name == "segment"


def test_the_tokenizer_loads_beside_it(tmp_path) -> None:
    assert len(load_tokenizer(ModelArguments(model_name_or_path=renamed(tmp_path / "a", "qwen3")))) == 259


def test_contradictory_configs_are_refused() -> None:
    for flag in (True, False):
        with pytest.raises(ValueError, match="qk_norm and attention_bias are both"):
            WeDLMConfig(qk_norm=flag, attention_bias=flag)
    assert WeDLMConfig(attention_bias=True).qk_norm is False and WeDLMConfig().qk_norm is True


def test_the_auto_classes_know_the_type_once_anything_is_imported(tmp_path) -> None:
    folder = renamed(tmp_path / "a", "qwen3")
    for line in (
        "from hf_sft import SFTTrainer",
        "from hf_sft import generate_wedlm",
        "from hf_sft import WeDLMForCausalLM",
    ):
        load = f"{line}; from transformers import AutoModelForCausalLM as A; print(type(A.from_pretrained({folder!r})).__name__)"
        process = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, cwd=runs.ROOT)
        assert process.stdout.strip() == "WeDLMForCausalLM", process.stderr


def test_what_is_trained_names_no_code_that_is_not_there(tmp_path) -> None:
    model = load_model(ModelArguments(model_name_or_path=renamed(tmp_path / "a", "qwen3")))
    model.save_pretrained(tmp_path / "b")
    assert "auto_map" not in json.loads((tmp_path / "b" / "config.json").read_text())
