"""Answers to evaluation prompts while a model trains: what they change (nothing), when they come, and what they are kept in."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import tiny
import torch
from transformers import AutoModelForCausalLM

from hf_sft import EvaluationArguments, SFTTrainer
from hf_sft.evaluation import prompts_of
from hf_sft.parsing import ArgumentsError, parse_values
from hf_sft.training.early_stopping import EarlyStopping

ANSWERS = {
    "generation_eval_samples": 3, "generation_batch_size": 2, "generation_max_new_tokens": 6,
    "generation_metrics": ["exact_match", "edit_distance"], "eval_strategy": "steps",
}  # fmt: skip


def arguments(folder: Path, **changes):
    return runs.arguments(folder, eval_file=str(folder / "eval.jsonl"), **{**ANSWERS, **changes})


def plain(line):
    return {k: v for k, v in line.items() if not k.endswith(("runtime", "per_second", "memory_gib"))}


def records(out: Path):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def of_answers(history):
    return {line["step"]: line["eval_edit_chars"] for line in history if "eval_edit_chars" in line}


def test_prompts_are_everything_up_to_the_last_answer() -> None:
    tokenizer = tiny.tiny_tokenizer()
    text = [tokenizer("ab")["input_ids"], tokenizer("cd")["input_ids"]]
    ids = [*text[0], *text[1], 256, *text[0], *text[1], 256, 257]
    labels = [-100, -100, *text[1], 256, -100, -100, *text[1], 256, -100]
    nothing = {"input_ids": text[0], "labels": [-100, -100]}
    whole = {"input_ids": text[0], "labels": text[0]}
    pair = {
        "input_ids": [*text[0], *text[1], *text[0]],
        "labels": [-100, -100, *text[1], -100, 98],
        "rejected_start": 4,
    }
    found = prompts_of([nothing, {"input_ids": ids, "labels": labels}, whole, pair], tokenizer)
    assert [(each.row, each.ids, each.reference) for each in found] == [(1, ids[:7], "cd"), (3, text[0], "cd")]
    assert [each.row for each in prompts_of([nothing, pair, pair], tokenizer, 1)] == [1]


@pytest.mark.parametrize("objective", ["causal", "wedlm"])
def test_answers_change_nothing_of_the_training(tmp_path, objective) -> None:
    """Weights, losses, dropout's random numbers: as without them; and the answers are those of the model at that step."""
    changes = {
        "train_mode": "lora",
        "lora_rank": 4,
        "lora_dropout": 0.2,
        "dtype": "float32",
        "max_steps": 4,
        "eval_steps": 4,
    }
    changes |= {"objective": objective, "activation_checkpointing": True, "eval_strategy": "no"}
    if objective == "wedlm":
        changes |= {"mask_token": "<|mask|>"}
    without = {key: value for key, value in arguments(tmp_path, **changes).items() if not key.startswith("generation")}
    quiet, _ = runs.train_in_memory({**without, "output_dir": str(tmp_path / "quiet")})
    loud, trainer = runs.train_in_memory(arguments(tmp_path, generation_eval_steps=2, **changes))
    assert all(torch.equal(value, runs.weights(loud)[name]) for name, value in runs.weights(quiet).items())
    assert runs.history(loud) == runs.history(quiet) and runs.history(loud, "grad_norm") == runs.history(
        quiet, "grad_norm"
    )
    assert sorted(of_answers(trainer.state.log_history)) == [2, 4]
    assert [record["step"] for record in records(loud)] == [2, 2, 2, 4, 4, 4]
    assert trainer.model.training is False or trainer.model.config.use_cache is False
    again = trainer.evaluate()
    assert again["eval_edit_chars"] == of_answers(trainer.state.log_history)[4]


def test_generation_metric_chooses_the_best(tmp_path) -> None:
    changes = dict(max_steps=6, eval_steps=2, save_strategy="steps", save_steps=2, generation_eval_steps=3)
    changes |= dict(metric_for_best_model="edit_chars", load_best_model_at_end=True, learning_rate=5e-2)
    out, trainer = runs.train_in_memory(arguments(tmp_path, **changes))
    values = of_answers(trainer.state.log_history)
    assert sorted(values) == [2, 3, 4, 6]  # every evaluation, and every third step
    best = min((value, step) for step, value in values.items() if step != 3)[1]
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    saved = AutoModelForCausalLM.from_pretrained(out).state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(out / f"checkpoint-{best}").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in saved.items())
    assert json.loads((out / "eval_results.json").read_text())["eval_edit_chars"] == values[best]


def test_resumed_answers_are_the_undisturbed_ones(tmp_path) -> None:
    changes = dict(max_steps=6, eval_steps=3, save_strategy="steps", save_steps=3, generation_eval_steps=2)
    out, trainer = runs.train_in_memory(arguments(tmp_path, **changes))
    lines, wanted = records(out), [plain(line) for line in trainer.state.log_history]
    (out / "checkpoint-6").rename(tmp_path / "gone")
    (out / "model.safetensors").unlink()
    _, again = runs.train_in_memory(arguments(tmp_path, resume_from_checkpoint="auto", **changes))
    assert [plain(line) for line in again.state.log_history if "train_loss" not in line] == [
        line for line in wanted if "train_loss" not in line
    ]
    assert records(out) == lines and [line["step"] for line in lines] == [2] * 3 + [4] * 3 + [6] * 3


def test_a_run_that_was_stopped_before_its_answers(tmp_path) -> None:
    """SIGTERM leaves no time for them: they are made when the run goes on."""
    changes = dict(max_steps=4, eval_strategy="no", save_strategy="steps", save_steps=2, generation_eval_steps=2)
    out, trainer = runs.train_in_memory(arguments(tmp_path, **changes))
    wanted = of_answers(trainer.state.log_history)
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    kept = [line for line in state["log_history"] if "eval_edit_chars" not in line]
    assert len(kept) == len(state["log_history"]) - 1
    trainer.state.log_history, trainer.state.global_step, trainer._known.step = kept, 2, -1
    trainer._answer_late()
    assert sorted(of_answers(trainer.state.log_history)) == [2] and sorted(wanted) == [2, 4]


def test_a_limit_of_time(tmp_path, caplog) -> None:
    _, trainer = runs.train_in_memory(
        arguments(
            tmp_path,
            max_steps=1,
            eval_strategy="no",
            generation_eval_steps=1,
            generation_batch_size=1,
            max_generation_seconds=1e-9,
        )
    )
    assert trainer.predictions == []
    trainer.evaluation_args.max_generation_seconds = 1e9
    assert "eval_stopped" in trainer.evaluate() and len(trainer.predictions) == 3


# ---- does the model stop? ----


def test_a_model_that_never_stops_is_told_of(tmp_path, caplog, monkeypatch) -> None:
    values = runs.arguments(tmp_path, max_steps=1, generation_max_new_tokens=6)
    out, trainer = runs.train_in_memory(values)
    assert not (out / "stop_check.json").exists()  # tests ask for none
    monkeypatch.setattr(logging.getLogger("hf_sft"), "propagate", True)
    with caplog.at_level("WARNING"):
        result = trainer.check_stopping(2)
    assert "the model does not stop" in caplog.text
    assert (result["checked"], result["stopped"], result["max_new_tokens"]) == (2, 0, 6)
    assert json.loads((out / "stop_check.json").read_text()) == result
    head = trainer.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[256] = 1e4  # the end of turn
    assert trainer.check_stopping(3)["stopped"] == 3


# ---- early stopping, evaluations within an epoch ----


def history(*values, name="eval_loss"):
    return [{"step": 10 * (number + 1), name: value, "eval_runtime": 1.0} for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "threshold", "ends"),
    [
        ([3, 2, 2, 2], 0, True),
        ([3, 2, 2, 1], 0, False),
        ([3, 2.5, 2.2, 2.1], 0.45, True),
        ([3, 2.5, 2.0, 2.1], 0.45, False),
        ([float("nan"), float("nan")], 0, True),
        ([float("nan"), 3, 2], 0, False),
        ([3, 2], 0, False),
    ],
)
def test_early_stopping_looks_at_the_log_alone(values, threshold, ends) -> None:
    args = SimpleNamespace(metric_for_best_model=None, greater_is_better=None)
    control = SimpleNamespace(should_training_stop=False)
    alone = [{"step": step, "eval_loss": 9.0} for step in (5, 15, 45)]  # no evaluations
    state = SimpleNamespace(log_history=[*alone, *history(*values), *alone, {"step": 50, "loss": 1.0}])
    EarlyStopping(2, threshold).on_evaluate(args, state, control)
    assert control.should_training_stop is ends
    args.metric_for_best_model, args.greater_is_better = "eval_token_accuracy", None
    state.log_history = history(*[-value for value in values], name="eval_token_accuracy")
    control.should_training_stop = False
    EarlyStopping(2, threshold).on_train_begin(args, state, control)
    assert control.should_training_stop is ends


def test_a_run_that_has_ended_early_does_not_begin_again(tmp_path) -> None:
    changes = dict(
        max_steps=8, eval_steps=1, learning_rate=0.0, early_stopping_patience=2, save_strategy="steps", save_steps=1
    )
    values = {key: value for key, value in arguments(tmp_path, **changes).items() if not key.startswith("generation")}
    out, trainer = runs.train_in_memory(values)
    assert trainer.state.global_step == 3
    _, again = runs.train_in_memory({**values, "resume_from_checkpoint": "auto"})
    assert again.state.global_step == 3 and not (out / "checkpoint-4").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation_eval_steps": -1}, "generation_eval_steps is -1"),
        ({"generation_eval_steps": 5, "task_type": "pretrain"}, "raw texts have no prompts"),
        ({"generation_eval_steps": 5, "eval_file": None}, "eval_file is not set"),
        ({"generation_metrics": ["bleu"]}, "generation_eval_steps is not: say after how many steps"),
        ({"generation_eval_steps": 5, "generation_metrics": ["blue"]}, "generation_metrics has blue; choose from bleu"),
        ({"metric_for_best_model": "bleu"}, "measured on answers: set generation_eval_steps"),
        ({"metric_for_best_model": "bleu", "generation_eval_steps": 5, "generation_metrics": ["rouge"]}, "add bleu there"),
        ({"generation_eval_steps": 5, "max_generation_seconds": 0.0}, "max_generation_seconds is 0"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "early_stopping_patience is 2 and eval_strategy is no"),
        ({"evals_per_epoch": 2}, "evals_per_epoch is 2 and eval_strategy is steps"),
        ({"early_stopping_threshold": 0.5}, "belongs to early_stopping_patience"),
        ({"stop_check_samples": -1}, "stop_check_samples is -1"),
        ({"profile_steps": "3"}, "profile_steps is '3': it must be FIRST:LAST"),
    ],
)  # fmt: skip
def test_what_is_refused(changes, message) -> None:
    base = {
        "model_name_or_path": "m",
        "train_file": "t.jsonl",
        "eval_file": "e.jsonl",
        "output_dir": "o",
        "use_cpu": True,
    }
    base |= {"eval_strategy": "steps", "eval_steps": 5}
    values = {key: value for key, value in (base | changes).items() if value is not None}
    with pytest.raises(ArgumentsError, match=message):
        parse_values(values)


ROWS = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}] * 4


def test_metrics_that_cannot_be_computed(tmp_path, monkeypatch) -> None:
    why = {"meteor": "meteor needs WordNet"}
    monkeypatch.setattr("hf_sft.training.answering_trainer.available", lambda names, references: (["bleu"], why))
    with pytest.raises(ValueError, match="generation_metrics: meteor needs WordNet"):
        SFTTrainer(
            tiny.tiny_model(),
            processing_class=tiny.tiny_tokenizer(),
            eval_dataset=ROWS,
            evaluation_args=EvaluationArguments(generation_eval_steps=1, generation_metrics=["meteor"]),
        )


def make(folder: Path, eval_dataset, evaluation_args, **more):
    from hf_sft import TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        max_steps=2,
        disable_tqdm=True,
        per_device_train_batch_size=1,
        **more,
    )
    return SFTTrainer(
        tiny.tiny_model(), args, train_dataset=ROWS, eval_dataset=eval_dataset, processing_class=tiny.tiny_tokenizer(),
        evaluation_args=evaluation_args,
    )  # fmt: skip


def test_data_without_prompts_and_trainers_without_a_tokenizer(tmp_path) -> None:
    asked = EvaluationArguments(generation_eval_steps=1, generation_max_new_tokens=3)
    with pytest.raises(ValueError, match="no row of the evaluation data has a prompt"):
        make(tmp_path, [{"input_ids": [1, 2], "labels": [1, 2]}], asked)
    with pytest.raises(ValueError, match="has no tokenizer: pass it as processing_class"):
        SFTTrainer(tiny.tiny_model(), eval_dataset=ROWS, evaluation_args=asked)
    with pytest.raises(ValueError, match="say by metric_for_best_model which of them counts, such as eval_a_loss"):
        make(tmp_path, {"a": ROWS, "b": ROWS}, EvaluationArguments(early_stopping_patience=1))


def test_several_evaluation_sets(tmp_path) -> None:
    """Each has metrics and answers of its own, and a metric of one of them can choose the best checkpoint."""
    other = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]}]
    asked = EvaluationArguments(
        generation_eval_steps=2, generation_max_new_tokens=3, generation_metrics=["edit_distance"]
    )
    more = dict(eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_b_edit_chars", logging_steps=1)
    trainer = make(tmp_path, {"a": ROWS, "b": other}, asked, **more)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_b_edit_chars" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert {(record["split"], record["step"]) for record in records(tmp_path / "out")} == {
        (name, step) for name in "ab" for step in (1, 2)
    }
    # Another data set at the same step, under the name of one that was answered.
    trainer.is_in_train, trainer._known.in_train = True, True
    first = trainer.evaluate(other, metric_key_prefix="eval_a")
    assert first["eval_a_edit_chars"] == lines[-1]["eval_b_edit_chars"]


def test_speed_does_not_count_answers_and_saving(tmp_path) -> None:
    """Answers before a checkpoint stop the clock in a stopped clock."""
    changes = dict(max_steps=6, eval_strategy="no", save_strategy="steps", save_steps=2, generation_eval_steps=2)
    out, trainer = runs.train_in_memory(arguments(tmp_path, generation_max_new_tokens=30, **changes))
    assert min(runs.history(out, "tokens_per_second")) > 0
    with trainer._stopped_clock():
        began = trainer._clock
        with trainer._stopped_clock():
            time.sleep(0.05)
    assert 0.05 <= trainer._clock - began < 0.1


def test_stop_check_that_a_kill_prevented_is_made(tmp_path, monkeypatch) -> None:
    values = runs.arguments(
        tmp_path, max_steps=2, save_strategy="steps", save_steps=2, stop_check_samples=1, generation_max_new_tokens=3
    )
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "check_stopping", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runs.train(values)
    assert not (tmp_path / "out" / "stop_check.json").exists()
    runs.train({**values, "resume_from_checkpoint": "auto"})
    first = (tmp_path / "out" / "stop_check.json").stat().st_mtime_ns
    runs.train({**values, "resume_from_checkpoint": "auto"})  # finished: nothing is made anew
    assert (tmp_path / "out" / "stop_check.json").stat().st_mtime_ns == first


def test_answers_of_the_training_are_no_check_of_the_result(tmp_path) -> None:
    changes = dict(max_steps=1, eval_strategy="no", generation_eval_steps=1)
    _, trainer = runs.train_in_memory(arguments(tmp_path, **changes))
    made = trainer.predictions
    assert trainer.check_stopping(1)["answers"][0]["answer"] == made[0].answer  # those of the last evaluation
    trainer._known.in_train, trainer.predictions = True, []
    assert trainer.check_stopping(1)["checked"] == 1


def test_answers_go_where_the_run_reports_to(tmp_path) -> None:
    """As text to TensorBoard, as a table to W&B (a stand-in: it wants an account)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import TrainerCallback

    class Table:
        def __init__(self, columns, data) -> None:
            self.columns, self.data = columns, data

    class WandbCallback(TrainerCallback):
        logged: list = []
        _wandb = SimpleNamespace(Table=Table, log=logged.append)

    asked = EvaluationArguments(generation_eval_steps=1, generation_max_new_tokens=3)
    more = dict(eval_strategy="no", report_to=["tensorboard"], logging_steps=1)
    trainer = make(tmp_path, ROWS, asked, **more)
    trainer.add_callback(WandbCallback())
    trainer.train()
    assert [entry["train/global_step"] for entry in WandbCallback.logged] == [1, 2]
    table = WandbCallback.logged[-1]["eval/answers"]
    first = trainer.predictions[0]
    assert table.columns == ["row", "prompt", "reference", "answer"]
    assert table.data[0] == [first.row, first.prompt, first.reference, first.answer]
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    (text,) = events.Tensors("eval/answers/text_summary")[-1].tensor_proto.string_val
    assert f"reference: {first.reference}" in text.decode() and f"answer: {first.answer}" in text.decode()
