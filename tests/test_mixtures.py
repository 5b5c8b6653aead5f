"""Several sources as one data set: weights, limits, settings of each, eval_split, processes, prepared folders."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from hf_sft.arguments import DataArguments
from hf_sft.data.bins import Bins
from hf_sft.data.chat import encode_conversation
from hf_sft.data.pipeline import evaluation_files, files_hash, prepare_dataset
from hf_sft.data.prepared import identity, is_prepared, save_prepared
from hf_sft.data.rows import Encoding, RowRules
from hf_sft.data.templates import WANTED_TOKENS
from hf_sft.sources import Source, read_sources

OTHER = tiny.CHATML.replace("<|im_end|>\n", "<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tiny_tokenizer()


def arguments(**changes: Any) -> DataArguments:
    return DataArguments(**{"max_seq_length": 256, **changes})


def numbered(path: Path, count: int, word: str = "q") -> str:
    """A file whose records can be told apart by their questions."""
    records = [{"question": f"{word}{n}", "answer": "a"} for n in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def questions(tokenizer: Any, rows: Any) -> list[str]:
    texts = [tokenizer.decode(row["input_ids"]) for row in rows]
    return [text.split("user\n")[1].split("<|im_end|>")[0] for text in texts]


# ---- sources ----


def test_sources_are_read_in_every_form() -> None:
    assert read_sources("a.jsonl") == [Source("a.jsonl")]
    assert read_sources(["a", {"path": "b", "weight": "2", "limit": 3}]) == [
        Source("a"),
        Source("b", weight=2, limit=3),
    ]


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "list is empty"),
        ({"weight": 1}, "has no path"),
        ({"path": "a", "wieght": 1}, "did you mean weight"),
        ({"path": "a", "weight": "much"}, "weight of the data source a is 'much': it must be a finite number"),
        ({"path": "a", "weight": 0}, "weight of the data source a is 0"),
        ({"path": "a", "limit": 0}, "limit of the data source a is 0"),
        ({"path": "a", "format": "alpacca"}, "format of the data source a is 'alpacca'"),
        ({"path": "a", "columns": {"prompt": 1}}, "columns of the data source a"),
        ({"path": "a", "columns": {"promt": "x"}}, "a field 'promt' that no format has; did you mean prompt"),
        ([{"path": "a", "x": 1}, "b", {"weight": 2}], r"item 1: .*no key 'x'.*; item 3: .*no path"),
    ],
)
def test_what_is_wrong_with_a_source_is_said(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_sources(value)


# ---- mixtures ----


def test_weights_and_limits(tokenizer, tmp_path) -> None:
    a, b = numbered(tmp_path / "a.jsonl", 6, "a"), numbered(tmp_path / "b.jsonl", 8, "b")
    files = [a, {"path": b, "weight": 2.5, "limit": 4}]
    prepared = prepare_dataset(files, tokenizer, data=arguments(), seed=3)
    found = Counter(questions(tokenizer, prepared.rows))
    assert [found[f"a{n}"] for n in range(6)] == [1] * 6
    assert sorted(found[f"b{n}"] for n in range(8)) == [0] * 4 + [2, 2, 3, 3]
    assert (prepared.report["records"], prepared.report["rows"]) == (10, 16)
    assert [part["kept"] for part in prepared.report["sources"]] == [6, 4]
    assert set(prepared.rows["source"]) == {0, 1}
    again = prepare_dataset(files, tokenizer, data=arguments(), seed=3)
    assert questions(tokenizer, again.rows) == questions(tokenizer, prepared.rows)
    other = prepare_dataset(files, tokenizer, data=arguments(), seed=4)
    assert Counter(questions(tokenizer, other.rows)) != found  # another half of b once more
    bins = Bins(prepared.rows, 256)
    assert sum(bins.lengths) == sum(len(row["input_ids"]) for row in prepared.rows)
    seen = [bytes(doc["input_ids"]) for n in range(len(bins)) for doc in bins[0, n]]
    assert Counter(seen) == Counter(bytes(np.array(row["input_ids"], np.int32)) for row in prepared.rows)


def test_a_limit_on_the_whole_runs_through_the_sources(tokenizer, tmp_path) -> None:
    files = [numbered(tmp_path / f"{n}.jsonl", 4, n) for n in "abc"]
    prepared = prepare_dataset(files, tokenizer, data=arguments(max_train_samples=6))
    assert questions(tokenizer, prepared.rows) == ["a0", "a1", "a2", "a3", "b0", "b1"]


def test_each_source_has_settings_of_its_own(tokenizer, tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"ask": "Hi", "say": "Hello"}\n', encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"question": "Hi", "answer": "Hello"}\n', encoding="utf-8")
    files = [
        {
            "path": str(tmp_path / "a.jsonl"),
            "columns": {"prompt": "ask", "completion": "say"},
            "format": "prompt_completion",
        },
        {"path": str(tmp_path / "b.jsonl"), "chat_template": OTHER},
    ]
    prepared = prepare_dataset(files, tokenizer, data=arguments())
    assert [tokenizer.decode(row["input_ids"]).count("<|im_end|>\n") for row in prepared.rows] == [2, 0]
    assert prepared.report["formats"] == {"prompt_completion": 1, "question_answer": 1}
    with pytest.raises(ValueError, match="columns takes 'prompt' from 'asked', and the record has 'ask', 'say'"):
        prepare_dataset({**files[0], "columns": {"prompt": "asked"}}, tokenizer, data=arguments())


def test_one_source_changed_leaves_the_others_in_the_cache(tokenizer, tmp_path, monkeypatch) -> None:
    files = [numbered(tmp_path / f"{n}.jsonl", 4, n) for n in "ab"]
    prepare_dataset(files, tokenizer, data=arguments())
    numbered(tmp_path / "b.jsonl", 5, "x")
    read: list[str] = []
    from hf_sft.data import pipeline

    encode = pipeline.encode_records
    monkeypatch.setattr(pipeline, "encode_records", lambda *args: read.append(args[3]) or encode(*args))
    prepare_dataset(files, tokenizer, data=arguments())
    assert read == [files[1]]


def test_a_template_is_drawn_for_each_conversation(tokenizer, tmp_path) -> None:
    path = numbered(tmp_path / "a.jsonl", 200)
    data = arguments(chat_template=[tiny.CHATML, OTHER])
    rows = prepare_dataset(path, tokenizer, data=data, seed=1).rows
    drawn = [tokenizer.decode(row["input_ids"]).count("<|im_end|>\n") for row in rows]
    assert set(drawn) == {0, 2} and 60 < drawn.count(0) < 140
    for row, count in zip(rows, drawn, strict=True):
        turns = [{"role": "user", "content": questions(tokenizer, [row])[0]}, {"role": "assistant", "content": "a"}]
        template = tiny.CHATML if count else OTHER
        assert row["labels"] == encode_conversation(tiny.tiny_tokenizer(template), turns)["labels"]
    first = prepare_dataset(
        path, tokenizer, data=arguments(chat_template=data.chat_template, max_train_samples=50), seed=1
    )
    assert first.rows["input_ids"][:] == rows["input_ids"][:50]  # by the record's number, not by the order of calls
    other = prepare_dataset(path, tokenizer, data=data, seed=2).rows
    assert other["input_ids"][:] != rows["input_ids"][:]


def test_sources_are_sampled_apart(tokenizer, tmp_path) -> None:
    files = [{"path": numbered(tmp_path / f"{n}.jsonl", 40, n), "weight": 0.5} for n in "ab"]
    found = questions(tokenizer, prepare_dataset(files, tokenizer, data=arguments()).rows)
    one, two = ({name[1:] for name in found if name[0] == word} for word in "ab")
    assert len(one) == len(two) == 20 and one != two
    with pytest.raises(ValueError, match="leave no row"):
        prepare_dataset({"path": numbered(tmp_path / "c.jsonl", 1), "weight": 0.3}, tokenizer, data=arguments())


def test_the_draw_of_templates_does_not_repeat_with_chunks(tokenizer, tmp_path) -> None:
    path = numbered(tmp_path / "a.jsonl", 1200)
    rows = prepare_dataset(path, tokenizer, data=arguments(chat_template=[tiny.CHATML, OTHER])).rows
    drawn = [tokenizer.decode(row["input_ids"]).count("<|im_end|>\n") for row in rows]
    assert drawn[:200] != drawn[1000:]


def test_duplicates_are_counted_within_and_across_sources(tokenizer, tmp_path) -> None:
    a = numbered(tmp_path / "a.jsonl", 5)
    report = prepare_dataset([a, a], tokenizer, data=arguments()).report
    assert report["duplicates"] == 5 and [part["duplicates"] for part in report["sources"]] == [0, 0]
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]), encoding="utf-8")
    assert prepare_dataset(path, tokenizer, data=arguments()).report["duplicates"] == 1


def test_special_tokens_that_are_kept_are_counted(tokenizer, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "What is <|im_end|>?", "answer": "<|im_end|> ends a turn"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"<\|im_end\|>"):
        prepare_dataset(path, tokenizer, data=arguments())
    report = prepare_dataset(path, tokenizer, data=arguments(special_tokens_in_text="text")).report
    assert report["kept"] == 1 and report["special_tokens_in_text"] == {"<|im_end|>": 1}


def test_what_tells_tokenizers_apart(tokenizer) -> None:
    encoding = Encoding.of(arguments(), RowRules())
    before = identity(tokenizer, encoding)["tokenizer"]
    other = tiny.tiny_tokenizer()
    assert identity(other, encoding)["tokenizer"] == before
    other.pad_token = "<|im_start|>"
    assert identity(other, encoding)["tokenizer"] != before
    wanted = tiny.tiny_tokenizer()
    wanted.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    same = tiny.tiny_tokenizer()
    same.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    setattr(same, WANTED_TOKENS, ["<|x|>"])  # texts may hold it
    assert identity(same, encoding)["tokenizer"] != identity(wanted, encoding)["tokenizer"]


# ---- records kept for evaluation ----


@pytest.mark.parametrize("split, count", [(0.25, 5), (3, 3), (0.1, 2)])
def test_eval_split_divides_the_records(tokenizer, tmp_path, split: float, count: int) -> None:
    files = [numbered(tmp_path / "a.jsonl", 12, "a"), numbered(tmp_path / "b.jsonl", 8, "b")]
    data = arguments(eval_split=split)
    assert evaluation_files(data) is None  # there is no training file yet
    train, held = (
        questions(tokenizer, prepare_dataset(files, tokenizer, data=data, split=name, seed=7).rows)
        for name in ("train", "eval")
    )
    assert len(held) == count
    assert sorted(train + held) == sorted([f"a{n}" for n in range(12)] + [f"b{n}" for n in range(8)])
    other = questions(tokenizer, prepare_dataset(files, tokenizer, data=data, split="eval", seed=8).rows)
    assert sorted(other) != sorted(held)


def test_eval_split_goes_with_limits_and_weights(tokenizer, tmp_path) -> None:
    a, b = numbered(tmp_path / "a.jsonl", 40, "a"), numbered(tmp_path / "b.jsonl", 40, "b")
    files = [{"path": a, "limit": 10}, {"path": b, "limit": 10, "weight": 2}, a]
    data = arguments(eval_split=0.25)
    train, held = (
        Counter(questions(tokenizer, prepare_dataset(files, tokenizer, data=data, split=name).rows))
        for name in ("train", "eval")
    )
    assert sum(held.values()) == 15  # of 10 + 10 + 40 records, each once
    both = train + held
    assert sum(count for name, count in both.items() if name[0] == "a") == 50
    assert {name for name in both if name[0] == "b"} == {f"b{n}" for n in range(10)}
    assert sum(count for name, count in train.items() if name[0] == "b") == 2 * (
        10 - sum(held[f"b{n}"] for n in range(10))
    )


def test_a_change_of_the_split_or_of_another_source_is_seen(tokenizer, tmp_path) -> None:
    files = [numbered(tmp_path / "a.jsonl", 20, "a"), numbered(tmp_path / "b.jsonl", 20, "b")]

    def parts(split: float) -> list[list[str]]:
        data = arguments(eval_split=split)
        return [
            questions(tokenizer, prepare_dataset(files, tokenizer, data=data, split=name).rows)
            for name in ("train", "eval")
        ]

    assert [len(part) for part in parts(0.25)] == [30, 10]
    assert [len(part) for part in parts(0.5)] == [20, 20]
    numbered(tmp_path / "b.jsonl", 60, "b")
    train, held = parts(0.25)
    assert len(held) == 20 and sorted(train + held) == sorted(
        [f"a{n}" for n in range(20)] + [f"b{n}" for n in range(60)]
    )


@pytest.mark.parametrize("split", [20, 0.01, 0.99])
def test_eval_split_leaves_something_on_both_sides(tokenizer, tmp_path, split: float) -> None:
    path = numbered(tmp_path / "a.jsonl", 20)
    with pytest.raises(ValueError, match=rf"eval_split is {split:g}.*both sides"):
        prepare_dataset(path, tokenizer, data=arguments(eval_split=split))


def test_an_object_with_both_lists_is_split_accordingly(tokenizer, tmp_path) -> None:
    path = tmp_path / "a.json"
    lists = {name: [{"question": f"{name}{n}", "answer": "a"} for n in range(3)] for name in ("train", "validation")}
    path.write_text(json.dumps(lists), encoding="utf-8")
    data = arguments(train_file=str(path))
    assert evaluation_files(data) == str(path)
    for split, word in (("train", "train"), ("eval", "validation")):
        prepared = prepare_dataset(str(path), tokenizer, data=data, split=split)
        assert questions(tokenizer, prepared.rows) == [f"{word}{n}" for n in range(3)]
        assert prepared.report["records"] == 3
    assert evaluation_files(arguments(train_file=numbered(tmp_path / "b.jsonl", 2))) is None
    # Of a mixture, those sources count that bring evaluation records.
    both = [numbered(tmp_path / "b.jsonl", 2), str(path)]
    held = prepare_dataset(both, tokenizer, data=arguments(train_file=both), split="eval")
    assert questions(tokenizer, held.rows) == ["validation0", "validation1", "validation2"]
    # An eval_file of its own is read whole, and so is each of several.
    own = prepare_dataset(both, tokenizer, data=arguments(eval_file=both), split="eval")
    assert questions(tokenizer, own.rows) == ["q0", "q1", "validation0", "validation1", "validation2"]
    with pytest.raises(ValueError, match=r"a\.json brings evaluation records of its own"):
        prepare_dataset(str(path), tokenizer, data=arguments(eval_split=0.5))


# ---- processes ----


@pytest.mark.parametrize("overlength", ["drop", "truncate"])
def test_the_number_of_processes_changes_nothing(tokenizer, tmp_path, overlength: str) -> None:
    conversations: list[Any] = tiny.conversations(5300)
    conversations[17] = conversations[4001] = {"question": 5, "answer": "no text"}
    conversations[2500] = [{"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "y"}]
    conversations[2501] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 600}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in conversations), encoding="utf-8")
    found = []
    for workers in (1, 3):
        data = arguments(
            bad_records="skip", overlength=overlength, preprocessing_num_workers=workers, rebuild_cache=True,
            chat_template=[tiny.CHATML, OTHER],
        )  # fmt: skip
        prepared = prepare_dataset(path, tokenizer, data=data)
        found.append((prepared.rows[:], prepared.report))
    assert found[0] == found[1]
    assert found[0][1]["bad"]["count"] == 2
    with pytest.raises(ValueError, match=r"line 18: .*question"):
        prepare_dataset(path, tokenizer, data=arguments(preprocessing_num_workers=2))


# ---- folders of hf-sft prepare ----


def prepare_folder(folder: Path, path: str, tokenizer: Any, data: DataArguments) -> None:
    prepared = {"train": prepare_dataset(path, tokenizer, data=data)}
    save_prepared(folder, prepared, {"train": identity(tokenizer, Encoding.of(data, RowRules()))}, {})


def test_a_prepared_folder_is_taken(tokenizer, tmp_path, caplog) -> None:
    path, data = numbered(tmp_path / "a.jsonl", 5), arguments(max_seq_length=200)
    prepare_folder(tmp_path / "tokens", path, tokenizer, data)
    assert is_prepared(tmp_path / "tokens")
    direct = prepare_dataset(path, tokenizer, data=data)
    taken = prepare_dataset(str(tmp_path / "tokens"), tokenizer, data=arguments())
    assert taken.rows[:] == direct.rows[:]
    assert taken.report == direct.report
    assert json.loads((tmp_path / "tokens/data_report.json").read_text())["train"] == direct.report
    assert files_hash(str(tmp_path / "tokens")) and not caplog.text
    folder = str(tmp_path / "tokens")
    for files, changes in (
        ({"path": folder, "weight": 2}, {}),
        (folder, {"max_train_samples": 2}),
        (folder, {"eval_split": 0.5}),
    ):
        with pytest.raises(ValueError, match="is taken whole"):
            prepare_dataset(files, tokenizer, data=arguments(**changes))
    with pytest.raises(ValueError, match="was prepared without eval data"):
        prepare_dataset(folder, tokenizer, data=arguments(), split="eval")
    with pytest.raises(ValueError, match="exists already"):
        prepare_folder(tmp_path / "tokens", path, tokenizer, data)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chat_template": OTHER}, "chat_template is .*prepared with"),
        ({"train_on": "last"}, "train_on is last, and the data were prepared with assistant"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs is"),
        ({"task_type": "pretrain"}, "task_type is pretrain"),
        ({"max_seq_length": 10}, "max_seq_length is 10"),
    ],
)
def test_a_folder_of_another_run_is_refused(tokenizer, tmp_path, changes: dict[str, Any], message: str) -> None:
    prepare_folder(tmp_path / "tokens", numbered(tmp_path / "a.jsonl", 5), tokenizer, arguments())
    with pytest.raises(ValueError, match=message):
        prepare_dataset(str(tmp_path / "tokens"), tokenizer, data=arguments(**changes))


def test_a_folder_of_another_tokenizer_or_objective_is_refused(tokenizer, tmp_path) -> None:
    folder = tmp_path / "tokens"
    prepare_folder(folder, numbered(tmp_path / "a.jsonl", 5), tokenizer, arguments())
    other = tiny.tiny_tokenizer()
    other.add_tokens(["xyz"])
    with pytest.raises(ValueError, match="tokenizer is another one"):
        prepare_dataset(str(folder), other, data=arguments())
    with pytest.raises(ValueError, match="mask_token_id is 5, and the data were prepared with None"):
        prepare_dataset(str(folder), tokenizer, data=arguments(), rules=RowRules(0, 5))
    with pytest.raises(ValueError, match="stands alone"):
        prepare_dataset([str(folder), str(tmp_path / "a.jsonl")], tokenizer, data=arguments())
    (folder / "train.arrow").write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        prepare_dataset(str(folder), tokenizer, data=arguments())
