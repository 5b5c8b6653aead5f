"""``magi``: the rule as pairs of ranges for MagiAttention's kernel (Hopper GPUs and newer; an optional install).

Shapes: T tokens of the packed row, H query heads, K key-value heads, E head width, n pairs of ranges.

A pair says that the queries of one range see the keys of another, all of them (type 0) or causally (type 1, aligned at the
bottom right). Ranges of queries may overlap (MagiAttention 1.0.3 and later), so that three kinds of pairs are the whole rule::

    clean stream of a document   sees itself causally
    block of a noisy stream      sees the clean stream before its anchor, all of it
                                 and itself causally
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sft.attention.layout import Layout
from hf_sft.attention.protocol import Routed, Rules, common_dtype, layer_windows, refuse_dropout, refuse_sinks
from hf_sft.attention.segment import with_layout

FULL, CAUSAL = 0, 1
_INSTALL = (
    "attention_backend magi needs MagiAttention 1.0.3 or later and a Hopper GPU or newer ({error}). It is built from source: "
    "git clone --recursive https://github.com/SandAI-org/MagiAttention && pip install --no-build-isolation ./MagiAttention; "
    "or choose attention_backend flex or segment"
)


class Ranges(NamedTuple):
    """Pairs of ranges of rows: ``queries`` and ``keys`` [n, 2] int32, begin and end; ``kinds`` [n] int32, FULL or CAUSAL."""

    queries: Any
    keys: Any
    kinds: Any


def attention_ranges(layout: Layout) -> Ranges:
    """The rule of ``Layout.allowed`` as numpy arrays, sorted by query.

    Blocks are known on the device only: with noisy streams this waits for it, once per micro-batch.
    """
    lengths = np.array(layout.doc_lengths, dtype=np.int64)
    first = np.cumsum(lengths) - lengths
    if layout.block is None or layout.limit is None:
        own = np.stack([first, first + lengths], axis=1)
        return _sorted([(own, own, CAUSAL)])
    assert layout.pieces is not None, "noisy streams come with pieces"
    block, limit = torch.stack([layout.block, layout.limit]).cpu().numpy()
    clean = np.stack([first, first + np.array([length for length, _ in layout.pieces], dtype=np.int64)], axis=1)
    first_of_row = np.repeat(first, lengths)
    begins = np.flatnonzero(np.diff(block, prepend=-2))  # clean streams stand between the blocks of two documents
    ends = np.append(begins[1:], len(block))
    noisy = block[begins] >= 0
    begins, ends = begins[noisy], ends[noisy]
    blocks = np.stack([begins, ends], axis=1)
    start, anchor = first_of_row[begins], limit[begins]
    before = np.stack([start, start + anchor], axis=1)
    seen = anchor > 0
    return _sorted([(clean, clean, CAUSAL), (blocks[seen], before[seen], FULL), (blocks, blocks, CAUSAL)])


def _sorted(parts: list[tuple[np.ndarray, np.ndarray, int]]) -> Ranges:
    queries, keys = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    kinds = np.concatenate([np.full(len(part[0]), part[2]) for part in parts])
    order = np.argsort(queries[:, 0], kind="stable")
    return Ranges(*(np.ascontiguousarray(x[order], dtype=np.int32) for x in (queries, keys, kinds)))


@with_layout
def magi_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rules: Rules) -> Tensor:
    """Attention over a packed row.

    Raises:
        ValueError: a sliding window, attention dropout, attention sinks; MagiAttention is not installed or too old.
    """
    refuse_dropout("magi", rules.dropout)
    _refuse_window(rules.sliding_window)
    refuse_sinks("magi", rules)
    ranges, longest = layout.kept("magi", lambda: _on_device(attention_ranges(layout), query.device))
    rows = (x[0].transpose(0, 1).contiguous() for x in common_dtype(query, key, value))  # [T, H, E], [T, K, E]
    kernel = load_kernel()
    output = kernel(*rows, ranges.queries, ranges.keys, **_options(kernel, ranges.kinds, longest, rules))[0]
    return output[None].to(query.dtype)


def _on_device(ranges: Ranges, device: torch.device) -> tuple[Ranges, dict[str, int]]:
    """The ranges as tensors, and the lengths of the longest ones."""
    longest = {
        "max_seqlen_q": int((ranges.queries[:, 1] - ranges.queries[:, 0]).max()),
        "max_seqlen_k": int((ranges.keys[:, 1] - ranges.keys[:, 0]).max()),
    }
    return Ranges(*(torch.from_numpy(part).to(device) for part in ranges)), longest


def _options(kernel: Callable[..., Any], kinds: Tensor, longest: dict[str, int], rules: Rules) -> dict[str, Any]:
    """The keywords that this release of the kernel takes; what carries meaning must be among them."""
    known = inspect.signature(kernel).parameters
    meaning = {"attn_type_map": kinds} | ({} if rules.scaling is None else {"softmax_scale": rules.scaling})
    meaning |= {"softcap": rules.softcap} if rules.softcap else {}
    if missing := meaning.keys() - known.keys():
        raise ValueError(
            f"this release of MagiAttention does not take {', '.join(sorted(missing))}: update it, or choose "
            "attention_backend flex or segment"
        )
    return meaning | {name: value for name, value in longest.items() if name in known}


def load_kernel() -> Callable[..., Any]:
    """MagiAttention's ``flex_flash_attn_func``. Raises ValueError with the way to install it."""
    try:
        from magi_attention.api import flex_flash_attn_func
    except ImportError as error:
        raise ValueError(_INSTALL.format(error=error)) from error
    return flex_flash_attn_func


def _refuse_window(window: int | None) -> None:
    if window is not None:
        raise ValueError(
            f"a layer has a sliding window of {window} tokens, which the magi backend's ranges do not say: choose "
            "attention_backend flex, segment or dense"
        )


class Magi(Routed):
    """MagiAttention's kernel over ranges."""

    name = "magi"
    half_only = True
    function = staticmethod(magi_attention)

    def install(self, model: PreTrainedModel) -> None:
        load_kernel()
        for window in layer_windows(model.config).values():
            _refuse_window(window)
        refuse_dropout("magi", getattr(model.config.get_text_config(), "attention_dropout", None) or 0.0)
        super().install(model)
