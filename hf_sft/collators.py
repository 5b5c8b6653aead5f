"""From bins of token rows to the batch contract: at these rows, predict these tokens, with these weights.

Shapes: T packed tokens, B padded documents of up to L tokens, R scored rows, D documents, K kinds of targets (2 in training).

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
| target_kind     | [R] int64         | [R] int64               | 0: next token, 1: mask slot                          |
| target_doc      | [R] int64         | [R] int64               | document of each row                                 |
| num_items       | [K] float64       | [2] float64             | this micro-batch's share of N, per kind              |
| num_tokens      | int               | int                     | tokens of documents, padding not counted             |
| tile_lists      | dict of int32     | -                       | layout: what a backend had made of it (`HostParts`)  |
| doc_origins     | list of D tuples  | list of B tuples        | on the host: where each document is from (`origins`) |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_sft.attention.layout import Layout
from hf_sft.data.chat import IGNORE
from hf_sft.data.pairs import sides_of
from hf_sft.noise import Mask, MaskRule, document_generator, draw_mask, mask_at_ratio
from hf_sft.streams import group_blocks, noisy_stream

# What the Trainer reads itself; everything else in a batch goes to the model.
CONTRACT_KEYS = frozenset(
    ["doc_ids", "doc_lengths", "logits_to_keep", "target_ids", "target_weight", "target_kind", "target_doc"]
    + ["num_items", "num_tokens", "block_ids", "limits", "doc_pieces", "tile_lists", "doc_origins"]
    + ["pair_numbers", "reference_logps"]
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
            known = {"num_tokens": tokens, "doc_origins": origins(rows)}
            return _padded(documents, targets, lengths, self.pad_token_id) | known
        doc_ids = np.repeat(np.arange(len(lengths)), lengths)
        batch: Batch = {
            "input_ids": torch.from_numpy(np.concatenate(documents))[None],
            "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
            "doc_ids": torch.from_numpy(doc_ids.astype(np.int32))[None],
            "doc_lengths": lengths,
            "num_tokens": tokens,
            "doc_origins": origins(rows),
            **_scored_rows(np.concatenate(targets), doc_ids),
        }
        if self.return_4d_mask:
            batch["attention_mask"] = Layout.from_batch(batch).allowed()[None, None]
        return batch


@dataclass
class HostParts:
    """A collator of packed rows, and what a backend wants made of their layout where batches are made: in the loader's workers.

    Args:
        collator: makes packed batches.
        host_part: from a layout to keys of the batch that ``Layout.from_batch`` reads (``attention.protocol.Backend.host_part``).
    """

    collator: Callable[[Any], Batch]
    host_part: Callable[[Layout], Batch]

    def __call__(self, bins: Any) -> Batch:
        batch = self.collator(bins)
        return batch | self.host_part(Layout.from_batch(batch))


@dataclass
class PairCollator:
    """Collate preference pairs (``hf_sft.data.pairs``): documents 2i and 2i + 1 are the chosen and the rejected side of pair i.

    N counts pairs (kind 0) and tokens of chosen answers (kind 1); every row is scored as kind 0. To the keys come

    | key             | shape         | meaning                                                                    |
    |-----------------|---------------|----------------------------------------------------------------------------|
    | pair_numbers    | list of P     | on the host: the number of each pair in the data set                       |
    | doc_origins     | list of P     | where each pair is from                                                    |
    | reference_logps | [2P] float64  | the reference's log-probabilities, where the rows carry them               |

    Args:
        packed, pad_token_id: as for ``CausalCollator``.
    """

    packed: bool = True
    pad_token_id: int = 0

    def __call__(self, bins: Sequence[Sequence[Mapping[str, Any]]]) -> Batch:
        """Collate bins of pairs."""
        pairs = [row for members in bins for row in members]
        batch = CausalCollator(self.packed, self.pad_token_id)([side for pair in pairs for side in sides_of(pair)])
        chosen = (batch["target_doc"] % 2 == 0).sum()
        batch["num_items"] = torch.tensor([len(pairs), int(chosen)], dtype=torch.float64)
        batch["pair_numbers"] = [int(pair.get("document", place)) for place, pair in enumerate(pairs)]
        batch["doc_origins"] = origins(pairs)
        if pairs and "reference_logps" in pairs[0]:
            batch["reference_logps"] = torch.from_numpy(np.concatenate([pair["reference_logps"] for pair in pairs]))
        return batch


@dataclass
class WeDLMCollator:
    """Collate documents for WeDLM: each as a clean stream and, behind it, its noisy stream (``hf_sft.streams``).

    Mask slots predict their own token (kind 1, weighted as drawn); rows of the clean stream predict the next one (kind 0,
    weight 1), if ``enable_ar_loss``. N counts supervised tokens for slots and next-token rows for the clean stream; under
    ``reference`` sampling the slot weights sum to 1 and N counts micro-batches. To the keys of packed batches come

    | key        | shape         | meaning                                                                     |
    |------------|---------------|-----------------------------------------------------------------------------|
    | block_ids  | [1, T] int64  | layout: block of each noisy token, -1 in clean streams                      |
    | limits     | [1, T] int64  | layout: clean tokens are seen at positions below it                         |
    | doc_pieces | list of D     | layout, on the host: clean length and groups of the noisy stream            |

    Args:
        mask_token_id: what stands at mask slots; no document may hold it.
        rule: how masks are drawn.
        seed: of the noise, together with the ``epoch`` and ``document`` that token rows carry. Rows without them, as a plain
            Trainer hands over, have epoch 0 and their place in the batch: the same noise in every epoch.
        enable_ar_loss: score next-token rows of the clean stream as well.
        elide: drop observed tokens whose states stand in the clean stream already (exact).
        pad_token_id: the single token of a batch without documents.
        return_4d_mask: as for ``CausalCollator``.
    """

    mask_token_id: int
    rule: MaskRule = field(default_factory=MaskRule)
    seed: int = 0
    enable_ar_loss: bool = True
    elide: bool = True
    pad_token_id: int = 0
    return_4d_mask: bool = False

    kinds: ClassVar[int] = 2

    def __call__(self, bins: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]]) -> Batch:
        """Collate bins of token rows, or bare token rows, into one packed batch."""
        rows = [row for item in bins for row in ([item] if isinstance(item, Mapping) else item)]
        tokens, found = sum(len(row["input_ids"]) for row in rows), origins(rows)
        rows = rows or [{"input_ids": [self.pad_token_id], "labels": [IGNORE]}]
        parts = [self._document(row, number) for number, row in enumerate(rows)]
        column = {key: np.concatenate([part[key] for part in parts]) for key in ("ids", "pos", "block", "limit")}
        column |= {key: np.concatenate([part[key] for part in parts]) for key in ("target", "kind", "weight")}
        lengths = [len(part["ids"]) for part in parts]
        doc_ids = np.repeat(np.arange(len(lengths)), lengths)
        (scored,) = np.nonzero(column["target"] != IGNORE)
        kind, weight = column["kind"][scored], column["weight"][scored]
        items = np.bincount(kind, minlength=self.kinds).astype(np.float64)
        items[1] = sum(part["supervised"] for part in parts)
        if self.rule.sampling == "reference":
            items[1] = float(items[1] > 0)  # a micro-batch counts as one, also where chance has masked nothing
            if weight[kind == 1].size:
                weight[kind == 1] /= weight[kind == 1].sum()
        batch: Batch = {
            "input_ids": torch.from_numpy(column["ids"])[None],
            "position_ids": torch.from_numpy(column["pos"])[None],
            "doc_ids": torch.from_numpy(doc_ids.astype(np.int32))[None],
            "doc_lengths": lengths,
            "block_ids": torch.from_numpy(column["block"])[None],
            "limits": torch.from_numpy(column["limit"])[None],
            "doc_pieces": [part["pieces"] for part in parts],
            "num_tokens": tokens,
            "doc_origins": found,
            "logits_to_keep": torch.from_numpy(scored),
            "target_ids": torch.from_numpy(column["target"][scored]),
            "target_weight": torch.from_numpy(weight.astype(np.float32)),
            "target_kind": torch.from_numpy(kind),
            "target_doc": torch.from_numpy(doc_ids[scored]),
            "num_items": torch.from_numpy(items),
        }
        if self.return_4d_mask:
            batch["attention_mask"] = Layout.from_batch(batch).allowed()[None, None]
        return batch

    def _document(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The clean stream of one document and its noisy streams, as columns."""
        ids, labels = np.asarray(row["input_ids"], dtype=np.int64), np.asarray(row["labels"], dtype=np.int64)
        supervised, length = labels != IGNORE, len(ids)
        next_token = next_token_targets(labels) if self.enable_ar_loss else np.full(length, IGNORE)
        clean = {
            "ids": ids,
            "pos": np.arange(length),
            "block": np.full(length, -1),
            "limit": np.arange(length) + 1,
            "target": next_token,
            "kind": np.zeros(length, dtype=np.int64),
            "weight": np.ones(length),
        }
        parts, groups, blocks = [clean], [], -(-length // self.rule.block_size)
        for mask, kind in self._masks(supervised, row.get("epoch", 0), row.get("document", number)):
            stream = noisy_stream(mask.masked, self.rule.block_size, elide=self.elide)
            noisy = {
                "ids": np.where(stream.slot, self.mask_token_id, ids[stream.pos]),
                "pos": stream.pos,
                "block": stream.block
                + blocks * (len(parts) - 1),  # blocks of several noisy streams do not see each other
                "limit": stream.anchor,
                "target": np.where(stream.slot, ids[stream.pos], IGNORE),
                "kind": kind[stream.block],
                "weight": mask.weight[stream.pos],
            }
            parts.append(noisy)
            groups += group_blocks(stream)
        columns = {key: np.concatenate([part[key] for part in parts]) for key in clean}
        return {**columns, "supervised": int(supervised.sum()), "pieces": (length, groups)}

    def _masks(self, supervised: np.ndarray, epoch: int, document: int) -> list[tuple[Mask, np.ndarray]]:
        """The mask of each noisy stream, and the kind [blocks] of the slots of each of its blocks."""
        mask = draw_mask(supervised, self.rule, document_generator(self.seed, epoch, document))
        return [(mask, np.ones(-(-len(supervised) // self.rule.block_size), dtype=np.int64))]


RATIOS = tuple(share / 10 for share in range(1, 11))


@dataclass
class WeDLMEvalCollator(WeDLMCollator):
    """Collate documents to measure a model, with noise that never changes.

    Each document has two noisy streams. The first is drawn by ``rule`` (``elbo``, weighted: the any-order bound); in the second
    each block is masked at one of ``RATIOS``, dealt in turn to blocks and documents, as kinds 2 to 11 of weight 1.
    """

    kinds: ClassVar[int] = 2 + len(RATIOS)

    def _masks(self, supervised: np.ndarray, epoch: int, document: int) -> list[tuple[Mask, np.ndarray]]:
        generator = document_generator(self.seed, 0, document)
        blocks = -(-len(supervised) // self.rule.block_size)
        place = (document + np.arange(blocks)) % len(RATIOS)
        masked = mask_at_ratio(supervised, np.array(RATIOS)[place], self.rule, generator).masked
        bound = draw_mask(supervised, self.rule, generator)
        return [(bound, np.ones(blocks, dtype=np.int64)), (Mask(masked, np.ones(len(masked))), place + 2)]


def origins(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, int]]:
    """(number in the data set, number of the source, record of the source) of each row; -1 for what is not known, and nothing
    for the token that stands in where there are no rows."""
    return [tuple(int(row.get(name, -1)) for name in ("document", "source", "record")) for row in rows]  # type: ignore[misc]


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
        numbers = [getattr(item, "number", -1) for item in bins for _ in item]
        try:
            batch = dict(self.collator(examples or [self.spare]))
        except ValueError as error:
            raise ValueError(
                f"the data_collator cannot make a batch of token rows with input_ids and labels ({error}); it must pad the "
                "labels, as DataCollatorForSeq2Seq does"
            ) from error
        if not examples:
            batch["labels"] = torch.full_like(batch["input_ids"], IGNORE)
            return batch_from_labels(batch) | {"num_tokens": 0}
        found = batch_from_labels(batch)
        if len(found["input_ids"]) == len(numbers):  # else a row is no example
            found["doc_origins"] = [(number, -1, -1) for number in numbers]
        return found


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
