"""Best-fit packing: nothing cut, nothing lost, close to the lower bound."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft.data.packing import pack_documents


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_every_document_is_in_one_bin_that_holds_it(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    bins = pack_documents(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    for members in bins:
        assert members
        assert members == sorted(members)
        assert sum(lengths[i] for i in members) <= capacity
    assert [members[0] for members in bins] == sorted(members[0] for members in bins)
    # Any-fit: two bins never fit into one, so at most one bin is half empty or less.
    assert sum(2 * sum(lengths[i] for i in members) <= capacity for members in bins) <= 1
    assert bins == pack_documents(np.array(lengths, dtype=np.int32), capacity)


def test_best_fit_takes_the_fullest_bin() -> None:
    #                          0  1  2  3  4  5  6
    assert pack_documents([3, 9, 5, 6, 4, 3, 2], 10) == [[0, 2, 6], [1], [3, 4], [5]]
    assert pack_documents([], 10) == []
    assert pack_documents([10, 10], 10) == [[0], [1]]


@pytest.mark.parametrize(("lengths", "index"), [([3, 11], 1), ([0, 3], 0), ([2, 3, -1], 2)])
def test_lengths_that_no_bin_holds_are_refused(lengths: list[int], index: int) -> None:
    with pytest.raises(ValueError, match=rf"Document {index} has {lengths[index]} tokens.*1 to 10.*max_seq_length"):
        pack_documents(lengths, 10)
    with pytest.raises(ValueError, match="at least 1"):
        pack_documents([1], 0)


def test_a_hundred_thousand_documents_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(1, 2049, 100_000).tolist()
    started = time.perf_counter()
    bins = pack_documents(lengths, 2048)
    assert time.perf_counter() - started < 10  # 0.5 s on an idle core; quadratic packing takes minutes
    assert len(bins) < 1.01 * sum(lengths) / 2048


def test_gsm8k_in_784_bins(shared_data) -> None:
    from transformers import AutoTokenizer

    from hf_sft.data.chat import ChatEncoder
    from hf_sft.data.files import read_records
    from hf_sft.data.formats import to_conversation

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5")
    path = shared_data / "gsm8k" / "train.jsonl"
    rows = ChatEncoder(tokenizer).encode([to_conversation(record.value) for record in read_records(path)])
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(lengths) == sum(1 for line in path.open(encoding="utf-8") if json.loads(line))
    assert sum(lengths) == 1_587_568
    assert len(pack_documents(lengths, 2048)) == 784
