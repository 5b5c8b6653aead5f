"""Decoding token by token: batches of prompts of different lengths, padded at the left where that changes nothing.

Shapes: B rows that are still being decoded, W columns so far (padding, prompt, new tokens), Q columns of a pass, V tokens of the
vocabulary.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_sft.decoding.draws import Draws, without_token
from hf_sft.decoding.passes import Row, input_device
from hf_sft.models.vocabulary import vocabulary_rows
from hf_sft.models.wrappers import base_model

_SAME, _SAME_LOW_PRECISION = 1e-4, 5e-2  # share of the logits' spread, as in attention/selfcheck.py
_CACHES = ("past_key_values", "cache_params")  # what models call theirs


class StepDecoder:
    """Decodes one batch of prompts, a token of each row per forward.

    Args:
        model: a causal LM in evaluation mode, bare or with PEFT.
        prompts: token ids, at least one each.
        max_new_tokens: of each row.
        stops: tokens that end a row.
        hidden: a token that is never written.
        forward: what is called in place of ``model``, with the same arguments.
    """

    def __init__(
        self,
        model: Any,
        prompts: list[list[int]],
        max_new_tokens: list[int],
        draws: Draws,
        *,
        stops: Collection[int] = (),
        hidden: int | None = None,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        self.forward, self.draws, self.stops, self.hidden = forward or model, draws, stops, hidden
        self.call = _Call(base_model(model))
        device = input_device(base_model(model))
        width = max(map(len, prompts))
        padded = [[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts]  # any token: nobody sees it
        self.tokens = torch.tensor(padded, device=device)
        self.seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
        self.room = max_new_tokens
        self.new: list[list[int]] = [[] for _ in prompts]
        self.rows = list(range(len(prompts)))

    def run(self) -> list[Row]:
        """Decode until every row has ended."""
        while self.rows:
            self._step()
        return [self._row(new) for new in self.new]

    def stream(self) -> Iterator[Row]:
        """Decode the only prompt; after each pass, what there is so far."""
        while self.rows:
            self._step()
            yield self._row(self.new[0])

    def _row(self, new: list[int]) -> Row:
        count = len(new)
        return Row(list(new), list(range(1, count + 1)), count, count)

    def _step(self) -> None:
        """One pass: a token for each row, and rows that have ended go."""
        tokens = self.draws(without_token(self.logits(), self.hidden))
        keep = []
        for place, (row, token) in enumerate(zip(self.rows, tokens.tolist(), strict=True)):
            self.new[row].append(token)
            if token not in self.stops and len(self.new[row]) < self.room[row]:
                keep.append(place)
        self.append(tokens)
        if keep and len(keep) < len(self.rows):
            self._select(torch.tensor(keep, device=tokens.device))
        self.rows = [self.rows[place] for place in keep]

    def logits(self) -> Tensor:
        """[B, V] of the next tokens."""
        return self.call(self.forward, self.tokens, self.seen)

    def append(self, tokens: Tensor) -> None:
        """Put [B] tokens behind the rows."""
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        self.seen = torch.cat([self.seen, torch.ones_like(tokens)[:, None]], dim=1)

    def _select(self, keep: Tensor) -> None:
        self.tokens, self.seen = self.tokens[keep], self.seen[keep]
        self.call.select(keep)


class _Call:
    """Forward passes over growing rows, with the model's own cache, if it has one."""

    def __init__(self, base: Any) -> None:
        self.parameters = inspect.signature(base.forward).parameters
        self.name = next((name for name in _CACHES if name in self.parameters), None)
        self.cache: Any = None

    def __call__(self, forward: Callable[..., Any], tokens: Tensor, seen: Tensor) -> Tensor:
        """[B, V] logits behind ``tokens`` [B, W], of which ``seen`` [B, W] is 1 where there is no padding."""
        inputs: dict[str, Any] = {"input_ids": tokens if self.cache is None else tokens[:, -1:]}
        if "position_ids" in self.parameters:
            positions = (seen.cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -inputs["input_ids"].shape[1] :]
        if self.cache is None or self.name != "cache_params":  # a state knows of no columns
            inputs["attention_mask"] = seen
        if self.name is not None:
            inputs |= {"use_cache": True} if self.cache is None else {"use_cache": True, self.name: self.cache}
        if "logits_to_keep" in self.parameters:
            inputs["logits_to_keep"] = 1
        output = forward(**inputs)
        self.cache = getattr(output, self.name, None) if self.name is not None else None
        return output.logits[:, -1].to(tokens.device)

    def select(self, keep: Tensor) -> None:
        """Keep these rows of the cache."""
        if self.cache is not None:
            self.cache.reorder_cache(keep)


@torch.no_grad()
def padding_error(model: Any, forward: Callable[..., Any] | None = None) -> float:
    """How far the padding of a batch moves a short row's logits, as a share of their spread (max - min).

    Measured on random tokens, in the pass that takes the prompt and in the one behind it.
    """
    base = base_model(model)
    rng = random.Random(0)
    rows = vocabulary_rows(base)
    long, short = ([rng.randrange(rows) for _ in range(length)] for length in (13, 4))
    error = 0.0
    batch, alone = (
        StepDecoder(model, prompts, [2] * len(prompts), Draws(), forward=forward)
        for prompts in ([long, short], [short])
    )
    for _ in range(2):
        padded, want = batch.logits()[-1].double(), alone.logits()[-1].double()
        share = float((padded - want).abs().max() / (want.max() - want.min()).clamp(min=1e-30))
        error = max(error, share) if share == share else float("inf")
        following = torch.tensor([rows // 2], device=padded.device)
        batch.append(following.expand(2))
        alone.append(following)
    return error


def padding_tolerance(base: Any) -> float:
    """The largest :func:`padding_error` that is rounding."""
    exact = base.dtype in (torch.float32, torch.float64)
    low = not exact or torch.is_autocast_enabled(input_device(base).type)
    return _SAME_LOW_PRECISION if low else _SAME
