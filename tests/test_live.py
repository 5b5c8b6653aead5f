"""Data that are tokenised while the model trains: the same documents, the same training, an exact resume."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader

from hf_sft.arguments import DataArguments
from hf_sft.data.bins import Bins
from hf_sft.data.live import LazyBins, LiveRecords, StreamBins
from hf_sft.data.pipeline import prepare_dataset
from hf_sft.data.rows import RowRules
from hf_sft.training.trainer import SFTTrainer
from hf_sft.training_arguments import TrainingArguments

VOCABULARY = 259


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tiny_tokenizer()


def numbered(path: Path, count: int, word: str = "q") -> str:
    """Conversations of many lengths that can be told apart."""
    lengths = np.random.default_rng(count).integers(1, 150, count)
    records = [{"question": f"{word}{n};", "answer": "a" * int(length)} for n, length in enumerate(lengths)]
    return runs.write_jsonl(path, records)


def live(files: Any, tokenizer: Any, seed: int = 0, **changes: Any) -> LiveRecords:
    data = DataArguments(**{"max_seq_length": 256, "streaming": True, "shuffle_buffer": 50, **changes})
    return LiveRecords.of_files(files, tokenizer, data=data, rules=RowRules(), seed=seed)


def names(tokenizer: Any, bins: Any) -> list[str]:
    texts = [tokenizer.decode(document["input_ids"]) for members in bins for document in members]
    return [text.split("user\n")[1].split(";")[0] for text in texts]


# ---- lazy_preprocess ----


def test_lazy_rows_are_the_prepared_ones(tokenizer, tmp_path) -> None:
    path = numbered(tmp_path / "a.jsonl", 30)
    bins = LazyBins(live(path, tokenizer, streaming=False, lazy_preprocess=True), 256, VOCABULARY)
    rows = prepare_dataset(path, tokenizer, data=DataArguments(max_seq_length=256)).rows
    assert len(bins) == len(rows) == 30
    for n, row in enumerate(rows):
        (document,) = bins[3, n]
        assert document["input_ids"].tolist() == row["input_ids"]
        assert document["labels"].tolist() == row["labels"]
        assert (document["document"], document["epoch"]) == (n, 3)


def test_lazy_weights_limits_and_records_that_are_left_out(tokenizer, tmp_path, caplog) -> None:
    a = numbered(tmp_path / "a.jsonl", 6, "a")
    b = tmp_path / "b.jsonl"
    b.write_text(
        '{"question": "b0;", "answer": "' + "x" * 400 + '"}\n{broken\n{"question": 5, "answer": "y"}\n',
        encoding="utf-8",
    )
    files = [{"path": a, "weight": 1.5}, str(b)]
    bins = LazyBins(live(files, tokenizer, streaming=False, lazy_preprocess=True, bad_records="skip"), 256, VOCABULARY)
    found = [bins[0, n] for n in range(len(bins))]
    assert sorted(Counter(names(tokenizer, found)).values()) == [1, 1, 1, 2, 2, 2]
    assert [len(members) for members in found[-2:]] == [0, 0]  # too long; bad
    assert "1 no JSON" in caplog.text and "line 3" in caplog.text
    limited = live(files, tokenizer, streaming=False, lazy_preprocess=True, max_train_samples=4)
    assert len(LazyBins(limited, 256, VOCABULARY)) == 6
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: no JSON"):
        LazyBins(live(files, tokenizer, streaming=False, lazy_preprocess=True), 256, VOCABULARY)
    with pytest.raises(ValueError, match=r"token id 258.*100 embedding rows"):
        LazyBins(live(a, tokenizer, streaming=False, lazy_preprocess=True), 256, 100)[0, 0]


def lazy_trainer(folder: Path, train: Any, data: DataArguments, **options: Any) -> SFTTrainer:
    defaults = dict(
        output_dir=str(folder), learning_rate=1e-2, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=5,
    )  # fmt: skip
    args = TrainingArguments(**{**defaults, "num_train_epochs": 2, **options})
    return SFTTrainer(
        tiny.tiny_model(), args, train_dataset=train, processing_class=tiny.tiny_tokenizer(), data_args=data
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_lazy_training_is_training_on_the_prepared_rows(tokenizer, tmp_path, workers: int) -> None:
    conversations = tiny.conversations(22)
    lazy = DataArguments(max_seq_length=256, lazy_preprocess=True)
    trainer = lazy_trainer(tmp_path, conversations, lazy, dataloader_num_workers=workers)
    assert isinstance(trainer.train_dataset, LazyBins)
    trainer.train()
    prepared = lazy_trainer(tmp_path, conversations, DataArguments(max_seq_length=256))
    bins = prepared.train_dataset
    assert isinstance(bins, Bins)
    bins.bins = [[n] for n in range(22)]
    prepared.train()
    losses = [[line["loss"] for line in each.state.log_history if "loss" in line] for each in (trainer, prepared)]
    assert len(losses[0]) == 12 and losses[0] == losses[1]


# ---- streaming ----


@pytest.mark.parametrize("capacity", [256, None])
def test_an_epoch_of_a_stream_has_every_document_once(tokenizer, tmp_path, capacity: int | None) -> None:
    files = [numbered(tmp_path / "a.jsonl", 1300, "a"), numbered(tmp_path / "b.jsonl", 200, "b")]
    stream = StreamBins(live(files, tokenizer), capacity, VOCABULARY)
    wanted = Counter([f"a{n}" for n in range(1300)] + [f"b{n}" for n in range(200)])
    orders = []
    for epoch in (0, 1):
        bins = list(stream.bins(epoch))
        orders.append(names(tokenizer, bins))
        assert Counter(orders[-1]) == wanted
        assert sorted(document["document"] for members in bins for document in members) == list(range(1500))
        assert {document["epoch"] for members in bins for document in members} == {epoch}
        if capacity is not None:
            fills = [sum(len(document["input_ids"]) for document in members) for members in bins]
            assert max(fills) <= capacity and sum(fills) / (len(fills) * capacity) > 0.95
    assert orders[0] != orders[1]
    assert names(tokenizer, stream.bins(0)) == orders[0]
    # Sources are mixed in proportion to their sizes, not read one behind the other.
    assert 70 < sum(name.startswith("b") for name in orders[0][:750]) < 130
    other = StreamBins(live(files, tokenizer, seed=1), capacity, VOCABULARY)
    assert names(tokenizer, other.bins(0)) != orders[0]


def test_what_a_stream_draws_depends_on_seed_and_epoch(tokenizer, tmp_path) -> None:
    """One source, one document per bin: the order is that of the buffer alone."""
    path = numbered(tmp_path / "a.jsonl", 100)

    def order(epoch: int, **changes: Any) -> list[str]:
        return names(tokenizer, StreamBins(live(path, tokenizer, **changes), None, VOCABULARY).bins(epoch))

    assert order(0, shuffle_buffer=1) == order(1, shuffle_buffer=1, seed=5) == [f"q{n}" for n in range(100)]
    for buffer in (10, 1000):  # a part of the data, or all of them
        orders = [
            order(0, shuffle_buffer=buffer),
            order(1, shuffle_buffer=buffer),
            order(0, shuffle_buffer=buffer, seed=1),
        ]
        assert len({tuple(each) for each in orders}) == 3
        assert all(sorted(each) == sorted(orders[0]) for each in orders)
    assert sorted(order(0, max_train_samples=7)) == [f"q{n}" for n in range(7)]


def test_how_a_fraction_of_a_stream_is_drawn(tokenizer, tmp_path) -> None:
    files = {"path": numbered(tmp_path / "a.jsonl", 100), "weight": 0.5, "limit": 60}
    stream = StreamBins(live(files, tokenizer), None, VOCABULARY)
    first, again, next_ = (sorted(names(tokenizer, stream.bins(epoch))) for epoch in (0, 0, 1))
    assert first == again != next_ and 15 < len(first) < 45
    assert set(first) <= {f"q{n}" for n in range(60)}


def test_two_sources_are_mixed_anew_with_another_seed(tokenizer, tmp_path) -> None:
    files = [numbered(tmp_path / f"{n}.jsonl", 50, n) for n in "ab"]
    orders = {
        tuple(names(tokenizer, StreamBins(live(files, tokenizer, seed=seed, shuffle_buffer=1), None, VOCABULARY).bins(epoch)))
        for seed in (0, 1) for epoch in (0, 1)
    }  # fmt: skip
    assert len(orders) == 4


def test_a_pass_of_a_stream_is_accounted_for(tokenizer, tmp_path, caplog) -> None:
    records = [{"question": "a", "answer": "b"}, {"question": "a", "answer": "b" * 400}, {"question": 1, "answer": "b"}]
    path = runs.write_jsonl(tmp_path / "a.jsonl", records)
    caplog.set_level("INFO", logger="hf_sft")
    list(StreamBins(live(path, tokenizer, bad_records="skip"), 256, VOCABULARY).bins(0))
    assert (
        "3 records read in pass 0 of the stream, 1 kept; left out: 1 too long (overlength), 1 question is int"
        in caplog.text
    )


def test_weights_of_a_stream(tokenizer, tmp_path) -> None:
    files = [numbered(tmp_path / "a.jsonl", 20, "a"), {"path": numbered(tmp_path / "b.jsonl", 400, "b"), "weight": 1.5}]
    found = Counter(names(tokenizer, StreamBins(live(files, tokenizer), 256, VOCABULARY).bins(0)))
    assert [found[f"a{n}"] for n in range(20)] == [1] * 20
    twice = sum(found[f"b{n}"] == 2 for n in range(400))
    assert twice + sum(found[f"b{n}"] == 1 for n in range(400)) == 400 and 150 < twice < 250


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_the_stream(tokenizer, tmp_path, workers: int) -> None:
    path = numbered(tmp_path / "a.jsonl", 60)
    stream = StreamBins(live(path, tokenizer), 256, VOCABULARY)
    all_bins = itertools.chain.from_iterable(map(stream.bins, itertools.count()))
    expected = [list(itertools.islice(all_bins, 6)) for _ in range(20)]  # a step: 3 ranks x 2 bins
    found: list[list[Any]] = [[] for _ in expected]
    for rank in range(3):
        loader = DataLoader(
            stream.dealt(2, 3, rank), batch_size=None, num_workers=workers, collate_fn=lambda bins: bins
        )
        for step, batch in enumerate(itertools.islice(loader, 20)):
            assert len(batch) == 2
            found[step].append(batch)
    for step, ranks in enumerate(found):
        dealt = [members for batch in ranks for members in batch]
        assert sorted(names(tokenizer, dealt)) == sorted(names(tokenizer, expected[step]))
        lengths = [[sum(len(item["input_ids"]) for item in members) for members in batch] for batch in ranks]
        spread = max(max(each) for each in lengths) - min(min(each) for each in lengths)
        assert max(map(sum, lengths)) - min(map(sum, lengths)) <= spread


def test_long_texts_of_a_stream_are_split(tokenizer, tmp_path) -> None:
    path = runs.write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 600}, {"text": "y" * 100}])
    bins = list(StreamBins(live(path, tokenizer, task_type="pretrain"), 256, VOCABULARY).bins(0))
    documents = [document for members in bins for document in members]
    assert sorted(len(document["input_ids"]) for document in documents) == [91, 101, 256, 256]
    assert sorted(document["document"] for document in documents) == [0, 1, 2, 3]
    assert sum((document["labels"] != -100).sum() for document in documents) == 702


def test_an_empty_stream_ends_with_an_error(tokenizer, tmp_path) -> None:
    path = runs.write_jsonl(tmp_path / "a.jsonl", [{"question": 1, "answer": "a"}])
    with pytest.raises(ValueError, match=r"line 1: question"):
        next(iter(StreamBins(live(path, tokenizer), 256, VOCABULARY)))
    with pytest.raises(ValueError, match="the stream is empty"):
        next(iter(StreamBins(live(path, tokenizer, bad_records="skip"), 256, VOCABULARY)))


def test_examples_without_a_length_are_a_stream(tmp_path) -> None:
    conversations = tiny.conversations(20)

    def generate() -> Any:
        yield from ({"messages": conversation} for conversation in conversations)

    train = IterableDataset.from_generator(generate)
    trainer = lazy_trainer(tmp_path, train, DataArguments(max_seq_length=256), max_steps=3)
    assert isinstance(trainer.train_dataset, StreamBins)
    trainer.train()
    assert trainer.state.global_step == 3
    with pytest.raises(ValueError, match="can be read once only"):
        lazy_trainer(tmp_path, generate(), DataArguments(max_seq_length=256), max_steps=3)
    with pytest.raises(ValueError, match="max_steps"):
        lazy_trainer(tmp_path, train, DataArguments(max_seq_length=256))


# ---- through train.py ----


@pytest.mark.parametrize("how", ["streaming", "lazy_preprocess"])
@pytest.mark.parametrize("objective", ["causal", "wedlm"])
def test_a_resumed_run_goes_on_exactly(tmp_path, how: str, objective: str) -> None:
    changes = {how: True, "save_strategy": "steps", "save_steps": 3, "shuffle_buffer": 20}
    if objective == "wedlm":
        changes |= {"objective": "wedlm", "mask_token": "<|mask|>", "block_size": 8}
    whole = runs.arguments(tmp_path, output_dir=str(tmp_path / "whole"), **changes)
    runs.train(whole)
    stopped = {**whole, "output_dir": str(tmp_path / "stopped")}
    runs.train(stopped)
    for name in ("checkpoint-6", "checkpoint-8"):
        (tmp_path / "stopped" / name).rename(tmp_path / name)
    for path in (tmp_path / "stopped").glob("*.safetensors"):
        path.unlink()
    runs.train({**stopped, "resume_from_checkpoint": "auto"})
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    report = json.loads((tmp_path / "whole" / "data_report.json").read_text())
    assert report["train"]["tokenised"] == how


def test_streaming_needs_steps_and_knows_its_limits(tmp_path) -> None:
    values = runs.arguments(tmp_path, streaming=True, max_steps=-1)
    with pytest.raises(ValueError, match="max_steps is not set"):
        runs.train(values)
    for changes, message in (
        ({"lazy_preprocess": True}, "both tokenise"),
        ({"eval_split": 0.1}, "eval_split is set"),
        ({"lazy_preprocess": True, "streaming": False, "task_type": "pretrain"}, "overlength is split"),
    ):
        with pytest.raises(ValueError, match=message):
            runs.train(runs.arguments(tmp_path, **{"streaming": True, **changes}))
