"""What is peculiar to families of models and their tokenizers, in one place.

Almost nothing depends on a family's name: layouts, the scoring of the head and target layers are measured on the model. What
is left are names that stand in published vocabularies and configs, and one class of layers.

| quirk                           | families                        | what is done                                              |
|---------------------------------|---------------------------------|-----------------------------------------------------------|
| no pad token                    | Llama, GPT-2, Pythia            | ``ensure_pad_token``: one that no text holds, else eos    |
| several tokens end a text       | Llama 3, Phi-3, Gemma           | ``end_tokens``: the template's end of turn comes to them  |
| ALiBi                           | BLOOM, falcon-rw                | ``uses_alibi`` says why they are trained on padded batches |
| a router loss                   | Mixtral, Qwen-MoE, gpt-oss, ... | ``router_loss_coefficient``                               |
| state-space layers              | Mamba, Mamba-2, Falcon-Mamba... | ``STATE_SPACE_BARE_LAYERS`` take no adapter and no NF4    |
| a linear layer of its own class | Falcon                          | ``use_plain_linear_layers``, before it is quantised       |

A beginning token that a family needs (Llama, Gemma) comes from its template in conversations and from its tokenizer in texts.
A tokenizer without a template is refused where conversations are read, with the names of the templates that are built in.
"""

from __future__ import annotations

import importlib
import logging
import math
from typing import Any

from torch import nn
from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

# Tokens that vocabularies hold for padding and that no text contains, the best first.
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")

# Layers of state-space models whose weights the forward reads directly, on its fused path or always: neither an adapter nor a
# quantised weight takes effect there. PEFT refuses two of them by name, out_proj and conv1d.
STATE_SPACE_TYPES = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
STATE_SPACE_BARE_LAYERS = frozenset({"conv1d", "x_proj", "dt_proj", "out_proj"})

# Model type -> (module, class): a linear layer that computes what nn.Linear does.
_OWN_LINEAR_LAYERS = {"falcon": ("transformers.models.falcon.modeling_falcon", "FalconLinear")}


def uses_alibi(config: PretrainedConfig) -> bool:
    """Whether positions are ALiBi's biases on the scores (arXiv 2108.12409), which BLOOM and some Falcons make from a mask of
    padding [B, L]: no packed row can say where its documents begin."""
    return config.model_type == "bloom" or bool(getattr(config, "alibi", False))


def ensure_pad_token(tokenizer: Any, name: str) -> None:
    """Give ``tokenizer`` a pad token if it has none; which one does not matter to the loss, as nothing is masked by value.

    Raises:
        ValueError: there is no eos token either.
    """
    if tokenizer.pad_token_id is not None:
        return
    vocabulary = tokenizer.get_vocab()
    used = {tokenizer.eos_token, tokenizer.bos_token}
    pad = next((token for token in PAD_NAMES if token in vocabulary and token not in used), tokenizer.eos_token)
    if pad is None:
        raise ValueError(f"The tokenizer of {name!r} has neither a pad nor an end-of-sequence token; give it one.")
    tokenizer.pad_token = pad
    logger.info("The tokenizer has no pad token; %r is used.", pad)


def end_tokens(generation_config: Any, *first: int) -> list[int]:
    """The ids that end a text, each once: ``first``, then those of ``generation_config``, which names none, one or several."""
    known = getattr(generation_config, "eos_token_id", None)
    known = [] if known is None else known if isinstance(known, list) else [known]
    return list(dict.fromkeys([*first, *known]))


def router_loss_coefficient(config: PretrainedConfig, asked: float | None = None) -> float:
    """Weight of the load-balancing loss of a mixture of experts; 0 for a model without one.

    Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss, OLMoE, Granite-MoE and others have ``router_aux_loss_coef`` in their config (0.001,
    OLMoE 0.01). DeepSeek-V2 and -V3 have experts and no such loss in transformers. The others return ``aux_loss`` where
    ``output_router_logits`` is true, and take the forward's attention mask for one of padding [B, L]: that is right without a
    mask and with a 2-D one, and under the mask of a packed layout it fails with an error of shapes (measured on 5.23). So
    ``models.routers`` computes it from the routers' logits, over all T tokens of a packed row.

    Args:
        asked: what the user wants; None: what the config says.

    Raises:
        ValueError: a negative weight, or a positive one for a model that has no such loss.
    """
    own = getattr(config.get_text_config(), "router_aux_loss_coef", None)
    if asked is None:
        return float(own or 0.0)
    if not (math.isfinite(asked) and asked >= 0):
        raise ValueError(f"router_aux_loss_coef is {asked:g}: use 0 or a positive number; 0.001 is usual")
    if asked > 0 and own is None:
        raise ValueError(
            f"router_aux_loss_coef is {asked:g}, and a {config.model_type} model has no router loss: leave it out"
        )
    return float(asked)


def use_plain_linear_layers(config: PretrainedConfig) -> None:
    """From now on models of this family are built with ``nn.Linear`` where they have a class of their own that does the same.

    transformers (5.23) quantises ``nn.Linear`` itself and no class derived from it: Falcon would keep every weight as it is.
    """
    if config.model_type in _OWN_LINEAR_LAYERS:
        module, name = _OWN_LINEAR_LAYERS[config.model_type]
        setattr(importlib.import_module(module), name, nn.Linear)
