"""What the steps of the benchmarks work on: a Qwen3-like model, and documents as long as those of gsm8k.

Lengths are drawn from a table of quantiles of gsm8k train under the Qwen2.5 tokenizer and template, with its share of supervised
tokens; the tokens are random. A step's time does not depend on which tokens they are, and so no data are needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from hf_sft.data.packing import pack_documents

# Quantiles (0, 1/8 .. 1) of document lengths, and the supervised share of the tokens.
GSM8K_LENGTHS = [95, 142, 162, 181, 199, 222, 250, 292, 567]
GSM8K_SUPERVISED = 0.58

Row = dict[str, np.ndarray]


def make_model(
    vocabulary: int, *, width: int = 256, layers: int = 4, positions: int = 16_384, **changes: Any
) -> Qwen3ForCausalLM:
    """``layers`` layers with 8 query and 4 key-value heads, in float32; embeddings and head are tied. Seeded."""
    torch.manual_seed(0)
    shape = dict(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=width // 8, max_position_embeddings=positions,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(Qwen3Config(**{**shape, **changes}))


def row(length: int, vocabulary: int, rng: np.random.Generator, supervised: float = GSM8K_SUPERVISED) -> Row:
    """A document of random tokens whose last ``supervised`` share is learned."""
    ids = rng.integers(0, vocabulary, length)
    return {"input_ids": ids, "labels": np.where(np.arange(length) < (1 - supervised) * length, -100, ids)}


def documents(count: int, vocabulary: int, seed: int = 0) -> list[Row]:
    """``count`` documents with gsm8k's lengths."""
    rng = np.random.default_rng(seed)
    lengths = np.interp(rng.random(count), np.linspace(0, 1, len(GSM8K_LENGTHS)), GSM8K_LENGTHS).astype(int)
    return [row(length, vocabulary, rng) for length in lengths]


def gsm8k_packs(count: int, vocabulary: int, length: int = 2048, seed: int = 0) -> list[list[Row]]:
    """The ``count`` fullest of the packs of ``length`` tokens that best-fit packing makes of such documents; none is longer."""
    drawn = documents(2 * count * length // 200 + 20, vocabulary, seed)
    rows = [r for r in drawn if len(r["input_ids"]) <= length]
    packs = [[rows[number] for number in pack] for pack in pack_documents([len(r["input_ids"]) for r in rows], length)]
    return sorted(packs, key=tokens, reverse=True)[:count]


def equal_packs(count: int, parts: int, vocabulary: int, length: int = 2048, seed: int = 0) -> list[list[Row]]:
    """``count`` packs of exactly ``length`` tokens in ``parts`` documents of about equal lengths."""
    rng = np.random.default_rng(seed)
    ends = np.rint(np.linspace(0, length, parts + 1)).astype(int)
    return [[row(int(size), vocabulary, rng) for size in np.diff(ends)] for _ in range(count)]


def tokens(pack: list[Row]) -> int:
    return sum(len(r["input_ids"]) for r in pack)


def scored(pack: list[Row]) -> int:
    """Rows whose next token is learned."""
    return sum(int((r["labels"][1:] != -100).sum()) for r in pack)
