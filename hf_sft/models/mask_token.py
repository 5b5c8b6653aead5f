"""Which token stands at WeDLM's mask slots, and where a trained model says so."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from hf_sft.models.vocabulary import add_special_tokens, added_token_ids
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
        _check_range(int(known), "the arguments" if known == mask_token_id else "the model's config", config, 0)
        return int(known)
    if mask_token is not None:
        named = _named_token(tokenizer, mask_token)
        if mask_token_id not in (None, named):
            raise ValueError(
                f"mask_token {mask_token!r} has id {named}, and mask_token_id is {mask_token_id}: leave out one of the two"
            )
        mask_token_id = named
    sources = {
        "the arguments": mask_token_id,
        "the model's config": getattr(config, "mask_token_id", None),
        "the tokenizer's mask token": tokenizer.mask_token_id,
        "the official checkpoints, as nothing else names one": OFFICIAL_MASK_TOKEN_ID,
    }
    source, token = next((source, int(token)) for source, token in sources.items() if token is not None)
    if mask_token_id is None and token in added_token_ids(tokenizer):
        name = tokenizer.convert_ids_to_tokens(token)
        raise ValueError(f"the mask token id {token} (from {source}) is {name!r}, a new special token; {_WAY_OUT}")
    _check_mask_token(token, source, tokenizer, config)
    return token


def _named_token(tokenizer: Any, token: str) -> int:
    """The id of a token, which is added as a special one if it is new; a word of the vocabulary would change its meaning."""
    if not isinstance(token, str) or not token.strip():
        raise ValueError(f"mask_token is {token!r}: name a token that is not blank")
    known = tokenizer.get_vocab().get(token)
    if known is not None and not _is_special(tokenizer, known):
        raise ValueError(f"mask_token {token!r} is a word of the vocabulary (id {known}), which texts hold; {_WAY_OUT}")
    add_special_tokens(tokenizer, [token])
    return int(tokenizer.convert_tokens_to_ids(token))


def _is_special(tokenizer: Any, token: int) -> bool:
    entry = tokenizer.added_tokens_decoder.get(token)
    return token in tokenizer.all_special_ids or (entry is not None and entry.special)


def _check_range(token: int, source: str, config: Any, tokens: int) -> None:
    rows = max(int(getattr(config.get_text_config(), "vocab_size", 0) or 0), tokens)
    if not 0 <= token < rows:
        raise ValueError(
            f"the mask token id {token} (from {source}) is beyond the vocabulary of {rows} rows; {_WAY_OUT}"
        )


def _check_mask_token(token: int, source: str, tokenizer: Any, config: Any) -> None:
    _check_range(token, source, config, len(tokenizer))
    name = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    if name is None:
        return  # a row of the padding
    if not _is_special(tokenizer, token):
        text = tokenizer.decode([token]) or name
        problem = f"the mask token id {token} (from {source}) is {text!r}, ordinary text for this tokenizer"
        if config.model_type != MODEL_TYPE:
            raise ValueError(f"{problem}; {_WAY_OUT}")
        logger.warning("%s, as in the official checkpoints; texts that hold it cannot be learned", problem)
        return
    kinds = ("bos_token", "eos_token", "pad_token", "unk_token")
    roles = [f"the tokenizer's {kind}" for kind in kinds if getattr(tokenizer, kind, None) == name]
    if isinstance(tokenizer.chat_template, str) and name in tokenizer.chat_template:
        roles.append("part of the chat template")
    if roles:
        raise ValueError(f"the mask token id {token} (from {source}) is {name!r}, {' and '.join(roles)}; {_WAY_OUT}")


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


def adapter_mask_token(folder: str) -> int | None:
    """The id in the generation_config.json of an adapter's folder, which has no config of a model; None if there is none.

    The file is read as it stands: ``GenerationConfig.from_pretrained`` drops fields that are not its own.
    """
    path = Path(folder, "generation_config.json")
    token = json.loads(path.read_text(encoding="utf-8")).get("mask_token_id") if path.is_file() else None
    return None if token is None else int(token)
