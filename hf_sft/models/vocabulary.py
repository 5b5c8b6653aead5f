"""Rows of the vocabulary: growing it without shrinking a padded one, and what new rows begin with.

V rows of the embedding, H hidden width. Checkpoints often hold more rows than their tokenizer has tokens, padded for speed:
new tokens then take padded rows, and V stays.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sft.data.chat import WANTED_TOKENS
from hf_sft.models.sharded import gathered, whole_shape

logger = logging.getLogger(__name__)

_ADDED = "_hf_sft_added_token_ids"


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add ``tokens`` as special tokens; returns the ids that were not in the vocabulary before and remembers them."""
    if wrong := [token for token in tokens if not isinstance(token, str) or not token.strip()]:
        raise ValueError(f"new_special_tokens contains {wrong}; each must be a string that is not blank.")
    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    tokenizer.add_tokens(list(dict.fromkeys(tokens)), special_tokens=True)
    ids = sorted(int(tokenizer.convert_tokens_to_ids(token)) for token in new)  # type: ignore[arg-type]  # one token, one id
    setattr(tokenizer, _ADDED, sorted({*added_token_ids(tokenizer), *ids}))
    setattr(tokenizer, WANTED_TOKENS, sorted({*getattr(tokenizer, WANTED_TOKENS, ()), *tokens}))
    return ids


def added_token_ids(tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Ids of the tokens that :func:`add_special_tokens` added to this tokenizer, ascending."""
    return list(getattr(tokenizer, _ADDED, []))


def resize_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, read_only: Sequence[int] = ()
) -> list[int]:
    """Give every token of ``tokenizer`` a row; returns the ids whose rows are new, ascending.

    V grows to ``len(tokenizer)`` if it is smaller and never shrinks. The rows of new tokens, whether appended or taken from the
    padding of the vocabulary, begin as the mean of the rows of the old tokens, in the head as well; all other rows keep their
    bits. So do the rows that an untied head has already for ``read_only`` tokens, which are never written: an adapter does not
    bring them along.
    """
    rows = vocabulary_rows(model)
    added = added_token_ids(tokenizer)
    new_ids = sorted({*added, *range(rows, len(tokenizer))})
    if foreign := set(new_ids) - set(added):
        logger.warning(
            "The tokenizer has %d tokens and the model %d rows: %d tokens that the model has never seen begin with the mean of "
            "its rows. Is it this model's tokenizer?", len(tokenizer), rows, len(foreign),
        )  # fmt: skip
    if len(tokenizer) > rows:
        grow_embeddings(model, len(tokenizer))
    written = [token for token in new_ids if token not in read_only or token >= rows]
    if new_ids:
        set_rows_to_mean(model, new_ids, head_ids=written)
    return new_ids


def vocabulary_rows(model: PreTrainedModel) -> int:
    """V, padding included."""
    embedding: Any = model.get_input_embeddings()
    return whole_shape(embedding.weight)[0]


def grow_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Append rows, each the mean of the old ones, until the vocabulary has ``rows`` of them; fewer is an error."""
    old = vocabulary_rows(model)
    if rows < old:
        raise ValueError(f"The model has {old} embedding rows; a vocabulary is never cut (asked for {rows}).")
    if rows == old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    set_rows_to_mean(model, list(range(old, rows)))
    logger.info("The vocabulary has grown from %d to %d rows.", old, rows)


@torch.no_grad()
def set_rows_to_mean(model: PreTrainedModel, ids: Sequence[int], head_ids: Sequence[int] | None = None) -> None:
    """Overwrite the rows ``ids`` of embedding and head (of an untied one ``head_ids``, by default the same) by the mean of the
    rows below the first of ``ids``.

    The mean keeps the new tokens' logits ordinary (Hewitt 2021, "Initializing new word embeddings for pretrained language
    models"); its covariance, which costs V H^2, is left out.
    """
    first = min(ids)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    chosen: list[tuple[torch.Tensor, Sequence[int]]] = [(embedding.weight, ids)]
    if head is not None:
        own = ids if head_ids is None else head_ids
        chosen += [(tensor, own) for tensor in (head.weight, getattr(head, "bias", None)) if tensor is not None]
    done = set()
    for tensor, rows in chosen:
        if first > 0 and id(tensor) not in done and rows:  # a tied head is the embedding
            with gathered([tensor], written=True):
                index = torch.tensor(list(rows), device=tensor.device)
                tensor.data[index] = tensor.data[:first].mean(dim=0, dtype=torch.float32).to(tensor.dtype)
        done.add(id(tensor))


def heads_are_tied(model: PreTrainedModel) -> bool:
    """Whether the head's weight is the input embedding itself."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
