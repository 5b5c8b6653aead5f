"""From bins of token rows to the batch contract: at these rows, predict these tokens, with these weights.

Shapes: T packed tokens, B padded documents of up to L tokens, R scored rows, D documents.

| key             | packed            | padded                  | meaning                                              |
|-----------------|-------------------|-------------------------|------------------------------------------------------|
| input_ids       | [1, T] int64      | [B, L] int64            | tokens                                               |
| position_ids    | [1, T] int64      | [B, L] int64            | from 0 in each document                              |
| doc_ids         | [1, T] int32      | -                       | layout: document of each token                       |
| doc_lengths     | list of D ints    | list of B ints          | layout: on the host                                  |
| attention_mask  | -                 | [B, L] int64            | 1 on tokens, 0 on padding                            |
| logits_to_keep  | [R] int64         | [R] int64 into [B * L]  | rows that are scored; the head runs on no others     |
| target_ids      | [R] int64         | [R] int64               | the token that each scored row must predict          |
| target_weight   | [R] float32       | [R] float32             | 1                                                    |
| target_kind     | [R] int64         | [R] int64               | 0: next token                                        |
| target_doc      | [R] int64         | [R] int64               | document of each row                                 |
| num_items       | [2] float64       | [2] float64             | this micro-batch's share of N, per kind              |
| num_tokens      | int               | int                     | tokens of documents, padding not counted             |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_sft.attention.layout import Layout
from hf_sft.data.chat import IGNORE

# What the Trainer reads itself; everything else in a batch goes to the model.
CONTRACT_KEYS = frozenset(
    ["doc_ids", "doc_lengths", "logits_to_keep", "target_ids", "target_weight", "target_kind", "target_doc"]
    + ["num_items", "num_tokens"]
)
Batch = dict[str, Any]


@dataclass
class CausalCollator:
    """Collate documents for the next-token objective.

    Args:
        packed: lay the documents out in one row [1, T]; otherwise one row per document, padded on the right.
        pad_token_id: fills padding and the single token of a batch without documents; it is never scored or seen.
        return_4d_mask: add ``attention_mask`` [1, 1, T, T] bool to packed batches, for a plain model with SDPA attention and
            no sliding window, outside the Trainer (which makes the masks on the device).
    """

    packed: bool = True
    pad_token_id: int = 0
    return_4d_mask: bool = False

    def __call__(self, bins: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]]) -> Batch:
        """Collate bins (lists of token rows ``{"input_ids", "labels"}``) or bare token rows into one batch."""
        rows = [row for item in bins for row in ([item] if isinstance(item, Mapping) else item)]
        documents = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
        targets = [next_token_targets(np.asarray(row["labels"], dtype=np.int64)) for row in rows]
        tokens = sum(map(len, documents))
        if not documents:
            # Fewer bins than ranks: this rank computes a zero that is still connected to the graph.
            documents, targets = [np.array([self.pad_token_id])], [np.array([IGNORE])]
        lengths = [len(document) for document in documents]
        if not self.packed:
            return _padded(documents, targets, lengths, self.pad_token_id) | {"num_tokens": tokens}
        doc_ids = np.repeat(np.arange(len(lengths)), lengths)
        batch: Batch = {
            "input_ids": torch.from_numpy(np.concatenate(documents))[None],
            "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
            "doc_ids": torch.from_numpy(doc_ids.astype(np.int32))[None],
            "doc_lengths": lengths,
            "num_tokens": tokens,
            **_scored_rows(np.concatenate(targets), doc_ids),
        }
        if self.return_4d_mask:
            batch["attention_mask"] = Layout.from_batch(batch).allowed()[None, None]
        return batch


def next_token_targets(labels: np.ndarray) -> np.ndarray:
    """[L] unshifted labels of one document to [L] targets: row i predicts label i + 1; the last row predicts nothing."""
    return np.append(labels[1:], IGNORE)


def batch_from_labels(batch: Batch) -> Batch:
    """The batch of an ordinary collator (``input_ids``, ``labels`` and perhaps ``attention_mask``, all [B, L]) in our contract.

    Raises:
        ValueError: if there are no labels, or rows that the labels do not fit.
    """
    labels = batch.get("labels")
    if labels is None or labels.shape != batch["input_ids"].shape:
        found = "none" if labels is None else str(tuple(labels.shape))
        raise ValueError(
            f"a data_collator must return labels of the shape of input_ids {tuple(batch['input_ids'].shape)}; found {found}"
        )
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten().numpy()
    count, length = labels.shape
    mask = batch.get("attention_mask")
    lengths = [length] * count if mask is None or mask.dim() != 2 else mask.sum(1).tolist()
    scored = _scored_rows(targets, np.repeat(np.arange(count), length))
    rest = {key: value for key, value in batch.items() if key != "labels"}
    return {**rest, "doc_lengths": lengths, "num_tokens": sum(lengths), **scored}


@dataclass
class LabelsCollator:
    """A user's collator, its batches read in our contract.

    Args:
        collator: takes a list of examples, returns ``input_ids`` and ``labels`` [B, L] and whatever else the model takes.
        spare: an example that stands in, with nothing to learn, where a rank has fewer bins than others.
    """

    collator: Callable[[list[Any]], Batch]
    spare: Any

    def __call__(self, bins: Sequence[Sequence[Any]]) -> Batch:
        examples = [example for item in bins for example in item]
        batch = dict(self.collator(examples or [self.spare]))
        if not examples:
            batch["labels"] = torch.full_like(batch["input_ids"], IGNORE)
            return batch_from_labels(batch) | {"num_tokens": 0}
        return batch_from_labels(batch)


def _padded(documents: list[np.ndarray], targets: list[np.ndarray], lengths: list[int], pad: int) -> Batch:
    shape = (len(documents), max(lengths))
    input_ids, target_grid = np.full(shape, pad, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    for i, (document, target) in enumerate(zip(documents, targets, strict=True)):
        input_ids[i, : len(document)], target_grid[i, : len(target)], mask[i, : len(document)] = document, target, 1
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.arange(shape[1]).expand(shape).contiguous(),
        "attention_mask": torch.from_numpy(mask),
        "doc_lengths": lengths,
        **_scored_rows(target_grid.reshape(-1), np.repeat(np.arange(shape[0]), shape[1])),
    }


def _scored_rows(targets: np.ndarray, doc_ids: np.ndarray) -> dict[str, Tensor]:
    (rows,) = np.nonzero(targets != IGNORE)
    return {
        "logits_to_keep": torch.from_numpy(rows),
        "target_ids": torch.from_numpy(targets[rows]),
        "target_weight": torch.ones(len(rows)),
        "target_kind": torch.zeros(len(rows), dtype=torch.int64),
        "target_doc": torch.from_numpy(doc_ids[rows]),
        "num_items": torch.tensor([len(rows), 0], dtype=torch.float64),
    }
