"""Continued pretraining: however texts are cut, joined, streamed and dealt, each of their tokens is learned exactly once."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_sft.arguments import DataArguments, WeDLMArguments
from hf_sft.cli import main
from hf_sft.data.bins import BinSampler
from hf_sft.data.chat import IGNORE
from hf_sft.data.concat import join
from hf_sft.data.live import LiveRecords, StreamBins
from hf_sft.data.pipeline import prepare_dataset, rows_from_examples
from hf_sft.data.rows import RowRules
from hf_sft.data.tokenize import split_row
from hf_sft.parsing import parse_values
from hf_sft.training.trainer import SFTTrainer
from hf_sft.training_arguments import TrainingArguments

EOS, A = 256, 64  # of the tiny tokenizer, which has no BOS


def lists(rows: Any) -> list[tuple[list[int], list[int]]]:
    return [(list(row["input_ids"]), list(row["labels"])) for row in rows]


def learned(rows: list[tuple[list[int], list[int]]]) -> list[int]:
    return [label for _, labels in rows for label in labels[1:] if label != IGNORE]


def texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefgh \n"), int(n))) + "." for n in rng.integers(1, longest, count)]


def stream_of(texts: list[str]) -> list[int]:
    tokenizer = tiny.tiny_tokenizer()
    return [token for text in texts for token in [*tokenizer(text)["input_ids"], EOS]]


def data(**changes: Any) -> DataArguments:
    return DataArguments(**{"task_type": "pretrain", "max_seq_length": 32, "pretrain_packing": "concat", **changes})


# ---- sliding windows ----


@given(length=st.integers(1, 300), limit=st.integers(2, 20), overlap=st.integers(1, 19))
def test_windows_lose_nothing_and_overlap(length: int, limit: int, overlap: int) -> None:
    overlap = min(overlap, limit - 1)
    tokens = list(range(length))
    rows = split_row({"input_ids": tokens, "labels": tokens}, limit, overlap)
    assert rows[0]["input_ids"] == tokens[:limit] == rows[0]["labels"]
    assert rows[0]["labels"] + [label for row in rows[1:] for label in row["labels"][overlap:]] == tokens
    for before, after in itertools.pairwise(rows):
        assert len(before["input_ids"]) == limit and overlap < len(after["input_ids"]) <= limit
        assert after["input_ids"][:overlap] == before["input_ids"][-overlap:]
        assert after["labels"][:overlap] == [IGNORE] * overlap and IGNORE not in after["labels"][overlap:]


def test_windows_through_the_pipeline(tmp_path) -> None:
    (tmp_path / "book.txt").write_text("abcdefgh" * 40, encoding="utf-8")
    options = {"pretrain_packing": "documents", "data_cache_dir": str(tmp_path / "cache")}
    found = {}
    for overlap in (1, 8, 31):
        prepared = prepare_dataset(
            tmp_path / "book.txt", tiny.tiny_tokenizer(), data=data(split_overlap=overlap, **options)
        )
        found[overlap] = lists(prepared.rows)
        assert learned(found[overlap]) == stream_of(["abcdefgh" * 40])[1:]
        assert prepared.report["supervised_tokens"] == 320  # of 321, the end counted
        assert prepared.report["tokens"] == sum(len(ids) for ids, _ in found[overlap])
    assert [len(rows) for rows in found.values()] == [11, 14, 290]  # the cache tells them apart


# ---- joined ----


@given(
    lengths=st.lists(st.integers(0, 50), max_size=12), limit=st.integers(2, 20), holes=st.integers(1, 5)
)  # fmt: skip
def test_joined_rows_learn_every_token_of_the_stream_once(lengths: list[int], limit: int, holes: int) -> None:
    stream = np.arange(sum(lengths))
    labels = np.where(stream % holes == holes - 1, IGNORE, stream) if holes > 1 else stream
    borders = np.cumsum(lengths)[:-1] if lengths else []
    parts = [np.split(column, borders) for column in (stream, labels, stream * 2)]
    rows = list(join(zip(*parts, strict=True), limit))
    assert all(len(ids) == limit for ids, _, _ in rows[:-1]) and all(len(ids) > 1 for ids, _, _ in rows)
    assert learned([(ids.tolist(), labels.tolist()) for ids, labels, _ in rows]) == [
        label for label in labels[1:] if label != IGNORE
    ]
    for (before, _, _), (after, own, beside) in itertools.pairwise(rows):
        assert after[0] == before[-1] and own[0] == IGNORE and (beside == 2 * after).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_files_are_joined_in_their_order(tmp_path, workers: int) -> None:
    written = texts(2500)  # several chunks
    path = runs.write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in written])
    tokenizer = tiny.tiny_tokenizer()
    prepared = prepare_dataset(path, tokenizer, data=data(preprocessing_num_workers=workers))
    rows, stream = lists(prepared.rows), stream_of(written)
    assert learned(rows) == stream[1:]
    assert {len(ids) for ids, _ in rows[:-1]} == {32} and 1 < len(rows[-1][0]) <= 32
    report = prepared.report
    assert report["records"] == report["kept"] == 2500 and report["rows"] == len(rows)
    assert report["tokens"] == sum(len(ids) for ids, _ in rows) == len(stream) + len(rows) - 1
    assert report["supervised_tokens"] == len(stream) - 1 and report["longest"] == 32
    assert prepared.rows["record"][0] == 1 and sorted(prepared.rows["record"]) == prepared.rows["record"][:]
    assert lists(rows_from_examples(written, tokenizer, data=data())) == rows


def test_a_bos_is_learned_behind_another_text(shared_data) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260k")
    ((ids, labels),) = lists(rows_from_examples(["One day", "a cat"], tokenizer, data=data(max_seq_length=64)))
    assert ids == [*tokenizer("One day")["input_ids"], 2, *tokenizer("a cat")["input_ids"], 2]
    assert ids.count(1) == 2 and labels == [IGNORE, *ids[1:]]


def test_token_rows_keep_their_labels() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, IGNORE, 7]}, {"input_ids": [8, 9], "labels": [IGNORE, 9]}]
    ((ids, labels),) = lists(rows_from_examples(rows, None, data=data()))
    assert ids == [5, 6, 7, 8, 9] and labels == [IGNORE, IGNORE, 7, IGNORE, 9]


def test_each_source_of_a_mixture_by_itself(tmp_path) -> None:
    sources = [texts(30, 1), texts(40, 2)]
    paths = [runs.write_jsonl(tmp_path / f"{n}.jsonl", [{"text": t} for t in each]) for n, each in enumerate(sources)]
    whole = lists(prepare_dataset(paths, tiny.tiny_tokenizer(), data=data()).rows)
    apart = [lists(prepare_dataset(path, tiny.tiny_tokenizer(), data=data()).rows) for path in paths]
    assert whole == apart[0] + apart[1]
    twice = prepare_dataset([{"path": paths[0], "weight": 2}], tiny.tiny_tokenizer(), data=data())
    assert Counter(learned(lists(twice.rows))) == Counter(2 * learned(apart[0]))


def test_held_out_texts_are_joined_as_well(tmp_path) -> None:
    written = texts(50)
    path = runs.write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in written])
    splits = {
        split: prepare_dataset(path, tiny.tiny_tokenizer(), data=data(eval_split=0.2), split=split)
        for split in ("train", "eval")
    }
    assert splits["eval"].report["records"] == 10 and splits["train"].report["records"] == 40
    assert sum(part.report["supervised_tokens"] for part in splits.values()) == len(stream_of(written)) - 2


# ---- streaming ----


def live(path: str, seed: int = 0, **changes: Any) -> LiveRecords:
    options = data(streaming=True, **{"shuffle_buffer": 20, **changes})
    return LiveRecords.of_files(path, tiny.tiny_tokenizer(), data=options, rules=RowRules(), seed=seed)


def test_a_stream_joins_texts_as_the_buffer_gives_them(tmp_path) -> None:
    written = texts(300)
    path = runs.write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in written])
    in_order = [row for (row,) in StreamBins(live(path, shuffle_buffer=1), None, 259).bins(0)]
    assert [ids.tolist() for ids in (row["input_ids"] for row in in_order)] == [
        ids for ids, _ in lists(rows_from_examples(written, tiny.tiny_tokenizer(), data=data()))
    ]
    orders = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        rows = [row for (row,) in StreamBins(live(path, seed), 32, 259).bins(epoch)]
        again = [row for (row,) in StreamBins(live(path, seed), 32, 259).bins(epoch)]
        assert [r["document"] for r in rows] == [r["document"] for r in again]
        rows.sort(key=lambda row: row["document"])
        assert lists(rows) == lists(sorted(again, key=lambda row: row["document"]))
        assert len(rows) == len(in_order) and {len(row["input_ids"]) for row in rows[:-1]} == {32}
        tokens = [*rows[0]["input_ids"][:1], *learned(lists(rows))]
        ends = [place + 1 for place, token in enumerate(tokens) if token == EOS]
        orders[seed, epoch] = tuple(tuple(tokens[start:stop]) for start, stop in itertools.pairwise([0, *ends]))
        assert ends[-1] == len(tokens)
        assert Counter(orders[seed, epoch]) == Counter(tuple(stream_of([text])) for text in written)
    assert len(set(orders.values())) == 3


# ---- the whole of a real file through the Trainer's loaders ----

LENGTH = 512


GRAM = 12


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """[tokens - GRAM + 1] of so many tokens behind one another."""
    powers = np.uint64(1_000_003) ** np.arange(GRAM, dtype=np.uint64)
    return (np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), GRAM) * powers).sum(axis=1)


class File:
    """The tokens of tinyshakespeare.txt, made by the tokenizer alone."""

    def __init__(self, shared_data: Path) -> None:
        from transformers import AutoTokenizer

        self.path = shared_data / "text" / "tinyshakespeare.txt"
        self.model = str(shared_data / "models" / "stories260k")
        self.tokenizer = AutoTokenizer.from_pretrained(self.model, model_max_length=10**9)
        text = self.path.read_text(encoding="utf-8")
        ids = self.tokenizer(text)["input_ids"]
        assert self.tokenizer.decode(ids[1:]) == text  # blank lines, line ends and all
        self.tokens = np.array([*ids, self.tokenizer.eos_token_id], np.int64)
        self.index()

    def index(self) -> None:
        """Order all places by the tokens that follow."""
        self.hashes = _hashes(self.tokens)
        self.order = np.argsort(self.hashes)
        self.sorted = self.hashes[self.order]

    def place(self, ids: np.ndarray) -> int:
        """Where a window of tokens stands in the file; there must be one such place."""
        value = _hashes(ids[:GRAM])[0]
        first, last = (np.searchsorted(self.sorted, value, side) for side in ("left", "right"))
        found = [n for n in self.order[first:last] if np.array_equal(self.tokens[n : n + len(ids)], ids)]
        assert len(found) == 1
        return int(found[0])

    def trainer(self, folder: Path, batch: int = 23, **changes: Any) -> SFTTrainer:
        from transformers import AutoModelForCausalLM

        args = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=batch, use_cpu=True, max_steps=1, disable_tqdm=True
        )
        options = data(max_seq_length=LENGTH, **changes)
        objective = {}
        if options.objective == "wedlm":
            objective = {"wedlm_args": WeDLMArguments(mask_token="<|mask|>")}
        train = (
            LiveRecords.of_files(str(self.path), self.tokenizer, data=options, rules=RowRules(), seed=0)
            if options.streaming
            else prepare_dataset(self.path, self.tokenizer, data=options)
        )
        model = AutoModelForCausalLM.from_pretrained(self.model)
        return SFTTrainer(
            model, args, train_dataset=train, processing_class=self.tokenizer, data_args=options, **objective
        )

    def count(self, batches: Any) -> np.ndarray:
        """How often each token of the file is a target, with all tokens of its row before it."""
        counts = np.zeros(len(self.tokens), int)
        for batch in batches:
            ids, rows = batch["input_ids"][0].numpy(), batch["logits_to_keep"].numpy()
            targets, starts = batch["target_ids"].numpy(), np.cumsum([0, *batch["doc_lengths"]])
            if not batch["num_tokens"]:
                assert not len(rows)
                continue
            places = np.array([self.place(ids[start:stop]) for start, stop in itertools.pairwise(starts)])
            document = np.searchsorted(starts, rows, side="right") - 1
            scored = places[document] + rows - starts[document] + 1
            assert (self.tokens[scored] == targets).all()
            np.add.at(counts, scored, 1)
        return counts


@functools.cache
def file_in(shared_data: Path) -> File:
    return File(shared_data)


WAYS: dict[str, dict[str, Any]] = {
    "documents": {"pretrain_packing": "documents"},
    "windows": {"pretrain_packing": "documents", "split_overlap": 128},
    "concat": {},
    "stream": {"pretrain_packing": "documents", "streaming": True},
    "stream, concat": {"streaming": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_token_of_the_file_is_learned_once_per_epoch(tmp_path, shared_data, way: str) -> None:
    file = file_in(shared_data)
    once = np.ones(len(file.tokens), int)
    once[0] = 0  # the BOS, which nothing stands before
    trainer = file.trainer(tmp_path, **WAYS[way])
    loader = trainer.get_train_dataloader()
    if "stream" in way:
        rows = -(-(len(file.tokens) - 1) // (LENGTH - 1))
        assert rows == 23 * 59  # whole micro-batches: the pass ends with one of them
        assert (file.count(itertools.islice(loader, 59)) == once).all()
        return
    report = trainer.train_dataset
    assert report.capacity == LENGTH
    loader.set_epoch(1)
    assert (file.count(loader) == once).all()
    ranks = [
        BinSampler(len(report), 5, accumulation=2, world=2, rank=rank, seed=3, lengths=report.fills)
        for rank in range(2)
    ]
    found = [file.count(trainer._bin_loader(report, evaluation=False, batch_sampler=rank)) for rank in ranks]
    assert (found[0] + found[1] == once).all() and min(each.sum() for each in found) > 0.4 * once.sum()


@pytest.mark.parametrize("packing", ["documents", "concat"])
def test_wedlm_counts_every_token_of_the_file_once(tmp_path, shared_data, packing: str) -> None:
    """N of both parts of the loss, which says how often a token is drawn to be masked and predicted."""
    file = file_in(shared_data)
    trainer = file.trainer(tmp_path, objective="wedlm", pretrain_packing=packing)
    items = sum(batch["num_items"] for batch in trainer.get_train_dataloader())
    assert items.tolist() == [len(file.tokens) - 1] * 2


def test_a_real_file_of_many_texts_joined(tmp_path, shared_data) -> None:
    """Speeches as texts of their own, with what the tokenizer puts around each."""
    file = copy.copy(file_in(shared_data))
    speeches = file.path.read_text(encoding="utf-8").split("\n\n")
    file.path = Path(runs.write_jsonl(tmp_path / "speeches.jsonl", [{"text": text} for text in speeches]))
    ids = file.tokenizer(speeches)["input_ids"]
    file.tokens = np.array([token for each in ids for token in [*each, file.tokenizer.eos_token_id]], np.int64)
    file.index()
    trainer = file.trainer(tmp_path)
    counts = file.count(trainer.get_train_dataloader())
    assert counts[0] == 0 and (counts[1:] == 1).all() and (file.tokens == 1).sum() == len(speeches)


# ---- through train.py ----


def pretraining(folder: Path, **changes: Any) -> dict[str, Any]:
    path = runs.write_jsonl(folder / "texts.jsonl", [{"text": text} for text in texts(60, longest=120)])
    own = {"train_file": path, "task_type": "pretrain", "pretrain_packing": "concat", "max_seq_length": 64}
    return runs.arguments(folder, **{**own, **changes})


LORA = {"train_mode": "lora", "lora_rank": 2, "dtype": "float32"}
WEDLM = {"objective": "wedlm", "mask_token": "<|mask|>", "block_size": 8}


@pytest.mark.parametrize("objective", [{}, WEDLM], ids=["causal", "wedlm"])
@pytest.mark.parametrize("mode", [{}, LORA, {**LORA, "train_mode": "qlora"}], ids=["full", "lora", "qlora"])
def test_every_mode_and_objective(tmp_path, objective: dict, mode: dict) -> None:
    if mode.get("train_mode") == "qlora":
        pytest.importorskip("bitsandbytes")
        tiny.save_tiny(tmp_path / "model-llama", hidden_size=64, intermediate_size=64)
    evaluation = runs.write_jsonl(tmp_path / "held-out.jsonl", [{"text": text} for text in texts(9, 5)])
    out = runs.train(pretraining(tmp_path, max_steps=4, eval_file=evaluation, **objective, **mode))
    losses = runs.history(out)
    assert len(losses) == 4 and all(np.isfinite(losses)) and losses[-1] < losses[0]
    report = json.loads((out / "data_report.json").read_text())
    assert report["train"]["longest"] == report["packing"]["train"]["capacity"] == 64
    assert report["packing"]["train"]["fill"] > 0.97 and report["train"]["records"] == 60
    results = json.loads((out / "eval_results.json").read_text())
    slots = len(stream_of(texts(9, 5))) - 1
    assert results["eval_supervised_tokens"] == report["eval"]["supervised_tokens"] == slots


def test_packing_off_has_the_same_rows(tmp_path) -> None:
    values = pretraining(tmp_path, max_steps=3, train_sampling_strategy="sequential")
    packed, padded = (
        runs.train({**values, "packing": packing, "output_dir": str(tmp_path / str(packing))})
        for packing in (True, False)
    )
    np.testing.assert_allclose(runs.history(packed), runs.history(padded), rtol=1e-5)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_goes_on_exactly(tmp_path, streaming: bool) -> None:
    values = pretraining(tmp_path, save_strategy="steps", save_steps=3, streaming=streaming)
    values |= {"shuffle_buffer": 10} if streaming else {}
    whole = runs.train({**values, "output_dir": str(tmp_path / "whole")})
    stopped = tmp_path / "stopped"
    shutil.copytree(whole / "checkpoint-3", stopped / "checkpoint-3")
    shutil.copy(whole / "args.json", stopped)
    again = {**values, "output_dir": str(stopped), "resume_from_checkpoint": "auto"}
    resumed = runs.train(again)
    for name, weight in runs.weights(whole).items():
        assert torch.equal(weight, runs.weights(resumed)[name]), name
    with pytest.raises(ValueError, match="pretrain_packing was 'concat' and is 'documents'"):
        runs.train({**again, "pretrain_packing": "documents"})


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_learn_what_one_does(tmp_path, streaming: bool) -> None:
    values = pretraining(tmp_path, learning_rate=1e-3, streaming=streaming)
    one = runs.train({**values, "output_dir": str(tmp_path / "one")})
    two = tmp_path / "two"
    process = runs.train_process({**values, "output_dir": str(two), "per_device_train_batch_size": 1}, processes=2)
    assert (two / "trainer_state.json").exists(), process.stderr
    np.testing.assert_allclose(runs.history(two), runs.history(one), rtol=1e-5)
    for name, weight in runs.weights(one).items():
        assert (runs.weights(two)[name] - weight).norm() <= 1e-5 * weight.norm(), name


def test_a_prepared_folder_knows_how_its_texts_are_cut(tmp_path) -> None:
    values = pretraining(tmp_path, max_steps=2)
    (tmp_path / "run.json").write_text(json.dumps({k: v for k, v in values.items() if k != "output_dir"}))
    folder = tmp_path / "tokens"
    assert main(["prepare", "--train_args_file", str(tmp_path / "run.json"), "--output_dir", str(folder)]) == 0
    direct = runs.train({**values, "output_dir": str(tmp_path / "direct")})
    taken = runs.train({**values, "train_file": str(folder), "output_dir": str(tmp_path / "taken")})
    for name, weight in runs.weights(direct).items():
        assert torch.equal(weight, runs.weights(taken)[name])
    for changes, message in (
        ({"pretrain_packing": "documents"}, "pretrain_packing is documents, and the data were prepared with concat"),
        ({"max_seq_length": 128}, "max_seq_length is 128, and the data were prepared with 64"),
    ):
        with pytest.raises(ValueError, match=message):
            runs.train({**values, **changes, "train_file": str(folder), "output_dir": str(tmp_path / "refused")})


def test_inspection_takes_joined_texts_for_one_document(tmp_path, capsys) -> None:
    values = pretraining(tmp_path)
    words = [word for key in ("train_file", "task_type", "pretrain_packing") for word in (f"--{key}", values[key])]
    assert main(["inspect", "--model", values["model_name_or_path"], *words, "--max_seq_length", "64"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 documents that are whole (100 %)" in printed and "ERROR" not in printed


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"split_overlap": 64}, r"split_overlap is 64: it lies between 1, .* \(63\)"),
        ({"split_overlap": 0}, "split_overlap is 0: it lies between 1"),
        ({"split_overlap": 8, "overlength": "drop"}, "overlength is drop, and split_overlap belongs to split"),
        ({"split_overlap": 8, "task_type": "sft"}, "overlength is drop, and split_overlap belongs to split"),
        ({"split_overlap": 8, "pretrain_packing": "concat"}, "rows that share one token; leave it out"),
        ({"pretrain_packing": "concat", "overlength": "drop"}, "none is too long; leave overlength out"),
        ({"pretrain_packing": "concat", "task_type": "sft"}, "joins texts of task_type pretrain, and task_type is sft"),
        ({"pretrain_packing": "concat", "lazy_preprocess": True}, "where a row begins depends on all texts before it"),
    ],
)
def test_settings_that_contradict(changes: dict, message: str) -> None:
    base = {"model_name_or_path": "m", "train_file": "d.txt", "output_dir": "o", "max_seq_length": 64}
    with pytest.raises(ValueError, match=message):
        parse_values({**base, "task_type": "pretrain", **changes})
    if "concat" in changes.values() and "split_overlap" not in changes:
        options = DataArguments(**{"max_seq_length": 64, "task_type": "pretrain", **changes})
        parts: dict[str, Any] = {
            "processing_class": tiny.tiny_tokenizer(),
            "data_args": options,
            "train_dataset": ["a"],
        }
        with pytest.raises(ValueError, match=message):
            SFTTrainer(tiny.tiny_model(), TrainingArguments(use_cpu=True), **parts)


def test_the_example_runs(tmp_path, shared_data) -> None:
    path = runs.ROOT / "train_args" / "stories260k-shakespeare-pretrain.json"
    values = {
        **json.loads(path.read_text()),
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
    }
    values |= {"model_name_or_path": str(shared_data / "models" / "stories260k"), "output_dir": str(tmp_path / "out")}
    out = runs.train({**values, "train_file": str(shared_data / "text" / "tinyshakespeare.txt")})
    assert runs.history(out)[-1] < runs.history(out)[0]
    report = json.loads((out / "data_report.json").read_text())["train"]
    assert report["cut_into_several"] == report["records"] == 1 and report["supervised_tokens"] == 693_364
