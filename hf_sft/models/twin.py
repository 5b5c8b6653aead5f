"""A small random model of the same architecture, where the model itself cannot be run yet because its weights are sharded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_sft.models.sharded import without_partitioning

_VOCABULARY = 512  # rows are not what is checked, and large vocabularies take most of a small model


def random_twin(base: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A model of the config of ``base`` with two layers, or as many as show each kind of layer once, and few rows.

    Layers keep their width, so that kernels meet the shapes that they will meet. Random numbers drawn elsewhere stay as they are.
    """
    config: Any = copy.deepcopy(base.config)
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    layers = min(text.num_hidden_layers, max([2, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    text.num_hidden_layers = layers
    if kinds and not isinstance(
        getattr(type(text), "layer_types", None), property
    ):  # Mamba derives them from the count
        text.layer_types = kinds[:layers]
    text.vocab_size = min(text.vocab_size, _VOCABULARY)
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    with without_partitioning(), torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        twin = AutoModelForCausalLM.from_config(
            config, dtype=base.dtype, attn_implementation=base.config._attn_implementation
        )
    return twin.to(device)
