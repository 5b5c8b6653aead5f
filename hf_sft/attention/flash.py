"""``flash``: whole causal documents, told apart by their cumulative lengths, on FlashAttention's kernels (CUDA).

Shapes: T tokens of the packed row, D documents, H query heads, K key-value heads (H divisible by K), E head width.

torch's own ``varlen_attn`` (FlashAttention, arXiv 2307.08691) is used where it can say what a layer needs; soft caps on scores
need the ``flash-attn`` package. A sliding window of w tokens, pos[q] - pos[k] < w, is w - 1 keys to the left and none to the
right: within a document, positions are distances between rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from hf_sft.attention.layout import Layout
from hf_sft.attention.protocol import Routed, Rules, common_dtype, refuse_dropout, refuse_sinks, sent_to
from hf_sft.attention.segment import with_layout
from hf_sft.checks import FLASH_REFUSED

# What the kernels take; head widths are padded to a multiple of _WIDTH_STEP.
_DEVICES = ("cuda",)
_DTYPES = (torch.bfloat16, torch.float16)
_WIDTH_STEP, _WIDEST = 8, 256
_AMPERE = (8, 0)
_INSTEAD = "choose attention_backend auto, segment or dense"


class Borders(NamedTuple):
    """Where documents begin and end: ``cumulative`` [D + 1] int32 on the device, and the length of the ``longest`` one."""

    cumulative: Tensor
    longest: int


def document_borders(layout: Layout) -> Borders:
    """From the lengths on the host, once per layout; the device is not waited for."""
    return layout.kept("flash", lambda: _borders(layout))


def _borders(layout: Layout) -> Borders:
    cumulative = np.cumsum([0, *layout.doc_lengths]).astype(np.int32)
    return Borders(sent_to(torch.from_numpy(cumulative), layout.doc.device), max(layout.doc_lengths))


@with_layout
def flash_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rules: Rules) -> Tensor:
    """Attention within each document of a packed row.

    Raises:
        ValueError: what the kernels cannot do: noisy streams, attention dropout and sinks, another device than CUDA, float32,
            heads wider than 256, soft caps without the flash-attn package.
    """
    refuse_dropout("flash", rules.dropout)
    refuse_sinks("flash", rules)
    if layout.block is not None:
        raise ValueError(FLASH_REFUSED)
    query, key, value = common_dtype(query, key, value)
    _refuse_what_kernels_lack(query, value)
    cumulative, longest = document_borders(layout)
    rows, width = _rows(query, key, value), value.shape[-1]
    scale = query.shape[-1] ** -0.5 if rules.scaling is None else rules.scaling
    # A window that ends no document is left out, so that the kernel takes its causal path.
    reach = rules.sliding_window or longest
    options: dict[str, Any] = {"window_size": (-1, 0) if reach >= longest else (reach - 1, 0)}
    if rules.softcap is None:
        kernel = layout.kept("varlen_attn", load_varlen)
        options |= {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    else:
        kernel = layout.kept("flash_attn", load_flash_attn)
        deterministic = torch.are_deterministic_algorithms_enabled()
        options |= {"softmax_scale": scale, "causal": True, "softcap": rules.softcap, "deterministic": deterministic}
    output = kernel(*rows, cumulative, cumulative, longest, longest, **options)
    return output[None, :, :, :width]


def _rows(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """[T, H, E] and twice [T, K, E], all of one width that the kernels take: zeros add nothing to scores, and are cut off."""
    wide = -(-max(query.shape[-1], value.shape[-1]) // _WIDTH_STEP) * _WIDTH_STEP
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    return tuple(x if x.shape[-1] == wide else pad(x, (0, wide - x.shape[-1])) for x in rows)


def load_varlen() -> Callable[..., Any]:
    """torch's ``varlen_attn``. Raises ValueError where this release has none, or another one than is called here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise ValueError(
            f"attention_backend flash needs torch 2.11 or later ({error}): update it, or {_INSTEAD}"
        ) from error
    _require(varlen_attn, ("scale", "window_size", "enable_gqa"), f"torch {torch.__version__}")
    return varlen_attn


def load_flash_attn() -> Callable[..., Any]:
    """``flash_attn_varlen_func``, for soft caps. Raises ValueError with the way to install it."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise ValueError(
            "a layer caps its attention scores (softcap), which torch's varlen_attn cannot, and the flash-attn package is not "
            f"there ({error}): pip install flash-attn --no-build-isolation, or {_INSTEAD}"
        ) from error
    _require(flash_attn_varlen_func, ("softcap", "window_size", "deterministic"), "this release of flash-attn")
    return flash_attn_varlen_func


def _require(kernel: Callable[..., Any], names: tuple[str, ...], release: str) -> None:
    if missing := [name for name in names if name not in inspect.signature(kernel).parameters]:
        raise ValueError(f"{release} does not take {', '.join(missing)}: update it, or {_INSTEAD}")


def _refuse_what_kernels_lack(query: Tensor, value: Tensor) -> None:
    if query.device.type not in _DEVICES:
        raise ValueError(f"the flash backend runs on CUDA alone, and the model is on {query.device}: {_INSTEAD}")
    if query.dtype not in _DTYPES:
        raise ValueError(
            f"the flash backend takes bfloat16 and float16 alone, and queries are {query.dtype}: set bf16 to true, or {_INSTEAD}"
        )
    _refuse_width(max(query.shape[-1], value.shape[-1]))


def _refuse_width(width: int) -> None:
    if width > _WIDEST:
        raise ValueError(f"heads are {width} wide, and flash kernels take up to {_WIDEST}: {_INSTEAD}")


class Flash(Routed):
    """FlashAttention's kernels over cumulative lengths."""

    name = "flash"
    route = "varlen"
    half_only = True
    function = staticmethod(flash_attention)

    def install(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        refuse_dropout("flash", getattr(config, "attention_dropout", None) or 0.0)
        _refuse_width(getattr(config, "head_dim", None) or 0)
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < _AMPERE:
            raise ValueError(f"flash kernels need a GPU of compute capability 8.0 (Ampere) or newer: {_INSTEAD}")
        load_varlen()
        if getattr(config, "attn_logit_softcapping", None):
            load_flash_attn()
        super().install(model)

    def inputs(self, model: PreTrainedModel, layout: Layout) -> dict[str, Any]:
        document_borders(layout)  # on its way to the device before the first layer asks for it
        return super().inputs(model, layout)
