"""WeDLM checkpoints without remote code: Qwen2.5 and Qwen3 weights under another name (arXiv 2512.22737).

A config of type ``wedlm`` with ``qk_norm`` is Qwen3's network (query and key norms, no biases); without it, Qwen2.5's (biases on
query, key and value, no norms). The parameters have the same names, so the weights of one load into the other.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

MODEL_TYPE = "wedlm"


class WeDLMConfig(Qwen3Config):
    """``Qwen3Config`` with two fields more.

    Args:
        qk_norm: query and key norms as in Qwen3; without them the network is Qwen2.5's. By default the opposite of
            ``attention_bias``, as in the official configs.
        mask_token_id: the token that stands at mask slots.
    """

    model_type = MODEL_TYPE

    qk_norm: bool | None = None
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.qk_norm is None:
            self.qk_norm = not self.attention_bias
        if self.qk_norm == self.attention_bias:
            raise ValueError(
                f"qk_norm and attention_bias are both {self.qk_norm}: a WeDLM network has query and key norms (Qwen3) or "
                "biases (Qwen2.5); set one of them to true and the other to false"
            )
        super().__post_init__(**kwargs)


class WeDLMModel(Qwen3Model):
    """The decoder: Qwen3's, or Qwen2.5's where the config has no ``qk_norm``."""

    config_class = WeDLMConfig

    def __init__(self, config: WeDLMConfig) -> None:
        super().__init__(config)
        if not config.qk_norm:
            for layer in self.layers:
                attention: Any = layer.self_attn
                attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()
                attention.o_proj.register_parameter("bias", None)  # Qwen2.5 has biases on query, key and value alone


class WeDLMForCausalLM(Qwen3ForCausalLM):
    """A WeDLM checkpoint as a causal LM: its clean stream is the ordinary next-token model."""

    config_class = WeDLMConfig

    def __init__(self, config: WeDLMConfig) -> None:
        super().__init__(config)
        self.model = WeDLMModel(config)
        self.post_init()


# The Auto classes know the type as soon as anything of hf_sft that loads or trains a model is imported.
AutoConfig.register(MODEL_TYPE, WeDLMConfig, exist_ok=True)
AutoModelForCausalLM.register(WeDLMConfig, WeDLMForCausalLM, exist_ok=True)
