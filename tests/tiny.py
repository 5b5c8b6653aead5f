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
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": dict(head_dim=8),
    "mistral": dict(sliding_window=7),
    "gemma2": dict(head_dim=8, sliding_window=7, query_pre_attn_scalar=8),
    "gemma3_text": dict(head_dim=8, sliding_window=7, query_pre_attn_scalar=8),
    "gpt_neox": {},
    "mamba": {},
}


@functools.cache
def _config(family: str, **overrides):
    from transformers import AutoConfig

    fields = {**_COMMON, **FAMILIES[family], **overrides}
    if family == "gpt_neox":
        fields.pop("num_key_value_heads")
    if family == "mamba":
        fields = dict(vocab_size=259, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=257)
        fields |= dict(bos_token_id=None, eos_token_id=256, **overrides)
    return AutoConfig.for_model(family, **fields)


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
