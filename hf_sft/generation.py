"""Decoding of WeDLM networks: several tokens per forward pass (arXiv 2512.22737)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_sft.decoding.draws import Draws
from hf_sft.decoding.passes import Decoder, Rules, input_device
from hf_sft.models.loading import known_positions
from hf_sft.models.mask_token import recorded_mask_token
from hf_sft.models.vocabulary import vocabulary_rows
from hf_sft.models.wrappers import base_model, evaluating

logger = logging.getLogger(__name__)

Prompt = Sequence[int] | Tensor | np.ndarray | Mapping[str, Any]
_COOLEST = 0.001  # temperature: far below it, logits / temperature is no number
_SEEDS = 2**32  # as many as numpy takes


@dataclass(frozen=True)
class WeDLMOutput:
    """What was decoded, one entry per prompt.

    Attributes:
        sequences: the new tokens; an end of turn is the last of them.
        forwards: passes through the network; the first one, which also takes the prompt, counts.
        order: for each new token, the number of the pass (from 1) after which it was filled: the decoding order.
        processed: tokens and mask slots that went through the network, repeated ones each time, but for the prompt's first time.
    """

    sequences: list[list[int]]
    forwards: list[int]
    order: list[list[int]]
    processed: list[int]

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per pass, over all rows; 1 is autoregressive decoding."""
        return sum(map(len, self.sequences)) / sum(self.forwards)

    @property
    def prefix_cacheability(self) -> float:
        """New tokens per token instance that the network processed after the prompt, over all rows (arXiv 2512.22737).

        1 when nothing is computed twice; a window of mask slots that are computed again and again lowers it.
        """
        return sum(map(len, self.sequences)) / sum(self.processed)


def generate_wedlm(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    mask_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    max_new_tokens: int = 256,
    window: int = 16,
    entropy_threshold: float = 0.4,
    distance_penalty: float = 0.02,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    verify: bool = False,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> WeDLMOutput:
    """Decode by streaming parallel decoding (WeDLM, arXiv 2512.22737).

    Each pass takes the filled tokens that continue the prefix (the run), then the tokens already filled in the ``window``
    positions behind it, then mask slots for the others, all at their logical positions, under causal attention. The run stays in
    the key-value cache; every slot's own logits predict its own token. Filled are the slots where the entropy in nats plus
    ``distance_penalty`` times the distance from the first slot lies below ``entropy_threshold``, or else the one where this sum
    is smallest. Nothing behind a filled end of turn is decoded. The prompt goes through together with the first window: that
    is pass 1.

    With ``verify`` the result is that of greedy autoregressive decoding without the mask id, token for token: what the slots
    predict are drafts, and the next pass, which takes them as its run, also has the next-token logits that each must agree with.
    The first one that does not is replaced, and what was drafted behind it is dropped. At least one token per pass is certain.
    Window, threshold and penalty decide how much is drafted, not what comes out; a wrong draft costs little, so a higher
    threshold (even ``math.inf``: all slots) often saves passes. In 16-bit types two passes of different widths may round a tie
    between tokens differently.

    Args:
        model: a causal LM trained as WeDLM, bare or with PEFT. Its mode is put back afterwards.
        prompts: token ids of one prompt or of several; they may differ in length. What a tokenizer returns (``input_ids`` in a
            mapping) will do, but without padding.
        mask_token_id: stands at mask slots and is never written; default: what the model was saved with.
        eos_token_id: one or several ends of turn; default: the generation config's. Without any, rows run to ``max_new_tokens``.
        max_new_tokens: per prompt, the end of turn included.
        window: positions beyond the run that are looked at in one pass, as the official engine counts them.
        temperature: 0 takes the most probable token; else (at least 0.001) tokens are drawn from logits / temperature.
        top_p, top_k: draw from the most probable tokens only (1 and 0: from all), after the temperature, top_k first.
        use_cache: without, each pass recomputes everything; the tokens are the same.
        generator, seed: of the draws; at temperature 0 there are none. Draws of a batch are not those of its prompts one by one.

    Raises:
        ValueError: an argument out of its range, no mask token, a prompt without tokens or with unknown ones, a model whose
            attention takes no masks.
    """
    check_sampling(temperature, top_p, top_k, seed, generator)
    if seed is not None:
        generator = torch.Generator(input_device(base_model(model))).manual_seed(int(seed))
    draws = Draws(float(temperature), float(top_p), int(top_k), generator)
    prompt_rows = check_prompts(prompts, base_model(model))
    _check_numbers(max_new_tokens, window, entropy_threshold, distance_penalty)
    _warn_of_positions(base_model(model), max(map(len, prompt_rows)) + max_new_tokens)
    decoder = wedlm_decoder(
        model, prompt_rows, [int(max_new_tokens)] * len(prompt_rows), draws, mask_token_id=mask_token_id,
        eos_token_id=eos_token_id, window=window, entropy_threshold=entropy_threshold, distance_penalty=distance_penalty,
        verify=verify, use_cache=use_cache,
    )  # fmt: skip
    with torch.no_grad(), evaluating(model):
        rows = decoder.run()
    columns = zip(*((row.tokens, row.forwards, row.order, row.processed) for row in rows), strict=True)
    return WeDLMOutput(*map(list, columns))


def wedlm_decoder(
    model: Any,
    prompts: list[list[int]],
    max_new_tokens: list[int],
    draws: Draws,
    *,
    mask_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    window: int = 16,
    entropy_threshold: float = 0.4,
    distance_penalty: float = 0.02,
    verify: bool = False,
    use_cache: bool = True,
    forward: Callable[..., Any] | None = None,
) -> Decoder:
    """The decoder of one batch of checked prompts, with as many new tokens for each; options as in :func:`generate_wedlm`.

    Args:
        forward: called in place of the model.

    Raises:
        ValueError: options or a model that cannot be decoded in parallel.
    """
    base = base_model(model)
    _check_numbers(max(max_new_tokens), window, entropy_threshold, distance_penalty)
    if verify and draws.temperature:
        raise ValueError(
            f"verify drafts for greedy decoding, and temperature is {draws.temperature!r}; set temperature to 0, or leave out "
            "verify"
        )
    eos = stop_tokens(base, eos_token_id)
    mask = _mask_token(base, mask_token_id, eos)
    _check_model(base)
    rules = Rules(mask, eos, int(window), float(entropy_threshold), float(distance_penalty), verify, draws)
    return Decoder(model, prompts, max_new_tokens, rules, use_cache, forward)


def check_prompts(prompts: Any, base: Any) -> list[list[int]]:
    """One list of token ids per prompt.

    Raises:
        ValueError: there are none, or they are not lists of rows of the model's vocabulary.
    """
    vocabulary = vocabulary_rows(base)
    if isinstance(prompts, (str, bytes)):
        raise ValueError("prompts is text; give token ids, as tokenizer.apply_chat_template returns them")
    rows = _unpadded(prompts)
    if not isinstance(rows, Iterable):
        raise ValueError(f"prompts is {rows!r}; it must be a list of token ids, or a list of such lists")
    rows = [_unpadded(row) for row in rows]
    if not rows:
        raise ValueError("prompts is empty; give at least one prompt with at least one token (a BOS, say)")
    if not _is_list(rows[0]):
        rows = [rows]
    for number, row in enumerate(rows):
        if not _is_list(row):
            raise ValueError(
                f"prompt {number} is {row!r}, and the first one is a list; each must be a list of token ids"
            )
        if not len(row):
            raise ValueError(f"prompt {number} has no tokens; give it at least one (a BOS, say)")
        for token in map(_plain, row):
            if not _is_whole(token) or not 0 <= token < vocabulary:
                raise ValueError(
                    f"prompt {number} holds {token!r}; token ids are whole numbers from 0 to {vocabulary - 1}, the rows of the "
                    "model's vocabulary"
                )
    return [[int(token) for token in row] for row in rows]


def _unpadded(given: Any) -> Any:
    """Ids as lists: those of a tokenizer's mapping, which must hold no padding, or of an array."""
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise ValueError(
                f"a prompt has {', '.join(map(str, given)) or 'no keys'}; its token ids belong under input_ids"
            )
        if not _all_ones(given.get("attention_mask")):
            raise ValueError(
                "the attention_mask of the prompts holds zeros, and prompts are given without padding; leave padding out when "
                "they are tokenized (they may differ in length)"
            )
        given = given["input_ids"]
    return _plain(given)


def _all_ones(mask: Any) -> bool:
    mask = _plain(mask)
    return all(map(_all_ones, mask)) if _is_list(mask) else mask is None or bool(mask)


def _plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as lists and numbers."""
    return value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_numbers(max_new_tokens: int, window: int, entropy_threshold: float, distance_penalty: float) -> None:
    for name, count in (("max_new_tokens", max_new_tokens), ("window", window)):
        if not _is_whole(count) or count < 1:
            raise ValueError(f"{name} is {count!r}; it must be a whole number of at least 1")
    if not _is_number(entropy_threshold) or not entropy_threshold >= 0:
        raise ValueError(
            f"entropy_threshold is {entropy_threshold!r}; it must be a number of at least 0 nats (0 fills one slot per pass, "
            "inf all)"
        )
    if not _is_number(distance_penalty) or not 0 <= distance_penalty < math.inf:
        raise ValueError(
            f"distance_penalty is {distance_penalty!r}; it must be a number of at least 0 nats per position, and finite"
        )


def check_sampling(
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Raise ValueError for what no token can be drawn by, and for what only draws need where none are made."""
    if generator is not None and seed is not None:
        raise ValueError("generator and seed both set the draws; give one of them")
    if not _is_number(temperature) or not (temperature == 0 or _COOLEST <= temperature < math.inf):
        raise ValueError(
            f"temperature is {temperature!r}; it must be 0 (the most probable token) or a finite number of at least {_COOLEST}"
        )
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p!r}; it must be a number above 0 and at most 1 (1: no limit)")
    if not _is_whole(top_k) or top_k < 0:
        raise ValueError(f"top_k is {top_k!r}; it must be a whole number of at least 0 (0: no limit)")
    if seed is not None and not (_is_whole(seed) and 0 <= seed < _SEEDS):
        raise ValueError(f"seed is {seed!r}; it must be a whole number from 0 to {_SEEDS - 1}")
    if not temperature and (top_p < 1 or top_k):
        raise ValueError(
            "top_p and top_k limit what is drawn, and temperature 0 draws nothing; set temperature, or leave them out"
        )
    if not temperature and (seed is not None or generator is not None):
        raise ValueError(
            f"{'generator' if seed is None else 'seed'} sets the draws, and temperature 0 draws nothing; set temperature, or "
            "leave it out"
        )


def stop_tokens(base: Any, given: int | Sequence[int | None] | None = None) -> tuple[int, ...]:
    """The ends of turn: ``given``, else the generation config's; without any, an empty tuple. None among several is no token."""
    if given is None:
        given = getattr(base.generation_config, "eos_token_id", None)
    listed: Any = _plain(given)
    tokens = [_plain(token) for token in (listed if isinstance(listed, (list, tuple, set, frozenset)) else [listed])]
    tokens = [token for token in tokens if token is not None]
    for token in tokens:
        if not _is_whole(token):
            raise ValueError(f"eos_token_id holds {token!r}; it must be a token id (a whole number), or a list of them")
    return tuple(map(int, tokens))


def _mask_token(base: Any, given: int | None, eos: Sequence[int]) -> int:
    token = _plain(recorded_mask_token(base) if given is None else given)
    if token is None:
        raise ValueError(
            "the model names no mask token, so it was not trained as WeDLM; give mask_token_id, or decode it by model.generate"
        )
    rows = vocabulary_rows(base)
    if not _is_whole(token) or not 0 <= token < rows:
        raise ValueError(
            f"mask_token_id is {token!r}; it must be the whole number of one of the model's {rows} vocabulary rows"
        )
    if token in eos:
        raise ValueError(
            f"token {token} is both the mask token and an end of turn; set mask_token_id or eos_token_id to another"
        )
    return int(token)


def _check_model(base: Any) -> None:
    config = base.config.get_text_config()
    if getattr(base, "_is_stateful", False) or config.is_encoder_decoder:
        raise ValueError(
            f"a {config.model_type} model keeps a state or an encoder instead of a causal key-value cache and cannot be decoded "
            "in parallel; use model.generate"
        )


def _warn_of_positions(base: Any, positions: int) -> None:
    known = known_positions(base.config)
    if known is not None and known < positions:
        logger.warning(
            "The longest prompt and max_new_tokens together have %d positions, and the model was made for %d.",
            positions,
            known,
        )
