"""WeDLM's two streams of a document: the clean one, and a noisy one whose blocks put what is observed before what is masked.

Shapes: L tokens of the document, S tokens of the noisy stream.

A document of 6 tokens in blocks of 4; positions 1 and 4 are masked (M). Each noisy token keeps its logical position::

    clean stream                 a0 a1 a2 a3 a4 a5
    noisy stream, full           a0 a2 a3 M1 | a5 M4        anchors 0, 4: a block sees the clean stream before its anchor
    noisy stream, elided         a2 a3 M1 | a5 M4           anchors 1, 4

Elision is exact: observed tokens before the first mask slot see what they see in the clean stream, so their states stand there
already; they are dropped and the block's anchor moves up to the first mask slot. Blocks without a mask slot are dropped whole.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from hf_sft.attention.layout import Group


@dataclass(frozen=True)
class NoisyStream:
    """The noisy stream of one document.

    Attributes:
        pos: [S] int, logical position of each token in the document; mask slots keep theirs.
        slot: [S] bool, True for mask slots.
        block: [S] int, block of each token in the document.
        anchor: [S] int, the clean stream is seen at positions below it.
    """

    pos: np.ndarray
    slot: np.ndarray
    block: np.ndarray
    anchor: np.ndarray


def noisy_stream(masked: np.ndarray, block_size: int, *, elide: bool = True) -> NoisyStream:
    """Lay out the noisy stream of a document.

    Args:
        masked: [L] bool, positions that are masked.
        block_size: tokens per block.
        elide: drop what stands in the clean stream already; without it all L tokens stand in the stream, in every block
            observed tokens first (the reference layout).
    """
    length = len(masked)
    pos = np.arange(length)
    block = pos // block_size
    first = np.full(block[-1] + 1 if length else 0, length)  # first mask slot of each block; length: it has none
    np.minimum.at(first, block[masked], pos[masked])
    anchor = first if elide else np.arange(len(first)) * block_size
    order = np.lexsort((pos, masked, block))  # by block, observed before masked, then by position
    if elide:
        order = order[(first[block[order]] < length) & (order >= first[block[order]])]
    return NoisyStream(order, masked[order], block[order], anchor[block[order]])


def group_blocks(stream: NoisyStream, most: int = 128) -> list[Group]:
    """Consecutive blocks in groups of up to ``most`` tokens (a larger block is a group of its own).

    Larger groups mean fewer calls, smaller ones less attention that the rule forbids.
    """
    borders = np.flatnonzero(np.diff(stream.block, prepend=-1)).tolist() + [len(stream.block)]
    groups: list[Group] = []
    for start, end in itertools.pairwise(borders):
        anchor = int(stream.anchor[start])
        if groups and groups[-1].length + end - start <= most:
            groups[-1] = Group(groups[-1].length + end - start, anchor, groups[-1].lower)
        else:
            groups.append(Group(end - start, anchor, anchor))
    return groups
