"""What a backend is, and what the backends share.

A backend does two things: ``install`` prepares the model once, ``inputs`` turns the layout of one micro-batch into keywords
of the model's forward. ``dense`` hands a mask to the model's own attention; the others are attention functions of ours that
transformers' ``AttentionInterface`` routes every layer to, and the layout travels to them as a keyword (``Routed``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from hf_sft.attention.layout import Layout

LAYOUT_KEY = "hf_sft_layout"
# transformers treats names that contain sdpa, flash or flex_attention specially: ours must not.
_PREFIX = "hf_sft_"

HostPart = Callable[[Layout], dict[str, Any]]


class Rules(NamedTuple):
    """What a layer asks of its attention beside its streams, under the names of transformers' ``AttentionInterface``.

    Attributes:
        scaling: factor on the scores; ``1 / sqrt(E)`` by default.
        sliding_window: the layer's own window in tokens.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        s_aux: [H] attention sinks: one more score per head that takes probability and adds no value (gpt-oss).
    """

    scaling: float | None = None
    dropout: float = 0.0
    sliding_window: int | None = None
    softcap: float | None = None
    s_aux: Tensor | None = None


class Backend(Protocol):
    """What the trainer and the self-check need of a backend.

    Attributes:
        name: what users call it.
        half_only: its kernels take bfloat16 and float16 alone, so that a float32 model runs under autocast.
    """

    name: str
    half_only: bool

    def install(self, model: PreTrainedModel) -> None:
        """Prepare ``model`` (without PEFT or engine wrappers) for packed rows. Raises ValueError if it cannot be."""

    def inputs(self, model: PreTrainedModel, layout: Layout) -> dict[str, Any]:
        """Keywords of the model's forward that carry the layout."""

    def host_part(self, model: PreTrainedModel) -> HostPart | None:
        """What the loader's workers can make of a batch's layout, as keys of the batch that ``Layout.from_batch`` reads; None:
        nothing. It is pickled, and reads what the layout has on the host."""


class Routed:
    """A backend that is an attention function: registered under ``hf_sft_NAME``, the layout reaches it as ``hf_sft_layout``.

    Attributes:
        name: the backend's name.
        route: what it is registered as instead, where its name is special to transformers.
        function: takes what every function of ``AttentionInterface`` takes: module, query [1, H, T, E], key and value
            [1, K, T, E], mask, options; returns [1, T, H, E] and None. Without a layout it runs like sdpa.
    """

    name: str
    route: str | None = None
    half_only: bool = False
    function: Callable[..., tuple[Tensor, None]]

    def install(self, model: PreTrainedModel) -> None:
        layer_windows(model.config)  # kinds of layers that take their window from the mask would lose it
        can_route = getattr(model, "_can_set_attn_implementation", None)
        if can_route is not None and not can_route():
            raise ValueError(f"{type(model).__name__} computes its attention by itself and calls no function of ours")
        routed = _PREFIX + (self.route or self.name)
        AttentionInterface.register(routed, type(self).function)
        # Calls without a layout (generation in a callback, say) get ordinary masks and run like sdpa.
        AttentionMaskInterface.register(routed, sdpa_mask)
        if not is_routed(model):
            model._hf_sft_own_attention = model.config._attn_implementation  # type: ignore[assignment]
        model.set_attn_implementation(routed)

    def inputs(self, model: PreTrainedModel, layout: Layout) -> dict[str, Any]:
        # A 4-D mask is handed through as it is, so that no T x T mask is built. It forbids everything: a model that drops
        # the layout on the way cannot pass the self-check with it.
        closed = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=layout.doc.device)
        return {"attention_mask": closed, LAYOUT_KEY: layout, **no_router_loss(model)}

    def host_part(self, model: PreTrainedModel) -> HostPart | None:
        return None


def no_router_loss(model: PreTrainedModel) -> dict[str, bool]:
    """Where a config asks for it, transformers takes any mask for one of padding and fails; ``models.routers`` has that loss."""
    asks = getattr(model.config.get_text_config(), "output_router_logits", False)
    return {"output_router_logits": False} if asks else {}


def is_routed(model: PreTrainedModel) -> bool:
    """Does the model's attention run through one of our functions?"""
    return str(model.config._attn_implementation).startswith(_PREFIX)


def restore_attention(model: PreTrainedModel) -> str:
    """Put the attention back that the model had before a backend was installed; returns its name."""
    if is_routed(model):
        model.set_attn_implementation(str(model._hf_sft_own_attention))
    return model.config._attn_implementation


def layer_windows(config: Any) -> dict[str, int | None]:
    """The sliding window of each kind of layer (None: sees the whole document).

    Models with one kind of layer have one entry; those with several (Gemma 2 and 3, Qwen with ``use_sliding_window``) have the
    names that their ``layer_types`` use, which are also the keys of the mask dictionary that their forward takes.

    Raises:
        ValueError: for kinds of layers whose rule is not known here, such as chunked attention.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or []))
    if not kinds:
        return {"full_attention": window}
    if unknown := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        raise ValueError(f"layers of type {', '.join(unknown)} follow a rule that packed attention does not know")
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def refuse_dropout(backend: str, probability: float) -> None:
    """Raises ValueError for attention dropout, which ``backend`` has not."""
    if probability:
        raise ValueError(
            f"attention dropout is {probability:g}, and the {backend} backend has none: set attention_dropout to 0 in the "
            "model's config, or choose attention_backend segment or dense"
        )


def refuse_sinks(backend: str, rules: Rules) -> None:
    """Raises ValueError for attention sinks, which ``backend`` has not."""
    if rules.s_aux is not None:
        raise ValueError(f"the {backend} backend has no attention sinks: choose attention_backend segment or dense")


def common_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in autocast's type where it is on, as SDPA takes them: norms on queries and keys leave these in float32."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def sent_to(made: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``; a GPU takes it from pinned memory while the host goes on."""
    if device.type != "cuda" or made.device.type != "cpu":
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)
