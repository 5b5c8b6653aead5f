"""How tokens are drawn from logits. Shapes: V tokens of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Temperature (0: the most probable token), limits and generator of the draws; see ``generation.generate_wedlm``."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    generator: torch.Generator | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """[..., V] logits to [...] tokens."""
        if not self.temperature:
            return logits.argmax(-1)
        kept = filter_logits(logits / self.temperature, self.top_k, self.top_p)
        drawn = torch.multinomial(torch.softmax(kept, dim=-1).flatten(0, -2), 1, generator=self.generator)
        return drawn.view(logits.shape[:-1])


def without_token(logits: Tensor, token: int | None) -> Tensor:
    """A copy of [..., V] logits, in float32 at least, in which ``token`` cannot be drawn."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if token is not None:
        logits[..., token] = -torch.inf
    return logits


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """[..., V] logits with -inf for all but the ``top_k`` largest (0: all), and of these all but the smallest set of tokens
    that together have a probability of at least ``top_p`` (nucleus sampling, arXiv 1904.09751)."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1.0:
        descending, index = logits.sort(dim=-1, descending=True)
        probability = torch.softmax(descending, dim=-1)
        before = probability.cumsum(-1) - probability
        logits = logits.masked_fill((before >= top_p).gather(-1, index.argsort(-1)), -torch.inf)
    return logits
