"""Which tokens WeDLM masks, and with which weight: drawn from (seed, epoch, document), never from the order of calls.

Symbols: L tokens of a document, cut into blocks of ``block_size``; n supervised tokens of a block, m of them masked.

    elbo        m = ceil(u n),  u ~ U(0, 1],       weight n / m:  every m in 1..n is equally likely, so that the mean over
                                                   masks of sum_masked (n / m) nll is the any-order bound
                                                   n * E_m [1 / m * sum_masked nll]  (Uria et al. 2014, arXiv 1310.1757)
    reference   m = round(n g),  g ~ U(0, 1),      weight 1 / g, normalised to sum 1 over a micro-batch by the collator, as
                                                   Tencent's WeDLM code does (arXiv 2512.22737); for parity only
    uniform     (a weighting)                      every slot of a block weighs the mean of its scheme: 2 n / (n + 1) under elbo,
                                                   which keeps E[sum of weights] = n; 1 under reference
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Sampling = Literal["elbo", "reference"]
Weighting = Literal["weighted", "uniform"]


@dataclass(frozen=True)
class MaskRule:
    """How masks are drawn.

    Args:
        block_size: tokens per block.
        sampling: ``elbo`` or ``reference``.
        weighting: ``weighted`` as the sampling says, or ``uniform``.
        per_block: one draw of u per block; otherwise one for the document.

    Raises:
        ValueError: a block size below 1, or an unknown name.
    """

    block_size: int = 32
    sampling: Sampling = "elbo"
    weighting: Weighting = "weighted"
    per_block: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}: a block has at least 1 token")
        if self.sampling not in ("elbo", "reference"):
            raise ValueError(f"mask_sampling is {self.sampling!r}: choose elbo or reference")
        if self.weighting not in ("weighted", "uniform"):
            raise ValueError(f"loss_weighting_scheme is {self.weighting!r}: choose weighted or uniform")


@dataclass(frozen=True)
class Mask:
    """The mask of one document.

    Attributes:
        masked: [L] bool.
        weight: [L] float64, 0 where nothing is masked.
    """

    masked: np.ndarray
    weight: np.ndarray


def document_generator(seed: int, epoch: int, document: int) -> np.random.Generator:
    """The source of one document's noise in one epoch: the same on any rank, in any worker, after any resume."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, document])))


def draw_mask(supervised: np.ndarray, rule: MaskRule, generator: np.random.Generator) -> Mask:
    """Draw the mask of one document.

    Args:
        supervised: [L] bool, tokens that the model has to produce.
        rule: how masks are drawn.
        generator: source of the noise; ``document_generator`` in training.
    """
    block = np.arange(len(supervised)) // rule.block_size
    blocks = int(block[-1]) + 1 if len(block) else 0
    ratio = 1.0 - generator.random(blocks if rule.per_block else 1)  # (0, 1]
    return mask_at_ratio(supervised, np.broadcast_to(ratio, blocks), rule, generator)


def mask_at_ratio(supervised: np.ndarray, ratio: np.ndarray, rule: MaskRule, generator: np.random.Generator) -> Mask:
    """Mask a share of each block's supervised tokens.

    Args:
        supervised: [L] bool.
        ratio: [blocks] u or gamma of each block, in (0, 1]; a fixed grid of them in evaluation.
        rule: how masks are drawn.
        generator: chooses which tokens.
    """
    block = np.arange(len(supervised)) // rule.block_size
    count = np.bincount(block[supervised], minlength=len(ratio))  # n
    # The epsilon keeps u = m / n from rounding up to m + 1 where u n is a whole number.
    masked_count = np.ceil(ratio * count - 1e-9) if rule.sampling == "elbo" else np.rint(ratio * count)  # m
    # The rank of each supervised token within its block, in random order: sort by (block, key) and count from the block's start.
    (tokens,) = np.nonzero(supervised)
    order = tokens[np.lexsort((generator.random(len(supervised))[tokens], block[tokens]))]
    starts = np.cumsum(count) - count
    rank = np.arange(len(order)) - starts[block[order]]
    masked = np.zeros(len(supervised), dtype=bool)
    masked[order[rank < masked_count[block[order]]]] = True
    weight = np.where(masked, _slot_weight(count, masked_count, ratio, rule)[block], 0.0)
    return Mask(masked, weight)


def _slot_weight(count: np.ndarray, masked_count: np.ndarray, ratio: np.ndarray, rule: MaskRule) -> np.ndarray:
    """[blocks] the weight of each mask slot of a block."""
    if rule.sampling == "reference":
        return np.ones_like(ratio) if rule.weighting == "uniform" else 1.0 / ratio
    if rule.weighting == "uniform":
        return 2.0 * count / (count + 1.0)
    return count / np.maximum(masked_count, 1.0)
