"""Answers of one model: batches or one prompt as it is written, in parallel for WeDLM, else token by token."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_sft.decoding.draws import Draws
from hf_sft.decoding.pace import Pace
from hf_sft.decoding.passes import Decoder, Row, input_device
from hf_sft.decoding.stepwise import StepDecoder, padding_error, padding_tolerance
from hf_sft.generation import check_prompts, check_sampling, stop_tokens, wedlm_decoder
from hf_sft.models.loading import known_positions
from hf_sft.models.mask_token import recorded_mask_token
from hf_sft.models.wrappers import base_model, evaluating

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """New tokens and what they cost.

    Attributes:
        tokens: an end of turn is the last of them.
        forwards: passes through the network; the first one, which also takes the prompt, counts.
        processed: tokens and mask slots that went through the network after the prompt; see ``generation.WeDLMOutput``.
        stopped: the last token is an end of turn.
    """

    tokens: list[int]
    forwards: int
    processed: int
    stopped: bool


class Answerer:
    """Decodes prompts with one model: in parallel if it was trained as WeDLM (it names a mask token), else token by token.

    Nothing of the model is changed afterwards, neither its mode nor its configs, and greedy decoding leaves every random number
    generator alone. Its generation config says where turns end, and nothing else. The model may be bare or with PEFT, in training
    mode, with activation checkpointing, and prepared for packed rows.

    A prompt and its answer never have more tokens than the positions that the model was made for: where they would,
    ``max_new_tokens`` is less for that prompt (``positions``, None where the model names none).

    Args:
        max_new_tokens: per prompt, the end of turn included.
        temperature, top_p, top_k: see ``generation.generate_wedlm``.
        seed: of the draws at a temperature; those of a batch depend on it and on the number of the batch (``batches``).
        parallel: options of ``generate_wedlm`` (window, entropy_threshold, distance_penalty, verify).
        autoregressive: token by token also where the model was trained as WeDLM.
        together: for engines that gather weights (ZeRO-3, FSDP2), where all processes must make the same number of forwards. It
            is called before each forward with "this process still has work" and returns whether any process has. All processes
            have to call this object the same number of times, with no prompts where they have none left.

    Raises:
        ValueError: options out of their range, or of parallel decoding where there is none.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        parallel: Mapping[str, Any] | None = None,
        autoregressive: bool = False,
        together: Callable[[bool], bool] | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        check_sampling(temperature, top_p, top_k, seed)
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.sampling, self.seed = (float(temperature), float(top_p), int(top_k)), seed
        self.parallel, self.pace = dict(parallel or {}), Pace(model, together)
        base = base_model(model)
        self.mask = recorded_mask_token(base)
        self.is_parallel = self.mask is not None and not autoregressive
        if self.parallel and not self.is_parallel:
            raise ValueError(self._no_parallel())
        self.stops = stop_tokens(base)
        self.positions = known_positions(base.config)
        self.batches = 0
        self.streamed = Answer([], 0, 0, False)  # of ``stream``, as far as it has come
        self._pads: bool | None = None  # whether batches may be padded, once it has been measured

    def _no_parallel(self) -> str:
        named = ", ".join(self.parallel)
        if self.mask is None:
            return (
                "the model names no mask token, so it was not trained as WeDLM and is decoded token by token; leave out "
                f"{named}"
            )
        return f"{named} decodes in parallel, and autoregressive does not; leave out one of them"

    def __call__(self, prompts: list[list[int]]) -> list[Answer]:
        """The answers of one batch of token ids, decoded together.

        Raises:
            ValueError: a prompt without tokens, with unknown ones, or that leaves no position for an answer.
        """
        rooms = self._rooms(prompts)
        draws = self._draws()
        with torch.no_grad(), evaluating(self.model):
            rows = self._decode(prompts, rooms, draws) if prompts else []
            self.pace.wait()
        return [self._answer(row) for row in rows]

    def stream(self, prompt: list[int]) -> Iterator[list[int]]:
        """New tokens of one prompt as they become sure; ``streamed`` is the answer so far, also when this is left early."""
        self.streamed, shown = Answer([], 0, 0, False), 0
        rows = self._decoder([prompt], self._rooms([prompt]), self._draws()).stream()
        while True:
            # What asks for the next tokens runs in its own modes: they are set for each pass alone.
            with torch.no_grad(), evaluating(self.model):
                row = next(rows, None)
            if row is None:
                return
            self.streamed = self._answer(row)
            if len(row.tokens) > shown:
                new, shown = row.tokens[shown:], len(row.tokens)
                yield new

    def text(self, answer: Answer) -> str:
        """What the answer says: without its end of turn, special tokens skipped."""
        written = answer.tokens[:-1] if answer.stopped else answer.tokens
        return str(self.tokenizer.decode(written, skip_special_tokens=True))

    def _answer(self, row: Row) -> Answer:
        stopped = bool(row.tokens) and row.tokens[-1] in self.stops
        return Answer(row.tokens, row.forwards, row.processed, stopped)

    def _rooms(self, prompts: list[list[int]]) -> list[int]:
        """New tokens that each prompt may get."""
        if prompts:
            check_prompts(prompts, base_model(self.model))
        known = self.positions
        if known is None:
            return [self.max_new_tokens] * len(prompts)
        for number, prompt in enumerate(prompts):
            if len(prompt) >= known:
                raise ValueError(
                    f"prompt {number} of the batch has {len(prompt)} tokens, and the model was made for {known} positions, which "
                    "leaves none for an answer; shorten it"
                )
        return [min(self.max_new_tokens, known - len(prompt)) for prompt in prompts]

    def _draws(self) -> Draws:
        """Those of the next batch."""
        generator = None
        if self.seed is not None:
            state = np.random.SeedSequence([self.seed, self.batches]).generate_state(1, np.uint64)
            generator = torch.Generator(input_device(base_model(self.model))).manual_seed(int(state[0]) >> 1)
        self.batches += 1
        return Draws(*self.sampling, generator)

    def _decoder(self, prompts: list[list[int]], rooms: list[int], draws: Draws) -> Decoder | StepDecoder:
        if self.is_parallel:
            return wedlm_decoder(self.model, prompts, rooms, draws, forward=self.pace, **self.parallel)
        return StepDecoder(self.model, prompts, rooms, draws, stops=self.stops, hidden=self.mask, forward=self.pace)

    def _decode(self, prompts: list[list[int]], rooms: list[int], draws: Draws) -> list[Row]:
        lengths = list(map(len, prompts))
        if self.is_parallel or len(set(lengths)) == 1 or self._may_pad():
            return self._decoder(prompts, rooms, draws).run()
        rows: dict[int, Row] = {}
        for length in sorted(set(lengths)):
            places = [place for place, other in enumerate(lengths) if other == length]
            decoder = self._decoder([prompts[place] for place in places], [rooms[place] for place in places], draws)
            rows |= dict(zip(places, decoder.run(), strict=True))
        return [rows[place] for place in range(len(prompts))]

    def _may_pad(self) -> bool:
        """Whether padding changes nothing but the rounding: measured once, with the model as it is."""
        if self._pads is None:
            error = padding_error(self.model, self.pace)
            self._pads = error <= padding_tolerance(base_model(self.model))
            if not self._pads:
                logger.warning(
                    "Padding moves this model's logits by %.1e of their spread: only prompts of the same length are answered "
                    "together.",
                    error,
                )
        return self._pads
