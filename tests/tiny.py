"""Tiny tokenizers and models, made offline in milliseconds, and real material where it is at hand."""

from __future__ import annotations

import functools
from pathlib import Path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def tiny_tokenizer(chat_template: str | None = CHATML):
    """A byte-level tokenizer of 259 tokens with ChatML's special tokens; one token per UTF-8 byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


# Sizes are small primes of nothing: they only have to divide by the heads. Windows are shorter than the test documents.
_COMMON = dict(
    vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, pad_token_id=257, bos_token_id=None, eos_token_id=256,
)  # fmt: skip
_EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
_LATENT = dict(
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, **_EXPERTS,
)  # fmt: skip
_NO_KEYS, _NO_POSITIONS = ("num_key_value_heads",), ("num_key_value_heads", "max_position_embeddings")
# What differs from _COMMON; "type": the model type where the name is not one; "without": fields that the config has not.
FAMILIES: dict[str, dict] = {
    "llama": {},
    "llama2": dict(type="llama", num_key_value_heads=4),
    "llama3": dict(
        type="llama",
        rope_parameters=dict(
            rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "qwen2": {},
    "qwen3": dict(head_dim=8),
    "mistral": dict(sliding_window=7),
    "gemma": dict(head_dim=8),
    "gemma2": dict(head_dim=8, sliding_window=7, query_pre_attn_scalar=8),
    "gemma3_text": dict(head_dim=8, sliding_window=7, query_pre_attn_scalar=8),
    "gpt_neox": dict(without=_NO_KEYS),
    "phi3": {},
    "stablelm": {},
    "olmo2": {},
    "granite": dict(logits_scaling=2.0, attention_multiplier=0.5, residual_multiplier=0.5, embedding_multiplier=3.0),
    "bloom": dict(without=("intermediate_size", *_NO_POSITIONS)),
    "gpt2": dict(
        without=("intermediate_size", *_NO_POSITIONS), n_positions=512, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    ),
    "falcon": dict(multi_query=True, parallel_attn=True, alibi=False, without=("intermediate_size", *_NO_KEYS)),
    "falcon_new": dict(
        type="falcon", new_decoder_architecture=True, num_kv_heads=2, alibi=False, without=("intermediate_size", *_NO_KEYS)
    ),
    "falcon_alibi": dict(
        type="falcon", multi_query=False, parallel_attn=False, alibi=True, bias=True, without=("intermediate_size", *_NO_KEYS)
    ),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(num_experts=4, shared_expert_intermediate_size=24, **_EXPERTS),
    "qwen3_moe": dict(head_dim=8, num_experts=4, **_EXPERTS),
    "gpt_oss": dict(
        head_dim=8, sliding_window=7, num_local_experts=4, num_experts_per_tok=2,
        rope_parameters=dict(rope_type="default", rope_theta=150000.0),
    ),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "mamba": dict(state_size=4, without=("intermediate_size", "num_attention_heads", *_NO_POSITIONS)),
    "mamba2": dict(
        state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=16,
        without=("intermediate_size", "num_attention_heads", *_NO_POSITIONS),
    ),
}  # fmt: skip


@functools.cache
def _config(family: str, **overrides):
    from transformers import AutoConfig

    fields = {**_COMMON, **FAMILIES[family], **overrides}
    kind, absent = fields.pop("type", family), fields.pop("without", ())
    return AutoConfig.for_model(kind, **{name: value for name, value in fields.items() if name not in absent})


def tiny_model(family: str = "llama", seed: int = 0, **overrides):
    """A random two-layer model of the family in float32, deterministic in ``seed``."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(_config(family, **overrides)), dtype=torch.float32)


def save_tiny(folder: Path, family: str = "llama", seed: int = 0, **overrides) -> str:
    """Write a tiny model and tokenizer to ``folder`` and return its path."""
    tiny_model(family, seed, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def conversations(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Random one- and two-turn conversations of uneven lengths."""
    import random

    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(low, high))).strip() or "a"

    rows = []
    for _ in range(count):
        row = []
        for _ in range(rng.randint(1, 2)):
            row += [{"role": "user", "content": text(3, 25)}, {"role": "assistant", "content": text(1, 40)}]
        rows.append(row)
    return rows


def checkpoint_activations(model, **options) -> None:
    """Activation checkpointing, under its name in transformers 5.21 and later or the older one."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None)
    model.train()
