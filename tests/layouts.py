"""Packed rows for tests of attention, and what their tokens may see, written token by token from the rule."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_sft.collators import CausalCollator, WeDLMCollator, WeDLMEvalCollator
from hf_sft.noise import MaskRule

# Clean streams only; with noisy streams, elided or whole; with the two elided noisy streams of an evaluation.
KINDS = ["causal", "elided", "full", "measured"]
MASK_ID = 258


class Token(NamedTuple):
    doc: int
    pos: int
    block: tuple[int, int] | None  # noisy stream and block; None: in a clean stream
    limit: int


def edge_lengths(block_size: int) -> list[int]:
    """Documents that end before, at and behind the border of a block."""
    lengths = [1, block_size - 1, block_size, block_size + 1, 3 * block_size + 5, 10 * block_size]
    return [length for length in lengths if length]


def token_rows(lengths: list[int], seed: int = 0) -> list[dict[str, Any]]:
    """Documents of random tokens; a third of every other one is prompt."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = rng.integers(0, 255, length)
        prompt = 0 if number % 2 else length // 3
        rows.append({"input_ids": ids, "labels": np.where(np.arange(length) < prompt, -100, ids)})
    return rows


def packed(kind: str, lengths: list[int], block_size: int, seed: int = 0) -> dict[str, Any]:
    """One packed batch of ``kind``."""
    if kind == "causal":
        return CausalCollator()([token_rows(lengths, seed)])
    return noisy_collator(kind, block_size, seed)([token_rows(lengths, seed)])


def noisy_collator(kind: str, block_size: int, seed: int) -> WeDLMCollator:
    make = WeDLMEvalCollator if kind == "measured" else WeDLMCollator
    return make(MASK_ID, MaskRule(block_size), seed=seed, elide=kind != "full")


def tokens(kind: str, lengths: list[int], block_size: int, seed: int = 0) -> list[Token]:
    """The tokens of ``packed``, laid out without the project's own streams."""
    made = []
    for doc, row in enumerate(token_rows(lengths, seed)):
        length = len(row["input_ids"])
        made += [Token(doc, pos, None, pos + 1) for pos in range(length)]
        if kind == "causal":
            continue
        masks = noisy_collator(kind, block_size, seed)._masks(row["labels"] != -100, 0, doc)
        for stream, (mask, _) in enumerate(masks):
            for start in range(0, length, block_size):
                block = range(start, min(start + block_size, length))
                slots = [pos for pos in block if mask.masked[pos]]
                observed = [pos for pos in block if not mask.masked[pos]]
                anchor = start
                if kind != "full":
                    if not slots:
                        continue
                    anchor = slots[0]
                    observed = [pos for pos in observed if pos > anchor]
                made += [Token(doc, pos, (stream, start // block_size), anchor) for pos in observed + slots]
    return made


def brute_force(row: list[Token], window: int | None = None) -> Tensor:
    """[T, T] bool: a double loop over the rule."""
    allowed = torch.zeros(len(row), len(row), dtype=torch.bool)
    for q, query in enumerate(row):
        for k, key in enumerate(row):
            if query.doc != key.doc:
                continue
            if window is not None and query.pos - key.pos >= window:
                continue
            allowed[q, k] = key.pos < query.limit if key.block is None else query.block == key.block and k <= q
    return allowed


def attended(function: Any, row_length: int, **options: Any) -> Tensor:
    """[T, T] bool: which keys an attention function really reads. Every score is 0 and every value a unit vector, so that a row
    of the result is 1 / n at the n keys that its query sees; that all n are equal is checked."""
    query = torch.zeros(1, 1, row_length, 1, dtype=torch.float64)
    value = torch.eye(row_length, dtype=torch.float64)[None, None]
    output = function(torch.nn.Identity(), query, query, value, options.pop("mask", None), **options)[0][0, :, 0]
    seen = output > 0
    torch.testing.assert_close(output, seen / seen.sum(1, keepdim=True).double(), rtol=1e-12, atol=0)
    return seen
