"""A run can be watched: its log as JSON lines, bars, memory and MFU, a profile; and a divergence names its rows."""

from __future__ import annotations

import io
import json
import math
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import runs
import tiny
import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_sft import tasks
from hf_sft.arguments import DataArguments, MonitoringArguments
from hf_sft.data.live import StreamBins
from hf_sft.reports import read_run
from hf_sft.reports.findings import find_problems
from hf_sft.training import divergence, monitoring, profiling
from hf_sft.training.divergence import DivergenceWatch, RowTeller, Suspect, document_losses, jumped
from hf_sft.training.monitoring import EvaluateWithinEpochs, JSONLog, LinePrinter, ProgressBars, drop_later_lines
from hf_sft.training.profiling import Meter, flops_per_token, peak_flops
from hf_sft.training.trainer import SFTTrainer
from hf_sft.training_arguments import TrainingArguments

BAD = 200  # a token that no row holds but those that a test spoils


def token_rows(count: int, spoilt: tuple[int, ...] = ()) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(count)
    rows = []
    for number in range(count):
        ids = rng.integers(0, BAD, rng.integers(8, 30)).tolist()
        ids[3] = BAD if number in spoilt else ids[3]
        rows.append({"input_ids": ids, "labels": list(ids)})
    return rows


def trainer_of(
    folder: Path, rows: Any = 24, *, stop: bool = False, profile: str | None = None, **options: Any
) -> SFTTrainer:
    own = ("data_args", "callbacks", "processing_class", "eval_dataset", "data_collator", "peft_config")
    given = {name: options.pop(name) for name in own if name in options}
    given = {"data_args": DataArguments(max_seq_length=64), "processing_class": tiny.tiny_tokenizer(), **given}
    defaults = dict(
        output_dir=str(folder), max_steps=6, learning_rate=1e-2, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=5, lr_scheduler_type="constant",
    )  # fmt: skip
    return SFTTrainer(
        tiny.tiny_model(),
        TrainingArguments(**{**defaults, **options}),
        train_dataset=token_rows(rows) if isinstance(rows, int) else rows,
        monitoring_args=MonitoringArguments(stop_on_divergence=stop, profile_steps=profile),
        **given,
    )


def spoil(trainer: SFTTrainer) -> SFTTrainer:
    """Documents that hold ``BAD`` have no finite loss."""
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[BAD] = math.inf
    return trainer


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def named(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"row (\d+)", text)]


# ---- divergence ----


@pytest.mark.parametrize("how", ["packed", "padded", "collator"])
def test_the_row_without_a_finite_loss_is_named(tmp_path, how: str) -> None:
    options: dict[str, Any] = {
        "packed": {"rows": token_rows(24, spoilt=(7,))},
        "padded": {
            "data_args": DataArguments(max_seq_length=64, packing=False), "rows": token_rows(24, (7,)),
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "logging_steps": 6,
        },
        "collator": {"rows": token_rows(24, (7,))},
    }[how]  # fmt: skip
    if how == "collator":
        from transformers import DataCollatorForSeq2Seq

        options["data_collator"] = DataCollatorForSeq2Seq(tiny.tiny_tokenizer())
    trainer = spoil(trainer_of(tmp_path, stop=True, save_strategy="steps", save_steps=6, **options))
    with pytest.raises(ValueError, match="training has diverged: loss is nan in the log of step") as error:
        trainer.train()
    text, row = str(error.value), options["rows"][7]
    assert named(text) == [7] and re.search(r"Without a finite loss are 1 of \d+ documents of step \d:", text)
    excerpt = " ".join(tiny.tiny_tokenizer().decode(row["input_ids"]).split())[:80]
    assert f": {excerpt!r}" in text and "Lower learning_rate" in text
    assert not list(tmp_path.glob("checkpoint*"))
    last, end = lines_of(tmp_path)[-2:]  # the line itself is written, and what ended the run
    assert last["loss"] == "NaN" and f"log of step {last['step']}" in text
    assert end["error"] == text
    run = read_run(tmp_path)
    assert run.outcome == "diverged" and any(text in notice.text for notice in find_problems(run))


def test_without_a_stop_it_is_a_warning_now_and_then(tmp_path, caplog) -> None:
    spoil(trainer_of(tmp_path, token_rows(24, (7,)), max_steps=22)).train()
    told = [record.getMessage() for record in caplog.records if "training diverges" in record.getMessage()]
    assert len(told) in (2, 3) and named(told[0]) == [7]
    assert "None of the" in told[1]  # by then the weights are broken too


class Break(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            kwargs["model"].get_parameter("model.norm.weight").data.fill_(math.nan)


def test_broken_weights_are_told_from_a_bad_row(tmp_path) -> None:
    trainer = trainer_of(
        tmp_path,
        stop=True,
        callbacks=[Break()],
        logging_steps=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        data_args=DataArguments(max_seq_length=64, packing=False),
    )
    losses: dict[int, dict[int, float]] = {}
    add = trainer.watch.add

    def listen(step: int, origins: Any, values: torch.Tensor) -> None:
        losses.setdefault(step, {}).update({o[0]: v for o, v in zip(origins, values.tolist(), strict=False)})
        add(step, origins, values)

    trainer.watch.add = listen  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="documents of step 3 has a finite loss: the weights broke in step 2") as error:
        trainer.train()
    worst = sorted(losses[2], key=losses[2].__getitem__, reverse=True)[:5]
    assert named(str(error.value)) == worst


def test_a_jump_names_the_rows_with_the_highest_loss(tmp_path) -> None:
    trainer = trainer_of(tmp_path, stop=True, learning_rate=1e3, max_grad_norm=0)
    with pytest.raises(
        ValueError, match=r"loss is \S+, and the median of the lines before is 5\.\d+, in the log"
    ) as error:
        trainer.train()
    assert len(named(str(error.value))) == 5 and "highest loss since step" in str(error.value)


@pytest.mark.parametrize(
    "loss, earlier, found",
    [
        (10.0, [3.0, 3.0, 9.0], 3.0),
        (10.0, [3.0, 3.0, 11.0], None),  # not above all of them
        (8.9, [3.0, 3.0, 3.0], None),  # not three times
        (0.9, [0.1, 0.1, 0.1], None),  # less than 1 above
        (1.2, [0.1, 0.1, 0.1], 0.1),
        (1.2, [-0.4, -0.5, 0.1], -0.4),  # losses of pairs may be negative
        (50.0, [], None),
    ],
)
def test_what_a_jump_is(loss: float, earlier: list[float], found: float | None) -> None:
    assert jumped(loss, earlier) == found


def teller(**how: Any) -> RowTeller:
    return RowTeller(None, [], None, **how)


def line(step: int, loss: float, **more: float) -> dict[str, float]:
    return {"step": step, "loss": loss, **more}


def test_the_history_is_that_of_a_resumed_run_too() -> None:
    watch = DivergenceWatch(stop=True)
    before = [line(step, 2.0) for step in range(1, 9)] + [{"step": 8, "eval_loss": 99.0}]
    watch.look([*before, line(9, 5.0)], teller())
    with pytest.raises(ValueError, match="median of the lines before is 2,"):
        watch.look([*before, line(9, 7.0)], teller())
    first = [line(step, 100.0) for step in range(1, 6)]
    watch.look([*first, line(6, 2.0), line(7, 50.0)], teller())
    with pytest.raises(ValueError, match="loss is 50"):  # 20 lines later those count no longer
        watch.look([*first, *(line(step, 2.0) for step in range(6, 26)), line(26, 50.0)], teller())


def test_a_norm_that_is_not_finite_is_a_step_left_out_under_fp16() -> None:
    watch = DivergenceWatch(stop=True)
    for step, losses in ((1, [9.0, 1.0]), (2, [1.0, 3.0])):
        watch.add(step, [(2 * step, -1, -1), (2 * step + 1, -1, -1)], torch.tensor(losses))
    history = [line(2, 1.0, grad_norm=math.inf)]
    watch.look(history, teller(), scaled=True)
    with pytest.raises(ValueError, match="grad_norm is inf") as error:
        watch.look(history, teller())
    assert named(str(error.value)) == [5, 4]  # of that step


def test_what_was_learned_from_since_the_last_line_and_the_step_before_it() -> None:
    def watched(steps: dict[int, list[float]], *lines: dict[str, float]) -> list[int]:
        watch = DivergenceWatch(stop=True)
        for step, losses in steps.items():
            for part in (0, 1):  # two micro-batches
                watch.add(step, [(10 * step + part, -1, -1)], torch.tensor(losses[part : part + 1]))
            for number, each in enumerate(lines):
                if each["step"] == step and number < len(lines) - 1:
                    watch.look(lines[: number + 1], teller())
        with pytest.raises(ValueError, match="diverged") as error:
            watch.look(lines, teller())
        return named(str(error.value))

    steps = {1: [90.0, 91.0], 2: [80.0, 81.0], 3: [7.0, 9.0], 4: [8.0, 6.0]}
    assert watched(steps, line(2, 2.0), line(4, 8.0)) == [31, 40, 30, 41]  # a jump
    steps |= {3: [math.nan, math.nan]}
    assert watched(steps, line(2, 2.0), line(4, math.nan)) == [21, 20]  # weights that the step of the last line broke
    assert watched({2: [math.nan, 1.0], 3: [math.nan, math.nan]}, line(3, math.nan)) == [20]


def test_single_losses_are_means_over_scored_rows() -> None:
    nll = torch.tensor([1.0, 3.0, math.nan, 5.0])
    found = document_losses(nll, torch.tensor([0, 0, 2, 3]), 4)
    assert found[0] == 2 and found[1] == -math.inf and math.isnan(found[2]) and found[3] == 5


def test_processes_put_together_what_they_know(monkeypatch) -> None:
    """Two threads stand for two processes: the first step without a finite loss is rank 1's."""
    barrier, box = threading.Barrier(2, timeout=20), {}
    rank = threading.local()

    def gathered(value: Any) -> list[Any]:
        box[rank.number] = value
        barrier.wait()
        values = [box[0], box[1]]
        barrier.wait()
        return values

    monkeypatch.setattr(divergence, "gathered", gathered)
    said: dict[int, str] = {}

    def work(number: int) -> None:
        rank.number = number
        watch = DivergenceWatch(stop=True)
        for step in (1, 2, 3):
            losses = [math.nan if number == 1 and step == 2 else 1.0, math.nan if step == 3 else 1.0]
            watch.add(step, [(100 * number + step, -1, -1), (100 * number + 10 * step, -1, -1)], torch.tensor(losses))
        try:
            watch.look([line(3, math.nan)], teller())
        except ValueError as error:
            said[number] = str(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert said[0] == said[1] and "finite loss are 1 of 4 documents of step 2:" in said[0] and named(said[0]) == [102]


@pytest.mark.parametrize("how", ["prepared", "lazy", "streaming"])
def test_train_py_names_file_and_record(tmp_path, how: str) -> None:
    records = tiny.conversations(20, seed=4)
    tilde = tiny.tiny_tokenizer()("~").input_ids[0]
    records[6][0]["content"] += "~"
    data = runs.write_jsonl(tmp_path / "some.jsonl", records)
    more = {"prepared": {}, "lazy": {"lazy_preprocess": True}, "streaming": {"streaming": True}}[how]
    values = runs.arguments(tmp_path, train_file=data, stop_on_divergence=True, per_device_train_batch_size=4, **more)
    build = tasks.build_trainer

    def spoilt(*parts: Any) -> Any:
        trainer = build(*parts)
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight[tilde] = math.inf
        return trainer

    with (
        mock.patch.object(tasks, "build_trainer", side_effect=spoilt),
        pytest.raises(ValueError, match="diverged") as error,
    ):
        runs.train(values)
    text = str(error.value)
    assert f"(record 7 of {data})" in text and text.count("record ") == 1
    if how != "streaming":
        assert f"row 6 (record 7 of {data})" in text and " ".join(records[6][1]["content"].split())[:10] in text
    else:
        assert re.search(r"document \d+ of the stream \(record 7", text)


def test_pairs_are_named_too(tmp_path) -> None:
    from hf_sft.training.dpo import DPOTrainer

    sides = token_rows(16, spoilt=(5,))  # pair 2, its rejected side
    pairs = [
        {"prompt_ids": [1, 2], "chosen_ids": a["input_ids"], "rejected_ids": b["input_ids"]}
        for a, b in zip(sides[::2], sides[1::2], strict=True)
    ]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=1, use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    from hf_sft.arguments import DPOArguments

    trainer = DPOTrainer(
        tiny.tiny_model(), args, train_dataset=pairs, dpo_args=DPOArguments(dpo_loss_type="orpo"),
        data_args=DataArguments(task_type="dpo", max_seq_length=128), processing_class=tiny.tiny_tokenizer(),
        monitoring_args=MonitoringArguments(stop_on_divergence=True),
    )  # fmt: skip
    with pytest.raises(ValueError, match="finite loss are 1 of") as error:
        spoil(trainer).train()
    assert named(str(error.value)) == [2] and "pairs of step" in str(error.value)


def test_what_is_known_of_a_row_is_said() -> None:
    def place(dataset: Any, origin: tuple[int, int, int], names: list[str]) -> str:
        return RowTeller(dataset, names, None).tell([Suspect(1, 0, 2.0, origin)]).split(", loss")[0].strip()

    assert place(None, (-1, -1, -1), []) == "a row whose number is not known"
    assert place(None, (4, 1, 9), ["a", "b"]) == "row 4 (record 9 of b)"
    assert place(None, (4, 0, 9), []) == "row 4 (example 9)"
    assert place(object.__new__(StreamBins), (4, -1, -1), []) == "document 4 of the stream"
    assert RowTeller(None, [], None).tell([Suspect(1, 0, 2.0, (1, -1, -1))], 4).endswith("and 3 more")


# ---- log.jsonl ----


def steady(folder: Path) -> list[dict[str, Any]]:
    """Lines without what differs between two equal runs."""
    drop = ("time", "memory_gib", "tokens_per_second")
    return [
        {k: v for k, v in each.items() if k not in drop and "runtime" not in k and "_per_second" not in k}
        for each in lines_of(folder)
    ]


def test_lines_are_those_of_the_history_also_after_a_resume(tmp_path) -> None:
    options = dict(save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3)
    whole = trainer_of(tmp_path / "whole", eval_dataset=token_rows(3), **options)
    whole.train()
    lines = lines_of(tmp_path / "whole")
    assert [{k: v for k, v in each.items() if k != "time"} for each in lines] == whole.state.log_history
    assert [list(each)[:3] for each in lines] == [["time", "step", "epoch"]] * len(lines)
    assert lines[0]["time"] < lines[-1]["time"] and "mfu" not in lines[0] and 0.05 < lines[0]["memory_gib"] < 16

    again = tmp_path / "again"
    first = trainer_of(again, eval_dataset=token_rows(3), **{**options, "max_steps": 5})
    first.train()  # its last evaluation is at step 5, and its last line is behind the last checkpoint
    (again / "log.jsonl").open("a").write('{"time": 1, "step": 4, "lo')
    trainer_of(again, eval_dataset=token_rows(3), **options).train(str(again / "checkpoint-3"))
    assert steady(again) == steady(tmp_path / "whole")


def test_an_earlier_runs_lines_are_kept_aside(tmp_path) -> None:
    for step in range(3):
        log, args = JSONLog(), SimpleNamespace(output_dir=str(tmp_path))
        state = SimpleNamespace(is_world_process_zero=True, global_step=0, log_history=[])
        log.on_train_begin(args, state, None)
        log.on_log(args, SimpleNamespace(global_step=step, log_history=[]), None, {"loss": 1.0})
    assert sorted(path.name for path in tmp_path.glob("log*")) == ["log.1.jsonl", "log.2.jsonl", "log.jsonl"]
    assert [json.loads((tmp_path / f"log{part}.jsonl").read_text())["step"] for part in (".1", ".2", "")] == [0, 1, 2]


def test_lines_behind_a_step_are_dropped(tmp_path) -> None:
    file = tmp_path / "predictions.jsonl"
    drop_later_lines(file, 3)
    assert not file.exists()
    good = ['{"step": 1, "a": "\u2028"}', '{"step": 3, "a": 1}', '{"step": 3, "a": 2}']
    file.write_text("\n".join([*good, '{"step": 4}', "[]", '{"step": "2"}', '{"step": 3, "a"']), encoding="utf-8")
    drop_later_lines(file, 3)
    assert file.read_text(encoding="utf-8") == "\n".join(good) + "\n"
    before = file.stat().st_mtime_ns
    drop_later_lines(file, 3, known=2)
    assert file.stat().st_mtime_ns == before
    drop_later_lines(file, 3, known=1)
    assert file.read_text(encoding="utf-8").splitlines()[-1] == good[1] and list(tmp_path.iterdir()) == [file]


def test_numbers_that_json_has_not_are_strings(tmp_path) -> None:
    log = JSONLog()
    args, state = (
        SimpleNamespace(output_dir=str(tmp_path)),
        SimpleNamespace(is_world_process_zero=True, global_step=0, log_history=[]),
    )
    log.on_log(args, state, None, {"loss": 1.0})  # an evaluation before the training: nothing is written
    log.on_train_begin(args, state, None)
    values = {
        "a": math.nan,
        "b": math.inf,
        "c": np.float32(-math.inf),
        "d": np.int64(3),
        "e": "é",
        "f": torch.tensor(2),
    }
    log.on_log(args, state, None, values)
    (text,) = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found = json.loads(text, parse_constant=pytest.fail)
    assert {**found, "time": 0} == {
        "time": 0, "step": 0, "epoch": None, "a": "NaN", "b": "inf", "c": "-inf", "d": 3, "e": "é", "f": 2,
    }  # fmt: skip
    other = JSONLog()
    other.on_train_begin(args, SimpleNamespace(is_world_process_zero=False), None)
    other.on_log(args, state, None, values)
    assert len(lines_of(tmp_path)) == 1


# ---- the terminal ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_and_bars(tmp_path, capsys, monkeypatch) -> None:
    trainer_of(tmp_path / "a", max_steps=3).train()
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"step=1/3 loss=5\.\d+ grad_norm=\S+ learning_rate=0\.01 .* epoch=\S+ left=\d:\d\d:\d\d", printed[0]
    )
    assert len(printed) == 4 and "total_flos" not in printed[-1] and all(len(each) < 220 for each in printed)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    options = {"disable_tqdm": False, "eval_dataset": token_rows(3), "eval_strategy": "steps", "eval_steps": 2}
    trainer_of(tmp_path / "b", max_steps=3, **options).train()
    assert len(capsys.readouterr().out.splitlines()) == 6  # two evaluations more
    shown = terminal.getvalue()
    assert re.search(r"training: .*1/3 \[.*loss 5\.\d+, [\d,]+ tokens/s", shown) and "evaluation: 100%" in shown
    monkeypatch.setattr("sys.stderr", io.StringIO())
    trainer_of(tmp_path / "c", max_steps=1, disable_tqdm=False).train()
    assert "step=1/1" in capsys.readouterr().out  # into a file: lines without bars


def test_a_resumed_bar_begins_where_the_run_does(monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    bars, args = ProgressBars(), SimpleNamespace(disable_tqdm=False, process_index=0)
    state = SimpleNamespace(is_world_process_zero=True, global_step=5, max_steps=10)
    bars.on_train_begin(args, state, None)
    bar = bars.training_bar
    assert bar is not None and (bar.n, bar.initial, bar.total) == (5, 5, 10)  # the pace is that of the steps since
    state.global_step = 6
    bars.on_step_end(args, state, None)
    assert bar.n == 6
    bars.on_train_end(args, state, None)


def test_a_users_callbacks_stay_theirs(tmp_path) -> None:
    class Own(ProgressCallback):
        pass

    trainer = trainer_of(tmp_path, callbacks=[Own()])
    kinds = [type(each) for each in trainer.callback_handler.callbacks]
    assert Own in kinds and LinePrinter in kinds and PrinterCallback not in kinds
    trainer.remove_callback(PrinterCallback)  # by the name that transformers knows
    assert LinePrinter not in [type(each) for each in trainer.callback_handler.callbacks]
    bars = [type(each) for each in trainer_of(tmp_path, disable_tqdm=False).callback_handler.callbacks]
    assert ProgressBars in bars and ProgressCallback not in bars


def test_few_digits() -> None:
    state = SimpleNamespace(global_step=3, max_steps=9)
    logs = {"loss": 1.23456789, "tokens_per_second": 123456.7, "lr": 1e-5, "n": 12, "total_flos": 1e18, "x": "y" * 200}
    text = monitoring.log_line(logs, state, 3723.4)
    assert text == f"step=3/9 loss=1.235 tokens_per_second=123457 lr=1e-05 n=12 x={'y' * 100}... left=1:02:03"


def test_only_the_main_process_speaks(capsys) -> None:
    state = SimpleNamespace(is_world_process_zero=False, global_step=1, max_steps=2)
    LinePrinter().on_log(None, state, None, {"loss": 1.0})
    bars = ProgressBars()
    bars.on_train_begin(None, state, None)
    bars.on_log(None, state, None, {"loss": 1.0})
    bars.on_train_end(None, state, None)
    assert capsys.readouterr() == ("", "")


# ---- memory, MFU, profile ----


@pytest.mark.parametrize(
    "name, dtype, tera",
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100 80GB PCIe", torch.float16, 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.5),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.5),
        ("NVIDIA H200", torch.bfloat16, 989.5),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA L40", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
        ("Tesla V100-SXM2-32GB", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.float32, None),
        ("Tesla T4", torch.float16, None),
    ],
)
def test_peaks_are_dense_and_of_a_type(name: str, dtype: torch.dtype, tera: float | None) -> None:
    assert peak_flops(name, dtype) == (None if tera is None else tera * 1e12)


def test_flops_of_frozen_weights_have_no_weight_gradient() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny.tiny_model()
    counted = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    assert flops_per_token(model) == 6 * counted
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    new = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert new and flops_per_token(adapter) == 4 * counted + 6 * new


def test_mfu_is_model_flops_over_the_peak_of_all_processes(tmp_path, monkeypatch) -> None:
    meter = Meter(torch.device("cpu"), 1e9, processes=2)
    meter.begin(5e9)
    assert meter.read(7e9, 4.0)["mfu"] == 0.25 and meter.read(8e9, 1.0)["mfu"] == 0.5
    asked: list[Any] = []
    monkeypatch.setattr(profiling, "device_peak", lambda *what: asked.append(what) or 1e12)
    trainer = trainer_of(tmp_path, logging_steps=2, bf16=True)
    trainer.train()
    assert asked == [(torch.device("cpu"), torch.bfloat16)]
    lines = [each for each in lines_of(tmp_path) if "loss" in each]
    per_token = flops_per_token(trainer.model)
    for each in lines:
        assert each["mfu"] == pytest.approx(per_token * each["tokens_per_second"] / 1e12, rel=1e-9)
    assert len(lines) == 3 and trainer.state.total_flos > 0
    mixture = tiny.tiny_model("qwen3_moe")
    assert Meter.of(trainer.args, mixture).peak is None and len(asked) == 1


def test_steps_are_profiled(tmp_path, caplog) -> None:
    trainer_of(tmp_path, max_steps=4, profile="2:3").train()
    (trace, table) = sorted((tmp_path / "profile").iterdir())
    assert (trace.name, table.name) == ("rank0-steps-2-3.json", "rank0-steps-2-3.txt")
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [each for each in events if each.get("name", "").startswith("Optimizer.step") and each.get("ph") == "X"]
    assert len(steps) == 2 and any("Input Dims" in each.get("args", {}) for each in events)
    assert 10 < len(re.findall(r"^ *aten::", table.read_text(), re.MULTILINE)) <= 30
    assert not caplog.records


@pytest.mark.parametrize(
    "steps, step, told, files",
    [
        ("7:8", 0, "nothing is recorded", []),
        ("2:8", 0, "2 to 3 are recorded", ["rank0-steps-2-3.json.gz", "rank0-steps-2-3.txt"]),
        ("1:2", 2, "nothing is recorded", []),
    ],
)
def test_steps_that_are_not_taken_cannot_be_profiled(tmp_path, caplog, monkeypatch, steps, step, told, files) -> None:
    monkeypatch.setattr(profiling, "_LARGE", 10)
    callback = profiling.ProfileSteps(*map(int, steps.split(":")))
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=0)
    state = SimpleNamespace(global_step=step, max_steps=3, is_world_process_zero=True)
    callback.on_train_begin(args, state, None)
    assert told in caplog.records[-1].getMessage() and f"the steps {step + 1} to 3" in caplog.records[-1].getMessage()
    while state.global_step < 3:
        callback.on_step_begin(args, state, None)
        state.global_step += 1
        callback.on_step_end(args, state, None)
    callback.on_train_end(args, state, None)
    assert sorted(path.name for path in tmp_path.glob("profile/*")) == files


def test_profile_steps_are_checked_in_python_too(tmp_path) -> None:
    with pytest.raises(ValueError, match="profile_steps is '3'"):
        trainer_of(tmp_path, profile="3")


# ---- evaluations within an epoch ----


def evaluated(
    times: int, steps_in_epoch: int, last: int, first: int = 0, before: float = 0.0, delay: float = 0
) -> list[int]:
    """The steps after which a run of ``last`` steps evaluates, those at the end of an epoch left out."""
    callback = EvaluateWithinEpochs(times)
    state, args = SimpleNamespace(global_step=first, epoch=before, max_steps=last), SimpleNamespace(eval_delay=delay)
    found = []
    while state.global_step < last:
        control = SimpleNamespace(should_evaluate=False, should_training_stop=False)
        callback.on_step_begin(args, state, control)
        state.global_step += 1
        epoch, step = divmod(state.global_step - 1, steps_in_epoch)
        state.epoch = epoch + (step + 1) / steps_in_epoch
        callback.on_step_end(args, state, control)
        found += [state.global_step] if control.should_evaluate else []
    return found


@pytest.mark.parametrize(
    "times, in_epoch, last, steps",
    [
        (1, 6, 12, []),
        (2, 6, 12, [3, 9]),
        (4, 6, 12, [2, 3, 5, 8, 9, 11]),
        (20, 3, 6, [1, 2, 4, 5]),
        (10, 100, 110, [10, 20, 30, 40, 50, 60, 70, 80, 90]),  # the last step is evaluated at its end
        (3, 7, 10, [3, 5]),
    ],
)
def test_parts_of_an_epoch(times: int, in_epoch: int, last: int, steps: list[int]) -> None:
    assert evaluated(times, in_epoch, last) == steps
    for first in range(last):  # right after a resume
        before = first / in_epoch
        assert evaluated(times, in_epoch, last, first, before) == [step for step in steps if step > first]
    assert evaluated(times, in_epoch, last, delay=1.0) == [step for step in steps if step > in_epoch]


def test_evaluations_within_epochs(tmp_path) -> None:
    how = {
        "max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "eval_dataset": token_rows(2),
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 5,
        "data_args": DataArguments(max_seq_length=64, packing=False),
    }  # fmt: skip
    for checkpoint in (None, str(tmp_path / "checkpoint-5")):
        trainer = trainer_of(tmp_path, **how, callbacks=[EvaluateWithinEpochs(4)])
        trainer.train(checkpoint)
        steps = [line["step"] for line in trainer.state.log_history if "eval_loss" in line]
        assert steps == [2, 3, 5, 6, 8, 9, 11, 12]
