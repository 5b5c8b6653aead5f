"""The batch contract: which rows are scored, with which targets, packed and padded."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import tiny
import torch

from hf_sft.collators import CausalCollator, LabelsCollator, batch_from_labels, next_token_targets


def row(ids: list[int], labels: list[int]) -> dict:
    return {"input_ids": ids, "labels": labels}


ROWS = [row([1, 2, 3, 4], [-100, -100, 3, 4]), row([5], [5]), row([6, 7, 8], [6, -100, 8])]


def test_next_token_targets_are_shifted_and_never_cross_a_document() -> None:
    assert next_token_targets(np.array([7, -100, 8])).tolist() == [-100, 8, -100]


def test_packed_contract() -> None:
    batch = CausalCollator()([[ROWS[0], ROWS[1]], [ROWS[2]]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert batch["doc_ids"].tolist() == [[0, 0, 0, 0, 1, 2, 2, 2]] and batch["doc_lengths"] == [4, 1, 3]
    assert batch["logits_to_keep"].tolist() == [1, 2, 6] and batch["target_ids"].tolist() == [3, 4, 8]
    assert batch["target_weight"].dtype == torch.float32 and batch["target_weight"].tolist() == [1, 1, 1]
    assert batch["target_kind"].tolist() == [0, 0, 0] and batch["target_doc"].tolist() == [0, 0, 2]
    assert batch["num_items"].tolist() == [3, 0]


def test_padded_contract_scores_the_same_rows() -> None:
    batch = CausalCollator(packed=False, pad_token_id=9)([[r] for r in ROWS])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 9, 9, 9], [6, 7, 8, 9]]
    assert batch["attention_mask"].sum(1).tolist() == batch["doc_lengths"] == [4, 1, 3]
    assert batch["logits_to_keep"].tolist() == [1, 2, 9] and batch["target_ids"].tolist() == [3, 4, 8]
    assert batch["target_doc"].tolist() == [0, 0, 2] and batch["num_items"].tolist() == [3, 0]


def test_a_pad_token_that_is_also_the_end_of_turn_is_learned() -> None:
    """Masking is by position: pad id = eos id does not hide the end of turn."""
    eos = 9
    batch = CausalCollator(packed=False, pad_token_id=eos)([row([1, 2, eos], [-100, 2, eos]), row([1] * 5, [1] * 5)])
    assert batch["target_ids"].tolist()[:2] == [2, eos]


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_batch_still_has_a_token_and_nothing_to_learn(packed: bool) -> None:
    batch = CausalCollator(packed=packed)([[], []])
    assert (
        batch["input_ids"].shape == (1, 1) and batch["num_items"].tolist() == [0, 0] and len(batch["target_ids"]) == 0
    )


def test_the_4d_mask_gives_a_plain_model_the_logits_of_documents_apart() -> None:
    model = tiny.tiny_model()
    batch = CausalCollator(return_4d_mask=True)([ROWS])
    logits = model(
        batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"]
    ).logits[0]
    apart = torch.cat([model(torch.tensor([r["input_ids"]])).logits[0] for r in ROWS])
    torch.testing.assert_close(logits, apart, rtol=1e-5, atol=1e-6)


def test_batches_of_an_ordinary_collator_are_read_as_ours() -> None:
    ours = CausalCollator(packed=False, pad_token_id=9)(ROWS)
    labels = torch.tensor([[-100, -100, 3, 4], [5, -100, -100, -100], [6, -100, 8, -100]])
    plain = {"input_ids": ours["input_ids"], "attention_mask": ours["attention_mask"], "labels": labels}
    batch = batch_from_labels(plain)
    for key in ("logits_to_keep", "target_ids", "target_doc", "num_items", "doc_lengths"):
        assert list(batch[key]) == list(ours[key]), key
    with pytest.raises(ValueError, match="must return labels"):
        batch_from_labels({"input_ids": ours["input_ids"]})
    empty = LabelsCollator(lambda examples: dict(plain), spare=None)([[], []])
    assert empty["num_items"].tolist() == [0, 0]


def test_batches_travel_between_processes() -> None:
    batch = pickle.loads(pickle.dumps(CausalCollator()([ROWS])))
    assert batch["doc_lengths"] == [4, 1, 3]
