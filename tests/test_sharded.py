"""Whole tensors of models that are not sharded, and the random twin that is measured in a sharded model's place."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch import nn

from hf_sft.attention.selfcheck import choose_layout, install_layout
from hf_sft.models.adapters import needs_vocabulary
from hf_sft.models.head import HeadScorer
from hf_sft.models.sharded import gather_state, is_sharded, set_whole, whole, whole_numel, whole_shape
from hf_sft.models.twin import random_twin


def test_a_plain_model_is_whole() -> None:
    model = tiny_model("qwen2", tie_word_embeddings=True)
    assert not is_sharded(model)
    embedding = model.get_input_embeddings().weight
    assert whole_shape(embedding) == (259, 32) and whole_numel(embedding) == 259 * 32
    assert torch.equal(whole(embedding), embedding)
    set_whole(embedding, torch.full_like(embedding, 2.0))
    assert embedding.eq(2).all()
    state = gather_state(model, lambda name: "norm" not in name, keep=True)
    assert state.keys() == {name for name in model.state_dict() if "norm" not in name}
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"], "tied tensors stay tied"
    assert gather_state(model, lambda name: True, keep=False) == {}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_the_twin_shows_what_the_model_would(family: str) -> None:
    model = tiny_model(family, num_hidden_layers=9, vocab_size=4000)
    before = torch.random.get_rng_state()
    twin = random_twin(model, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before), "random numbers drawn elsewhere stay as they are"
    config, small = model.config, twin.config
    assert small.hidden_size == config.hidden_size and small.vocab_size == 512
    assert set(getattr(small, "layer_types", None) or []) == set(getattr(config, "layer_types", None) or [])
    assert small.num_hidden_layers < config.num_hidden_layers == 9
    choice = choose_layout(twin)
    assert choice.name == choose_layout(model).name
    assert HeadScorer(twin).verify(twin, torch.arange(16)[None])
    install_layout(model, None)
    own = model.config._attn_implementation
    install_layout(model, choice.backend)
    assert model.config._attn_implementation == twin.config._attn_implementation != own


def test_vocabulary_goes_along_only_where_it_has_grown(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tiny_model("llama").save_pretrained(tmp_path)
    for rows, needed in ((259, False), (260, True)):
        base = AutoModelForCausalLM.from_pretrained(tmp_path)
        base.resize_token_embeddings(rows, mean_resizing=False)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
        assert isinstance(model, nn.Module) and needs_vocabulary(model) == needed
