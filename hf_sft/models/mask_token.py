"""Which token stands at WeDLM's mask slots, and where a trained model says so."""

from __future__ import annotations

import logging
from typing import Any

from hf_sft.models.vocabulary import add_special_tokens
from hf_sft.models.wedlm import MODEL_TYPE
from hf_sft.models.wrappers import base_model

logger = logging.getLogger(__name__)

OFFICIAL_MASK_TOKEN_ID = 151665  # of the official checkpoints
_WAY_OUT = (
    "set mask_token to a new special token (it is added to the vocabulary, for example <|mask|>), or mask_token_id to an id "
    "that no text has"
)


def resolve_mask_token(
    tokenizer: Any, config: Any, *, mask_token: str | None = None, mask_token_id: int | None = None
) -> int:
    """The mask token's id: from the arguments, else the config, else the tokenizer's mask token, else 151665.

    Without a tokenizer (the data are token rows) nothing is known of what the id decodes to.

    A ``mask_token`` that the tokenizer does not have is added to it as a special token; its row is made when the model loads.

    Args:
        config: the model's; of type ``wedlm`` an id that is ordinary text is a warning, as in the official checkpoints.

    Raises:
        ValueError: the two arguments contradict each other; the id is ordinary text, or ends, begins or structures turns;
            or it lies beyond the vocabulary.
    """
    if tokenizer is None:
        known = mask_token_id if mask_token_id is not None else getattr(config, "mask_token_id", None)
        if known is None or mask_token is not None:
            raise ValueError(
                "without a tokenizer the mask token is named by its id: set mask_token_id, or pass the tokenizer"
            )
        return int(known)
    if mask_token is not None:
        add_special_tokens(tokenizer, [mask_token])
        named = int(tokenizer.convert_tokens_to_ids(mask_token))
        if mask_token_id not in (None, named):
            raise ValueError(
                f"mask_token {mask_token!r} has id {named}, and mask_token_id is {mask_token_id}: leave out one of the two"
            )
        mask_token_id = named
    source = "the arguments"
    if mask_token_id is None:
        mask_token_id, source = getattr(config, "mask_token_id", None), "the model's config"
    if mask_token_id is None:
        mask_token_id, source = tokenizer.mask_token_id, "the tokenizer's mask token"
    if mask_token_id is None:
        mask_token_id, source = OFFICIAL_MASK_TOKEN_ID, "the official checkpoints, as nothing else names one"
    _check_mask_token(int(mask_token_id), source, tokenizer, config)
    return int(mask_token_id)


def _check_mask_token(token: int, source: str, tokenizer: Any, config: Any) -> None:
    rows = max(int(getattr(config.get_text_config(), "vocab_size", 0) or 0), len(tokenizer))
    if not 0 <= token < rows:
        raise ValueError(
            f"the mask token id {token} (from {source}) is beyond the vocabulary of {rows} rows; {_WAY_OUT}"
        )
    text = tokenizer.decode([token], skip_special_tokens=True)
    if text:
        problem = f"the mask token id {token} (from {source}) is {text!r}, ordinary text for this tokenizer"
        if config.model_type != MODEL_TYPE:
            raise ValueError(f"{problem}; {_WAY_OUT}")
        logger.warning("%s, as in the official checkpoints; texts that hold it cannot be learned", problem)
        return
    name = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    if name is None:
        return
    structure = {kind for kind in ("bos_token", "eos_token", "pad_token") if getattr(tokenizer, kind) == name}
    in_template = isinstance(tokenizer.chat_template, str) and name in tokenizer.chat_template
    if structure or in_template:
        role = " and ".join(sorted(structure)) or "part of the chat template"
        raise ValueError(f"the mask token id {token} (from {source}) is {name!r}, the tokenizer's {role}; {_WAY_OUT}")


def record_mask_token(model: Any, token: int) -> None:
    """Write the id into what is saved with the model: its config, and the generation config, which adapters bring along."""
    base = base_model(model)
    base.config.mask_token_id = token
    if base.generation_config is not None:
        base.generation_config.mask_token_id = token  # type: ignore[attr-defined]


def recorded_mask_token(model: Any) -> int | None:
    """The id that a trained model was saved with; None for a model that was not trained as WeDLM."""
    base = base_model(model)
    for place in (base.config, base.generation_config):
        token = getattr(place, "mask_token_id", None)
        if token is not None:
            return int(token)
    return None
