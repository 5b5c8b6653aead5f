"""Streaming parallel decoding (WeDLM, arXiv 2512.22737): the window, its passes through the model, and what they fill.

Shapes: B rows that are still being decoded, L positions (prompt and new tokens, and one spare position at the end that takes
what belongs nowhere), Q tokens of a pass, S slots of the window, C columns of keys, V tokens of the vocabulary.

The logical positions of a row during a pass::

    0 ........ cached ........... front ................ last ......... end
    | in the cache | run: filled    | window: filled, slots  | not yet    |

A pass takes the run, the filled tokens of the window and its mask slots, in this order, under ordinary causal attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sft.attention.backends import layer_windows
from hf_sft.attention.dense import as_mask
from hf_sft.attention.protocol import is_routed
from hf_sft.decoding.cache import RowCache
from hf_sft.decoding.draws import Draws, without_token
from hf_sft.models.wrappers import base_model


@dataclass(frozen=True)
class Rules:
    """What decides which slots are filled, and with what; see ``generation.generate_wedlm``."""

    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    window: int
    entropy_threshold: float
    distance_penalty: float
    verify: bool
    draws: Draws


@dataclass
class Row:
    """A finished row."""

    tokens: list[int]
    order: list[int]
    forwards: int
    processed: int


@dataclass
class _Pass:
    """Where the rows of a pass stand, on the host: one wait for the device per pass. Two of them on the device, too."""

    cached: list[int]
    front: list[int]
    last: list[int]
    sure: list[int]
    front_B: Tensor
    last_B: Tensor

    @property
    def tokens(self) -> int:
        """Q."""
        return max(last - cached for last, cached in zip(self.last, self.cached, strict=True))

    @property
    def slots(self) -> int:
        """Upper bound of S."""
        return max(last - front for last, front in zip(self.last, self.front, strict=True))


class Decoder:
    """Decodes one batch of prompts.

    A position is *filled* when it holds a token, and *sure* when that token is part of the output: without ``verify`` these are
    the same, with it filled positions beyond the sure ones hold drafts.

    Args:
        model: a causal LM in evaluation mode, bare or with PEFT.
        prompts: token ids, at least one each.
        max_new_tokens: of each row.
        forward: what is called in place of ``model``, with the same arguments.
    """

    def __init__(
        self,
        model: Any,
        prompts: list[list[int]],
        max_new_tokens: list[int],
        rules: Rules,
        use_cache: bool,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        self.model, self.rules = forward or model, rules
        self.masks = AttentionMasks(base_model(model))
        self.cache = RowCache() if use_cache else None
        base = base_model(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._spread = len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1
        device = input_device(base)
        lengths = [len(prompt) for prompt in prompts]
        stops = [length + count for length, count in zip(lengths, max_new_tokens, strict=True)]
        positions = max(stops) + 1
        self.tokens = torch.full((len(prompts), positions), rules.mask_token_id, device=device)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
        self.start = torch.tensor(lengths, device=device)
        self.stop = torch.tensor(stops, device=device)
        self.filled = torch.arange(positions, device=device) < self.start[:, None]
        self.order = torch.zeros_like(self.tokens)  # the number of the pass after which a position was filled
        self.sure = self.start.clone()
        self.cached = torch.zeros_like(self.start)
        self.eos = torch.tensor(rules.eos_token_ids, device=device)
        self.rows = list(range(len(prompts)))
        self.prompt_lengths = lengths
        self.processed = [0] * len(prompts)
        self.finished: dict[int, Row] = {}
        self.passes = 0

    def run(self) -> list[Row]:
        """Decode until every row has ended."""
        while (place := self._next_pass()) is not None:
            self._step(place)
        return [self.finished[row] for row in sorted(self.finished)]

    def stream(self) -> Iterator[Row]:
        """Decode the only prompt; before each pass, and in the end, all that is sure so far."""
        while (place := self._next_pass()) is not None:
            sure = slice(self.prompt_lengths[0], place.sure[0])
            yield Row(self.tokens[0, sure].tolist(), self.order[0, sure].tolist(), self.passes, self.processed[0])
            self._step(place)
        yield self.finished[0]

    def _next_pass(self) -> _Pass | None:
        """Let finished rows go and say where the others stand; None: all have ended."""
        end = self._ends()
        front = torch.minimum((~self.filled).long().argmax(1), end)
        last = torch.minimum(front + self.rules.window, end)
        sure = self.sure if self.rules.verify else front
        columns = torch.stack([self.cached, front, last, sure, end]).tolist()
        keep = [i for i in range(len(self.rows)) if columns[3][i] < columns[4][i]]
        if len(keep) < len(self.rows):
            self._finish(sorted({*range(len(self.rows))} - {*keep}), columns[4])
            if not keep:
                return None
            index = torch.tensor(keep, device=end.device)
            self._select(keep, index)
            front, last = front[index], last[index]
        cached, fronts, lasts, sures = ([column[i] for i in keep] for column in columns[:4])
        return _Pass(cached, fronts, lasts, sures, front, last)

    def _ends(self) -> Tensor:
        """[B] first position that need not be decoded: behind the first filled end of turn, or behind the last token allowed."""
        if not self.eos.numel():
            return self.stop
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        ends = torch.isin(self.tokens, self.eos) & self.filled & (positions >= self.start[:, None])
        first = torch.where(ends.any(1), ends.long().argmax(1) + 1, self.stop)
        return torch.minimum(first, self.stop)

    def _finish(self, rows: list[int], ends: list[int]) -> None:
        for i in rows:
            number = self.rows[i]
            new = slice(self.prompt_lengths[number], ends[i])
            self.finished[number] = Row(
                self.tokens[i, new].tolist(), self.order[i, new].tolist(), self.passes, self.processed[number]
            )

    def _select(self, keep: list[int], index: Tensor) -> None:
        self.rows = [self.rows[i] for i in keep]
        for name in ("tokens", "filled", "order", "start", "stop", "sure", "cached"):
            setattr(self, name, getattr(self, name).index_select(0, index))
        if self.cache is not None:
            self.cache.select(index)

    def _count(self, place: _Pass) -> None:
        for row, cached, last in zip(self.rows, place.cached, place.last, strict=True):
            prompt = self.prompt_lengths[row] if self.passes == 1 else 0
            self.processed[row] += last - cached - prompt

    def _step(self, place: _Pass) -> None:
        """One pass: run the model, check drafts, fill slots, move the border of the cache."""
        self.passes += 1
        self._count(place)
        front, last = place.front_B, place.last_B
        positions, shown = self._arrange(place.tokens, last)
        logits, rank = self._forward(positions, shown, place)

        filling = None
        if place.slots:
            slots = shown.sum(1, keepdim=True) + torch.arange(place.slots, device=shown.device)
            there = slots < (last - self.cached)[:, None]
            slots = torch.where(there, slots, positions.shape[1] - 1)
            at = torch.where(there, positions.gather(1, slots), self.tokens.shape[1] - 1)
            tokens, entropy = self._predict(_take(logits, rank[slots]))
            filling = at, tokens, self._choose(entropy, at - front[:, None], there)
        if self.rules.verify:
            drafts = max(f - s for f, s in zip(place.front, place.sure, strict=True))
            self._verify(logits, rank, front, drafts + 1, filling)
        else:
            assert filling is not None, "a row that has not ended has a slot"
            self._fill(*filling)
            if self.cache is not None:
                self.cached = front

    def _arrange(self, count: int, last: Tensor) -> tuple[Tensor, Tensor]:
        """[B, Q] logical position of each token of the pass, and whether it is filled (else a slot, or padding at the end)."""
        logical = self.cached[:, None] + torch.arange(count, device=last.device)
        inside = logical < last[:, None]
        logical = logical.clamp(max=self.tokens.shape[1] - 1)
        filled = self.filled.gather(1, logical) & inside
        rank = torch.where(inside, (~filled).long(), 2)
        physical = rank.argsort(dim=1, stable=True)
        return logical.gather(1, physical), filled.gather(1, physical)

    def _needed(self, place: _Pass) -> list[int]:
        """Columns of the pass that something is predicted from, in any row: not those of the prompt, nor of what is sure."""
        first = [sure - 1 for sure in place.sure] if self.rules.verify else place.front
        bounds = zip(first, place.last, place.cached, strict=True)
        columns = sorted({column for start, end, cached in bounds for column in range(start - cached, end - cached)})
        # A model on several devices gets a count, not indices: its head may be where they are not.
        return list(range(columns[0], place.tokens)) if self._spread else columns

    def _forward(self, positions: Tensor, shown: Tensor, place: _Pass) -> tuple[Tensor, Tensor]:
        """[B, R, V] logits of the R needed columns, and for each of the Q columns its place among them (0 for the others)."""
        needed = self._needed(place)
        columns = torch.tensor(needed, device=positions.device)
        rank = torch.zeros(place.tokens, dtype=torch.long, device=positions.device)
        rank[columns] = torch.arange(len(needed), device=positions.device)
        ids = torch.where(shown, self.tokens.gather(1, positions), self.rules.mask_token_id)
        options: dict[str, Any] = {}
        if self._keeps_logits:
            options["logits_to_keep"] = len(needed) if self._spread else columns
        if self.cache is not None:
            self.cache.begin(self.cached, place.cached, ids.shape[1])
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self.masks(self.cached, positions, max(place.cached) + ids.shape[1]),
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            **options,
        )
        logits = output.logits.to(ids.device)
        return logits if self._keeps_logits else logits[:, columns], rank

    def _predict(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, V] logits to [B, S] tokens and the entropies (nats) of the untempered distributions; the mask id is excluded."""
        logits = without_token(logits, self.rules.mask_token_id)
        entropy = torch.special.entr(torch.softmax(logits, dim=-1)).sum(-1)
        return self.rules.draws(logits), entropy

    def _choose(self, entropy: Tensor, distance: Tensor, there: Tensor) -> Tensor:
        """[B, S] slots to fill: those below the threshold, else the lowest one."""
        score = torch.where(there, entropy + self.rules.distance_penalty * distance, torch.inf)
        below = score < self.rules.entropy_threshold
        lowest = torch.arange(score.shape[1], device=score.device) == score.argmin(1, keepdim=True)
        return torch.where(below.any(1, keepdim=True), below, lowest) & there

    def _fill(self, at: Tensor, tokens: Tensor, chosen: Tensor) -> None:
        """Put ``tokens`` [B, S] at the logical positions ``at`` where they are chosen."""
        self.tokens.scatter_(1, at, torch.where(chosen, tokens, self.tokens.gather(1, at)))
        self.order.scatter_(1, at, torch.where(chosen, self.passes, self.order.gather(1, at)))
        self.filled.scatter_(1, at, chosen | self.filled.gather(1, at))

    def _verify(
        self, logits: Tensor, rank: Tensor, front: Tensor, count: int, filling: tuple[Tensor, Tensor, Tensor] | None
    ) -> None:
        """Check the drafts of the run by the greedy next tokens of the rows before them, of which there are up to ``count``."""
        steps = torch.arange(count, device=front.device)
        at = self.sure[:, None] + steps  # the positions that these rows choose the tokens of
        rows = rank[(at - 1 - self.cached[:, None]).clamp(max=len(rank) - 1)]
        greedy = without_token(_take(logits, rows), self.rules.mask_token_id).argmax(-1)
        drafted = at < front[:, None]
        at = at.clamp(max=self.tokens.shape[1] - 1)
        agrees = (self.tokens.gather(1, at) == greedy) & drafted
        accepted = agrees.long().cumprod(1).sum(1, keepdim=True)
        known = self.sure[:, None] + accepted  # the first position where they differ, or the one behind the run
        choice = greedy.gather(1, accepted)
        wrong = known < front[:, None]
        if filling is not None:
            slots, tokens, chosen = filling
            # The slot right behind the run is checked at once.
            differs = wrong | ((slots[:, :1] == known) & (tokens[:, :1] != choice))
            self._fill(slots, tokens, chosen & ~differs)
        else:
            differs = wrong
        # What was drafted behind a wrong token goes with it: kept, such drafts cost more passes than they save.
        positions = torch.arange(self.tokens.shape[1], device=known.device)
        self.filled &= ~(differs & (positions > known))
        self._fill(known.clamp(max=self.tokens.shape[1] - 1), choice, known < self.stop[:, None])
        self.sure = known[:, 0] + 1
        if self.cache is not None:
            self.cached = known[:, 0]


class AttentionMasks:
    """Writes the causal rule of a pass for a model: one 4-D mask per kind of layer.

    Raises:
        ValueError: the model's attention takes no such masks, or its layers follow other rules.
    """

    def __init__(self, base: Any) -> None:
        own = base.config._attn_implementation
        if own not in ("sdpa", "eager") and not is_routed(base):
            raise ValueError(
                f"decoding in parallel needs an attention that takes 4-D masks (sdpa, eager), and the model uses {own!r}; load "
                "it with attn_implementation='sdpa'"
            )
        self.additive, self.dtype = own == "eager", base.dtype
        self.windows = layer_windows(base.config)

    def __call__(self, cached: Tensor, positions: Tensor, columns: int) -> Tensor | dict[str, Tensor]:
        """Mask(s) [B, 1, Q, C] for tokens at ``positions`` [B, Q] that stand behind ``cached`` [B] others."""
        column = torch.arange(columns, device=positions.device)
        own = cached[:, None] + torch.arange(positions.shape[1], device=positions.device)
        causal = column <= own[:, :, None]
        masks = {}
        for kind, window in self.windows.items():
            allowed = causal
            if window is not None:
                logical = column.expand(len(cached), -1).scatter(1, own, positions)
                allowed = causal & (positions[:, :, None] - logical[:, None, :] < window)
            masks[kind] = as_mask(allowed[:, None], self.additive, self.dtype)
        return masks if len(masks) > 1 else next(iter(masks.values()))


def input_device(base: Any) -> torch.device:
    """Where token ids have to be."""
    return base.get_input_embeddings().weight.device


def _take(logits: Tensor, rows: Tensor) -> Tensor:
    """[B, Q, V], [B, R] to [B, R, V]."""
    return logits.gather(1, rows[:, :, None].expand(-1, -1, logits.shape[-1]))
