"""From a file to token rows in Arrow: the account of every record, and the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from datasets import Dataset

from hf_sft.arguments import DataArguments
from hf_sft.collators import CausalCollator
from hf_sft.data import prepared
from hf_sft.data.bins import Bins
from hf_sft.data.cache import wait_for_folder, write_folder
from hf_sft.data.chat import encode_conversation
from hf_sft.data.pipeline import (
    prepare_dataset,
    prepare_examples,
    rows_from_examples,
)
from hf_sft.data.prepared import packing_report, write_data_report
from hf_sft.data.rows import SCHEMA, RowEncoder

TOO_LONG = {"question": "x" * 600, "answer": "y"}
GOOD = {"question": "Hi", "answer": "Hello"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tiny_tokenizer()


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def arguments(**changes: Any) -> DataArguments:
    return DataArguments(**{"max_seq_length": 256, **changes})


def lists(rows: Dataset) -> list[dict[str, list[int]]]:
    return [{name: rows[n][name] for name in ("input_ids", "labels")} for n in range(len(rows))]


def read_equals_sum(report: dict[str, Any]) -> bool:
    return report["records"] == report["kept"] + sum(report["dropped"].values()) + report["bad"]["count"]


# ---- rows and report ----


def test_rows_are_those_of_encode_conversation(tokenizer, tmp_path) -> None:
    conversations = tiny.conversations(2500)  # several chunks
    prepared = prepare_dataset(jsonl(tmp_path / "a.jsonl", conversations), tokenizer, data=arguments())
    expected = [encode_conversation(tokenizer, c) for c in conversations[:3] + conversations[-3:]]
    rows = prepared.rows
    assert [lists(rows)[n] for n in (0, 1, 2, 2497, 2498, 2499)] == expected
    assert rows.features.arrow_schema.equals(SCHEMA)
    assert rows["record"][:] == list(range(1, 2501))
    assert rows["full_length"][:] == [len(row["input_ids"]) for row in lists(rows)]
    assert rows.cache_files  # memory-mapped
    lengths = [len(row["input_ids"]) for row in lists(rows)]
    learned = sum(sum(label != -100 for label in row["labels"]) for row in lists(rows))
    counts = {
        "records": 2500,
        "kept": 2500,
        "dropped": {"overlength": 0, "no_supervised_token": 0},
        "too_long_lengths": {},
        "bad": {"count": 0, "reasons": {}, "examples": []},
        "truncated": 0,
        "cut_into_several": 0,
        "tokens": sum(lengths),
        "supervised_tokens": learned,
        "supervised_share": learned / sum(lengths),
        "longest": max(lengths),
        "mean_length": sum(lengths) / 2500,
        "duplicates": 2500 - len({str(row) for row in lists(rows)}),
        "formats": {"messages": 2500},
        "special_tokens_in_text": {},
    }
    sources = [{"source": str(tmp_path / "a.jsonl"), "weight": 1.0, **counts}]
    shares = [sum(label != -100 for label in row["labels"]) / len(row["input_ids"]) for row in lists(rows)]
    histograms = {name: prepared.report[f"{name}_histogram"] for name in ("length", "share")}
    for name, values in (("length", lengths), ("share", [100 * share for share in shares])):
        assert histograms[name]["counts"] == np.histogram(values, histograms[name]["borders"])[0].tolist()
        assert sum(histograms[name]["counts"]) == 2500 and len(histograms[name]["borders"]) <= 26
    report = {name: value for name, value in prepared.report.items() if not name.endswith("_histogram")}
    assert report == {"split": "train", **counts, "rows": 2500, "sources": sources}


def test_overlength_rows(tokenizer, tmp_path) -> None:
    long_answer = {"question": "Hi", "answer": "y" * 600}
    path = jsonl(tmp_path / "a.jsonl", [GOOD, TOO_LONG, long_answer, GOOD])
    dropped = prepare_dataset(path, tokenizer, data=arguments())
    assert dropped.report["dropped"] == {"overlength": 2, "no_supervised_token": 0}
    assert len(dropped.rows) == dropped.report["kept"] == 2
    cut = prepare_dataset(path, tokenizer, data=arguments(overlength="truncate"))
    assert cut.report["dropped"] == {"overlength": 0, "no_supervised_token": 1}  # its question alone fills the row
    assert cut.report["truncated"] == 1
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    row = cut.rows[1]
    assert len(row["input_ids"]) == 256
    assert end not in row["labels"]  # not taught to stop
    assert row["labels"][-1] == row["input_ids"][-1]
    for each in (dropped, cut):
        assert read_equals_sum(each.report)
    with pytest.raises(
        ValueError, match=r"2 of the first 4 documents are too long(.|\n)*line 2: .* max_seq_length is 256"
    ):
        prepare_dataset(path, tokenizer, data=arguments(overlength="error"))


def test_bad_records(tokenizer, tmp_path) -> None:
    bad = ["{broken\n", [{"role": "gpt", "content": "a"}], {"question": "a", "answer": "<|im_end|>"}, {"x": 1}, "3\n"]
    path = jsonl(tmp_path / "a.jsonl", [GOOD, *bad, GOOD, {"messages": [GOOD]}])
    with pytest.raises(ValueError) as caught:
        prepare_dataset(path, tokenizer, data=arguments())
    for number in (2, 3, 4, 5, 6, 8):
        assert f"a.jsonl, line {number}: " in str(caught.value)
    assert "6 of the first 8 records" in str(caught.value)
    assert "bad_records to skip" in str(caught.value)
    prepared = prepare_dataset(path, tokenizer, data=arguments(bad_records="skip"))
    bad_report = prepared.report["bad"]
    assert bad_report["count"] == sum(bad_report["reasons"].values()) == len(bad_report["examples"]) == 6
    assert "message N has the role" in bad_report["reasons"]
    assert len(prepared.rows) == 2
    assert read_equals_sum(prepared.report)


def test_many_bad_records_are_not_all_listed(tokenizer, tmp_path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [GOOD, *[f"no {n}\n" for n in range(37)]])
    with pytest.raises(ValueError, match=r"37 of the first 38 records(.|\n)*line 11:(.|\n)*and 27 more") as caught:
        prepare_dataset(path, tokenizer, data=arguments())
    assert "line 12" not in str(caught.value)
    same = jsonl(tmp_path / "b.jsonl", [GOOD, *["no\n"] * 37])  # one reason is told once
    with pytest.raises(ValueError, match=r"line 2: .*\n +the same: line 3, .*, line 11\n +\.\.\. and 27 more"):
        prepare_dataset(same, tokenizer, data=DataArguments(max_seq_length=64))


@pytest.mark.parametrize(
    ("record", "reason"), [(TOO_LONG, r"1 too long \(overlength\)"), ({"x": 1}, "1 no known format")]
)
def test_nothing_left(tokenizer, tmp_path, record: Any, reason: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [record])
    with pytest.raises(ValueError, match=rf"of 1 records none is left to train on \({reason}\)"):
        prepare_dataset(path, tokenizer, data=arguments(bad_records="skip"))


def test_limits_and_splits(tokenizer, tmp_path) -> None:
    path = jsonl(tmp_path / "a.jsonl", tiny.conversations(20))
    data = arguments(max_train_samples=7, max_eval_samples=3)
    assert prepare_dataset(path, tokenizer, data=data).report["records"] == 7
    evaluation = prepare_dataset(path, tokenizer, data=data, split="eval")
    assert (evaluation.report["split"], len(evaluation.rows)) == ("eval", 3)


def test_wrong_input_leaves_nothing(tokenizer, tmp_path) -> None:
    cache = tmp_path / "cache"
    data = arguments(data_cache_dir=str(cache))
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"question": "\xff", "answer": "a"}\n')
    (tmp_path / "empty.jsonl").touch()
    for name, reason in {
        "missing.jsonl": "no such data file",
        "empty.jsonl": "empty",
        "bad.jsonl": "line 1: invalid UTF-8",
    }.items():
        with pytest.raises(ValueError, match=reason):
            prepare_dataset(tmp_path / name, tokenizer, data=data)
    good = jsonl(tmp_path / "good.jsonl", [GOOD])
    with pytest.raises(ValueError, match="no chat template"):
        prepare_dataset(good, tiny.tiny_tokenizer(None), data=data)
    with pytest.raises(ValueError, match="chat_template_kwargs is no JSON"):
        prepare_dataset(good, tokenizer, data=arguments(chat_template_kwargs="{"))
    assert not cache.exists() or not list(cache.iterdir())
    with pytest.raises(ValueError, match=r"cannot be written to.*data_cache_dir"):
        prepare_dataset(good, tokenizer, data=arguments(data_cache_dir=str(good / "x")))


# ---- cache ----


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Grows by one entry for each chunk that is tokenised."""
    calls: list[int] = []
    encode = RowEncoder.encode
    monkeypatch.setattr(RowEncoder, "encode", lambda *args: calls.append(1) or encode(*args))
    return calls


def test_the_cache_is_used_while_nothing_changes(tokenizer, tmp_path, encoded) -> None:
    path = jsonl(tmp_path / "a.jsonl", tiny.conversations(5))
    first = prepare_dataset(path, tokenizer, data=arguments())
    tokenizer("abc", truncation=True, max_length=2)  # leaves state behind that is none of our business
    path.touch()
    again = prepare_dataset(path, tokenizer, data=arguments(packing=False))
    assert len(encoded) == 1
    assert lists(again.rows) == lists(first.rows)
    assert again.report == first.report
    folder = Path(first.rows.cache_files[0]["filename"]).parent
    assert folder.parent == Path(os.environ["HF_SFT_CACHE"])
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    prepare_dataset(path, tokenizer, data=arguments(rebuild_cache=True))
    assert len(encoded) == 2
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert lists(first.rows) == lists(again.rows)  # those who hold the old folder keep it


def test_a_change_of_anything_is_seen(tokenizer, tmp_path, encoded, monkeypatch) -> None:
    path = jsonl(tmp_path / "a.jsonl", tiny.conversations(5))
    other = tiny.tiny_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    changes: list[tuple[Any, dict[str, Any]]] = [
        (tokenizer, {}),
        (other, {}),
        (tokenizer, {"chat_template": tiny.CHATML + " "}),
        (tokenizer, {"chat_template_kwargs": '{"a": 1}'}),
        (tokenizer, {"max_seq_length": 255}),
        (tokenizer, {"overlength": "truncate"}),
        (tokenizer, {"train_on": "last"}),
        (tokenizer, {"bad_records": "skip"}),
        (tokenizer, {"max_train_samples": 4}),
    ]
    for count, (used, fields) in enumerate(changes, 1):
        for _ in range(2):
            prepare_dataset(path, used, data=arguments(**fields))
        assert len(encoded) == count, fields
    jsonl(path, tiny.conversations(5, seed=1))
    prepare_dataset(path, tokenizer, data=arguments())
    monkeypatch.setattr(prepared, "hash_files", lambda paths: "other code")
    prepare_dataset(path, tokenizer, data=arguments())
    assert len(encoded) == len(changes) + 2


def test_the_data_cache_dir(tokenizer, tmp_path, monkeypatch) -> None:
    path = jsonl(tmp_path / "a.jsonl", [GOOD])
    prepare_dataset(path, tokenizer, data=arguments(data_cache_dir=str(tmp_path / "own")))
    assert len(list((tmp_path / "own").glob("*/rows.arrow"))) == 1
    monkeypatch.delenv("HF_SFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    prepare_dataset(path, tokenizer, data=arguments())
    assert len(list((tmp_path / "home/.cache/hf_sft").glob("*/rows.arrow"))) == 1


def test_a_damaged_cache_is_named(tokenizer, tmp_path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [GOOD])
    folder = Path(prepare_dataset(path, tokenizer, data=arguments()).rows.cache_files[0]["filename"]).parent
    (folder / "rows.arrow").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"damaged.*rebuild_cache"):
        prepare_dataset(path, tokenizer, data=arguments())
    assert len(prepare_dataset(path, tokenizer, data=arguments(rebuild_cache=True)).rows) == 1


def test_folders_are_replaced_only_where_asked(tmp_path) -> None:
    folder = tmp_path / "key"
    for replace, expected in ((False, "a"), (False, "a"), (True, "c")):
        text = "a" if not folder.exists() else "c" if replace else "b"
        write_folder(folder, lambda target, text=text: (target / "x").write_text(text), replace=replace)
        assert (folder / "x").read_text() == expected
        assert list(tmp_path.iterdir()) == [folder]


def test_a_failed_write_leaves_nothing(tmp_path) -> None:
    def fail(target: Path) -> None:
        (target / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "cache" / "key", fail)
    assert list((tmp_path / "cache").iterdir()) == []


# ---- several ranks ----


def test_other_ranks_wait_for_the_first(tokenizer, tmp_path, encoded, monkeypatch) -> None:
    path = jsonl(tmp_path / "a.jsonl", [GOOD])
    found: list[Any] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    waiting = threading.Thread(
        target=lambda: found.append(prepare_dataset(path, tokenizer, data=arguments())), daemon=True
    )
    waiting.start()
    time.sleep(0.5)
    assert not found
    assert not encoded
    monkeypatch.setenv("LOCAL_RANK", "0")
    first = prepare_dataset(path, tokenizer, data=arguments())
    waiting.join(timeout=30)
    assert lists(found[0].rows) == lists(first.rows)
    assert len(encoded) == 1
    with pytest.raises(TimeoutError, match="LOCAL_RANK 0"):
        wait_for_folder(tmp_path / "never", patience=0.1)


def test_other_ranks_do_not_take_a_folder_that_is_being_rebuilt(tokenizer, tmp_path, encoded, monkeypatch) -> None:
    path = jsonl(tmp_path / "a.jsonl", [GOOD])
    old = Path(prepare_dataset(path, tokenizer, data=arguments()).rows.cache_files[0]["filename"]).parent
    os.utime(old, (1e9, 1e9))  # from before this launch
    found: list[Any] = []
    data = arguments(rebuild_cache=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    waiting = threading.Thread(target=lambda: found.append(prepare_dataset(path, tokenizer, data=data)), daemon=True)
    waiting.start()
    time.sleep(0.5)
    assert not found
    monkeypatch.setenv("LOCAL_RANK", "0")
    prepare_dataset(path, tokenizer, data=data)
    waiting.join(timeout=30)
    assert len(found) == 1
    assert len(encoded) == 2


def test_processes_that_prepare_at_once_do_not_collide(tmp_path) -> None:
    path = jsonl(tmp_path / "a.jsonl", tiny.conversations(50))
    code = (
        f"import sys; sys.path[:0] = [{str(tiny.__file__.rpartition('/')[0])!r}, {str(Path(__file__).parents[1])!r}]\n"
        "import tiny\nfrom hf_sft.arguments import DataArguments\nfrom hf_sft.data.pipeline import prepare_dataset\n"
        f"print(len(prepare_dataset({str(path)!r}, tiny.tiny_tokenizer(), data=DataArguments(rebuild_cache=True)).rows))"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == ["50", "50"]
    assert len(list(Path(os.environ["HF_SFT_CACHE"]).iterdir())) == 1


# ---- examples in memory ----


def test_examples_of_any_kind_give_the_same_rows(tokenizer) -> None:
    conversations = tiny.conversations(6)
    expected = [encode_conversation(tokenizer, c) for c in conversations]
    messages = [{"messages": c} for c in conversations]
    for examples in (conversations, messages, Dataset.from_list(messages), expected, Dataset.from_list(expected)):
        rows = rows_from_examples(examples, tokenizer, data=arguments())
        assert lists(rows) == expected
        assert rows_from_examples(rows, tokenizer, data=arguments()) is rows  # nothing is done twice


def test_token_rows_need_no_tokenizer(caplog) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "extra": "x"}, {"input_ids": [1, 2], "labels": [1, -100]}]
    prepared = prepare_examples(rows, None, data=arguments())
    assert lists(prepared.rows) == [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    # A label on the first token is never predicted: no token stands before it.
    assert prepared.report["dropped"]["no_supervised_token"] == 1
    assert prepared.report["supervised_tokens"] == 2
    assert "1 of 2 examples are left out: 1 no supervised token" in caplog.text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [1, 2]}, "input_ids and no labels"),
        ({"input_ids": [1, 2], "labels": [2]}, "2 input_ids and 1 labels"),
        ({"input_ids": [], "labels": []}, "no tokens"),
        ({"input_ids": [1.5, 2], "labels": [1, 2]}, "whole numbers"),
        ({"input_ids": [[1], [1, 2]], "labels": [1, 2]}, "whole numbers"),
        ({"input_ids": [1, 259], "labels": [1, 2]}, "holds 259, but token ids are 0 to 258"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "holds -1"),
        ({"input_ids": [-100, 2], "labels": [1, 2]}, "holds -100"),
    ],
)
def test_token_rows_are_checked(tokenizer, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"example 0: .*{reason}"):
        rows_from_examples([row], tokenizer, data=arguments())


def test_examples_that_are_none(tokenizer, tmp_path) -> None:
    for examples, reason in [
        ("train.jsonl", "this is a path"),
        (iter([GOOD]), "has no length"),
        ([], "of 0 records none is left"),
    ]:
        with pytest.raises(ValueError, match=reason):
            rows_from_examples(examples, tokenizer, data=arguments())


# ---- data_report.json ----


def test_the_data_report(tmp_path) -> None:
    packing = packing_report(bins=3, capacity=10, tokens=24)
    assert packing["fill"] == pytest.approx(0.8, abs=1e-12)
    path = write_data_report(tmp_path / "out", {"train": {"kept": 3}, "eval": {"kept": 1}}, packing)
    assert path == tmp_path / "out" / "data_report.json"
    assert json.loads(path.read_text()) == {"train": {"kept": 3}, "eval": {"kept": 1}, "packing": packing}
    assert [p.name for p in path.parent.iterdir()] == ["data_report.json"]


# ---- real data ----


@pytest.mark.slow
@pytest.mark.alone
def test_preparing_gsm8k_takes_little_longer_than_tokenising_it(shared_data) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5")
    path = shared_data / "gsm8k" / "train.jsonl"

    def bare() -> float:
        started = time.perf_counter()
        records = [json.loads(line) for line in path.open(encoding="utf-8")]
        turns = [tiny_turns(record) for record in records]
        texts = [tokenizer.apply_chat_template(t, tokenize=False) for t in turns]
        encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        assert sum(len(encoding.ids) for encoding in encodings) == 1_587_568
        return time.perf_counter() - started

    def ours() -> float:
        started = time.perf_counter()
        report = prepare_dataset(path, tokenizer, data=DataArguments(rebuild_cache=True)).report
        assert (report["kept"], report["tokens"]) == (7473, 1_587_568)
        return time.perf_counter() - started

    def tiny_turns(record: dict[str, str]) -> list[dict[str, str]]:
        return [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]

    times = [(bare(), ours()) for _ in range(4)]
    bare_time, our_time = (min(values) for values in zip(*times, strict=True))
    print(f"bare {bare_time:.2f} s, prepare {our_time:.2f} s, ratio {our_time / bare_time:.2f}")
    assert our_time / bare_time < 2.5
    started = time.perf_counter()
    bins = Bins(prepare_dataset(path, tokenizer, data=DataArguments()).rows, 2048)
    CausalCollator(True, 0)([bins[0, 0]])
    assert time.perf_counter() - started < 2  # to the first batch, from the cache


@pytest.mark.parametrize("name", ["qwen2.5", "minimind"])
def test_every_record_of_real_files_is_used_or_counted(shared_data, name: str) -> None:
    """Without being told their formats; only documents that are too long are left out."""
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    files = {
        "gsm8k/test.jsonl": ("question_answer", 1319),
        "multiturn/dummy_conversation.json": ("sharegpt", 500),
        "alpaca/instruction-data.json": ("alpaca", 1100),
        "toolcall/glaive_toolcall_en_demo.json": ("sharegpt", 300),
        "preference/dpo_en_demo.json": ("preference", 300),
    }
    for file, (shape, records) in files.items():
        report = prepare_dataset(shared_data / file, real, data=DataArguments(bad_records="skip")).report
        assert read_equals_sum(report) and report["records"] == records, file
        assert report["bad"]["count"] == 0 and report["dropped"]["no_supervised_token"] == 0, file
        assert report["formats"] == {shape: records}


def test_a_real_text(shared_data) -> None:
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260k")
    path = shared_data / "text" / "tinyshakespeare.txt"
    prepared = prepare_dataset(path, real, data=DataArguments(task_type="pretrain", max_seq_length=512))
    whole = real(path.read_text(encoding="utf-8"))["input_ids"]
    learned = [token for row in prepared.rows["labels"] for token in row if token != -100]
    assert learned == [*whole[1:], real.eos_token_id]  # a BOS is read only
    assert read_equals_sum(prepared.report) and prepared.report["records"] == 1
