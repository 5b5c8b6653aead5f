"""Raw texts: every token is learned once, however long the text is."""

from __future__ import annotations

import itertools

import pytest
import runs
import tiny
from hypothesis import given
from hypothesis import strategies as st

from hf_sft.arguments import DataArguments
from hf_sft.data.chat import encode_conversation
from hf_sft.data.pipeline import RowRules, prepare_dataset, rows_from_examples
from hf_sft.data.texts import TextEncoder
from hf_sft.data.tokenize import cut_tail, split_row

DATA = DataArguments(task_type="pretrain", max_seq_length=16)
EOS = 256


def lists(rows) -> list[dict]:
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]


def test_a_text_is_its_tokens_and_the_end() -> None:
    (row,) = TextEncoder(tiny.tiny_tokenizer()).encode(["ab"])
    ids = [*tiny.tiny_tokenizer().convert_tokens_to_ids(["a", "b"]), EOS]
    assert row == {"input_ids": ids, "labels": ids}


def test_bos_is_put_once_and_not_learned(shared_data) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260k")
    (row,) = TextEncoder(tokenizer).encode(["Once upon a time"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert row["input_ids"][0] == bos and row["input_ids"].count(bos) == 1 and row["labels"][0] == -100
    assert row["input_ids"][-1] == eos == row["labels"][-1] and row["labels"][1:] == row["input_ids"][1:]


@given(length=st.integers(1, 200), limit=st.integers(2, 20))
def test_a_split_text_learns_every_token_once(length: int, limit: int) -> None:
    row = {"input_ids": list(range(length)), "labels": list(range(length))}
    rows = split_row(row, limit)
    assert all(len(part["input_ids"]) <= limit for part in rows)
    predicted = [label for part in rows for label in part["labels"][1:]]
    assert predicted == list(range(1, length))  # the first token of a document has nothing before it
    for before, after in itertools.pairwise(rows):
        assert after["input_ids"][0] == before["input_ids"][-1] and after["labels"][0] == -100


def test_long_texts_of_files_are_cut_and_counted(tmp_path) -> None:
    (tmp_path / "book.txt").write_text("a" * 100, encoding="utf-8")
    prepared = prepare_dataset(tmp_path / "book.txt", tiny.tiny_tokenizer(), data=DATA)
    learned = [label for row in lists(prepared.rows) for label in row["labels"][1:]]
    assert learned == [tiny.tiny_tokenizer().convert_tokens_to_ids("a")] * 99 + [EOS]
    assert prepared.report["cut_into_several"] == prepared.report["records"] == prepared.report["kept"] == 1
    dropped = DataArguments(task_type="pretrain", max_seq_length=16, overlength="drop")
    with pytest.raises(ValueError, match="none is left"):
        prepare_dataset(tmp_path / "book.txt", tiny.tiny_tokenizer(), data=dropped)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": []}, "this is an object with messages"), (7, "this is int"), ({"text": " "}, "the text is blank"),
        ({"text": "a<|im_end|>b"}, "reads as a special token"),
    ],
)  # fmt: skip
def test_what_is_no_text(tmp_path, record, message: str) -> None:
    path = runs.write_jsonl(tmp_path / "t.jsonl", [{"text": "fine"}, record])
    with pytest.raises(ValueError, match=f"(?s)line 2: .*{message}"):
        prepare_dataset(path, tiny.tiny_tokenizer(), data=DATA)


def test_texts_in_memory() -> None:
    rows = lists(rows_from_examples(["abc", {"text": "d"}], tiny.tiny_tokenizer(), data=DATA))
    assert [row["input_ids"] for row in rows] == [[64, 65, 66, EOS], [67, EOS]] or [
        len(r["input_ids"]) for r in rows
    ] == [4, 2]


def test_a_text_file_that_is_not_utf8(tmp_path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text \(byte 3\)"):
        prepare_dataset(tmp_path / "latin.txt", tiny.tiny_tokenizer(), data=DATA)


# ---- the tail behind the last answer ----


def conversation(*turns: str) -> list[dict]:
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(turns)]


def rows_with_tail(messages, tail: int, **options) -> list[dict]:
    data = DataArguments(**{"max_seq_length": 200, **options})
    return lists(rows_from_examples([messages], tiny.tiny_tokenizer(), data=data, rules=RowRules(end_tail=tail)))


def test_a_tail_replaces_what_the_template_writes_behind_the_last_turn() -> None:
    messages = conversation("Hi", "Yes", "And?", "No")
    plain = encode_conversation(tiny.tiny_tokenizer(), messages)
    assert plain["labels"][-2:] == [EOS, -100]  # the template's line break
    (row,) = rows_with_tail(messages, 3)
    assert row["input_ids"] == plain["input_ids"][:-1] + [EOS] * 3
    assert row["labels"] == plain["labels"][:-1] + [EOS] * 3
    assert row["labels"].count(EOS) == 2 + 3  # the first turn ends once


UNLEARNED = {"role": "assistant", "content": "x", "train": False}


@pytest.mark.parametrize(
    "messages", [conversation("Hi", "Yes", "And?"), [*conversation("Hi", "Yes", "And?"), UNLEARNED]]
)
def test_no_tail_behind_a_turn_that_is_not_the_last(messages) -> None:
    (row,) = rows_with_tail(messages, 3)
    assert row == encode_conversation(tiny.tiny_tokenizer(), messages)


def test_a_tail_never_makes_a_document_too_long() -> None:
    messages = conversation("Hi", "Yes")
    length = len(encode_conversation(tiny.tiny_tokenizer(), messages)["input_ids"]) - 1
    for room in range(4):
        (row,) = rows_with_tail(messages, 3, max_seq_length=length + room)
        assert len(row["input_ids"]) == length + room
    with pytest.raises(ValueError, match="none is left"):
        rows_with_tail(messages, 3, max_seq_length=length - 1)


def test_only_a_tail_is_cut() -> None:
    row = {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}
    assert cut_tail(row, 3, 2) == row
    tailed = {"input_ids": [1, 9, 9, 9], "labels": [-100, 9, 9, 9]}
    assert cut_tail(tailed, 3, 2)["input_ids"] == [1, 9, 9] and cut_tail(tailed, 1, 2) == tailed
