"""The load-balancing loss of mixtures of experts, from what their routers said in a forward of the whole model.

With E experts, k of them per token, and over the tokens and layers of one forward f_e the share of tokens that were sent to
expert e (so that sum_e f_e = k) and P_e the mean probability that routers gave it (Fedus et al., arXiv 2101.03961, eq. 4 to 6):

    loss = E * sum_e f_e * P_e

It is a mean per forward, as in transformers, and not a sum over tokens: a step divides it by its number of micro-batches, so it
depends a little on how the step is cut. transformers' own function cannot be asked for it: it takes the model's attention mask
for one of padding, which a packed layout is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sft.models.wrappers import base_model


class RouterRecorder:
    """Records router logits while ``recording``; hooks stay on the routers and do nothing outside.

    Args:
        model: a causal LM, bare or with PEFT.

    Attributes:
        routers: how many there are; 0 for a model that is no mixture of experts, or does not show its routers.
    """

    def __init__(self, model: Any) -> None:
        base = base_model(model)
        config = base.config.get_text_config()
        self.top_k: int = getattr(config, "num_experts_per_tok", None) or 1
        self._logits: list[Tensor] | None = None
        kind, index = _router_class(base)
        found = [] if kind is None else [module for module in base.modules() if isinstance(module, kind)]
        self.routers = len(found)
        for router in found:
            router.register_forward_hook(lambda _module, _args, output: self._record(output, index))

    def _record(self, output: Any, index: int) -> None:
        if self._logits is not None:  # not in the second forward of activation checkpointing
            self._logits.append(output[index] if isinstance(output, tuple) else output)

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Within this context one forward of the model fills the list: logits [tokens, E] of each router."""
        found: list[Tensor] = []
        self._logits = found
        try:
            yield found
        finally:
            self._logits = None

    def loss(self, logits: list[Tensor], mask: Tensor | None = None) -> Tensor:
        """The load-balancing loss [] float32 of recorded ``logits``.

        Args:
            mask: [B, L] 1 on tokens, 0 on padding; None: all are tokens.
        """
        keep = None if mask is None else mask.reshape(-1).bool()
        counts = shares = total = torch.zeros((), device=logits[0].device)
        for scores in logits:
            scores = scores.reshape(-1, scores.shape[-1])
            probabilities = scores.float().softmax(-1)
            chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(self.top_k, dim=-1).indices, 1.0)
            weight = torch.ones_like(probabilities[:, :1]) if keep is None else keep[:, None].float()
            counts = counts + (chosen * weight).sum(0)
            shares = shares + (probabilities * weight).sum(0)
            total = total + weight.sum()
        return (counts * shares).sum() * (logits[0].shape[-1] / total.square())


def _router_class(base: nn.Module) -> tuple[type | None, int]:
    """The class of the model's routers, and which of their outputs the logits are, as transformers records them."""
    for module in base.modules():
        known = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if known is not None:
            known = known[0] if isinstance(known, (list, tuple)) else known
            return (known, 0) if isinstance(known, type) else (known.target_class, known.index)
    return None, 0
