"""The table of backends: lowerings of the packed layout to what a Hugging Face model can run.

| name    | made from the layout                                              | where                              |
|---------|-------------------------------------------------------------------|------------------------------------|
| dense   | a mask [1, 1, T, T] for the model's own attention; the reference  | everywhere                         |
| segment | SDPA per document, and per group of blocks in noisy streams       | everywhere                         |
| flash   | cumulative lengths for FlashAttention's kernels                   | CUDA; the causal objective alone   |
| flex    | FlexAttention over lists of tiles                                 | CUDA; forward passes on a CPU      |
| magi    | ranges of queries and keys for MagiAttention                      | Hopper GPUs and newer, no windows  |
"""

from __future__ import annotations

from hf_sft.attention.dense import Dense
from hf_sft.attention.flash import Flash
from hf_sft.attention.flex import Flex
from hf_sft.attention.magi import Magi
from hf_sft.attention.protocol import Backend, layer_windows, restore_attention
from hf_sft.attention.segment import Segment, segment_attention
from hf_sft.checks import FLASH_REFUSED

__all__ = [
    "BACKENDS",
    "BACKEND_NAMES",
    "Backend",
    "Segment",
    "backend_named",
    "layer_windows",
    "restore_attention",
    "segment_attention",
]

# What trains on every machine, and what needs a device or a package of its own.
BACKENDS: dict[str, Backend] = {"dense": Dense(), "segment": Segment()}
_ELSEWHERE: dict[str, Backend] = {"flash": Flash(), "flex": Flex(), "magi": Magi()}
BACKEND_NAMES = (*BACKENDS, *_ELSEWHERE)


def backend_named(name: str, *, wedlm: bool = False) -> Backend:
    """The backend called ``name``, for causal layouts or for WeDLM's.

    Raises:
        ValueError: an unknown name; ``flash`` for WeDLM, whose rule it cannot say.
    """
    if name == "flash" and wedlm:
        raise ValueError(FLASH_REFUSED)
    found = (BACKENDS | _ELSEWHERE).get(name)
    if found is None:
        raise ValueError(
            f"attention_backend {name!r} is unknown; choose auto or one of {', '.join(BACKENDS | _ELSEWHERE)}"
        )
    return found
