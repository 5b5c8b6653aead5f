"""hf-sft evaluate: the figures of the training's own evaluation, answers, models side by side, benchmarks, bad input."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import tiny

from hf_sft import cli
from hf_sft.answer_metrics import score_answers

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")
pytest.importorskip("rapidfuzz")

SHORT = ("--max_new_tokens", "6", "--batch_size", "4")
METRICS = ("--metrics", "chrf", "edit_distance", "exact_match")


def evaluate(*words: object) -> int:
    return cli.main(["evaluate", *map(str, words)])


def figures(file: Path) -> list[dict]:
    return json.loads(file.read_text(encoding="utf-8"))["results"]


def same(measured: dict, run: dict, *names: str) -> None:
    for name in names:
        assert measured[name] == pytest.approx(run[f"eval_{name}"], rel=2e-6), name


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """An adapter under another template than its base's, evaluated before the first step and at steps 2 and 4, averaged."""
    folder = tmp_path_factory.mktemp("lora")
    values = runs.arguments(
        folder, train_mode="lora", lora_rank=2, dtype="float32", max_seq_length=96, overlength="truncate", chat_template="plain",
        eval_file=str(folder / "eval.jsonl"), eval_on_start=True, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, max_steps=4, ema_decay=0.5,
    )  # fmt: skip
    return runs.train(values)


@pytest.fixture(scope="module")
def wedlm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wedlm")
    values = runs.arguments(
        folder, objective="wedlm", mask_token="<|mask|>", block_size=8, max_steps=2, eval_file=str(folder / "eval.jsonl"),
        ar_loss_weight=0.5,
    )  # fmt: skip
    return runs.train(values)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A folder of a model that no run has left, with two records of very different lengths."""
    folder = tmp_path_factory.mktemp("plain")
    tiny.save_tiny(folder / "model")
    turns = [("Hi", "Yes"), ("Who are you?", "I am a model of random weights, and what I say is of no use.")]
    records = [{"prompt": question, "completion": answer} for question, answer in turns]
    runs.write_jsonl(folder / "data.jsonl", records)
    return folder


# --- losses -----------------------------------------------------------------------------------------------------------


def test_an_output_folder_has_the_figures_of_its_training(lora, tmp_path, capsys):
    data = lora.parent / "eval.jsonl"
    out, rows = tmp_path / "all.json", tmp_path / "rows.jsonl"
    words = (lora, "--file", data, "--compare", "base", lora / "checkpoint-2", "--output", out, "--rows", rows)
    assert evaluate(*words, *SHORT, *METRICS, "--samples", 5) == 0
    tuned, base, earlier = figures(out)
    history = [
        line for line in json.loads((lora / "trainer_state.json").read_text())["log_history"] if "eval_loss" in line
    ]
    names = ("loss", "perplexity", "token_accuracy", "supervised_tokens")
    same(tuned["metrics"], json.loads((lora / "eval_results.json").read_text()), *names)
    same(base["metrics"], history[0], *names)  # before the first step
    same(earlier["metrics"], history[1], *names)
    assert tuned["metrics"]["loss"] < base["metrics"]["loss"]
    assert base["model"] == "base" and base["path"] == str(lora.parent / "model-llama")
    assert "--max_seq_length" not in words, "cut to 96 tokens as args.json says"

    records = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert [record["model"] for record in records] == [
        name for name in map(str, (lora, "base", lora / "checkpoint-2")) for _ in range(5)
    ]
    texts = [[record[key] for record in records[:5]] for key in ("answer", "reference")]
    expected, of_rows = score_answers(*texts, ["chrf", "edit_distance", "exact_match"])
    assert {key: tuned["metrics"][key] for key in expected} == expected
    assert of_rows == [{key: record[key] for key in expected} for record in records[:5]]
    assert tuned["metrics"]["prompts"] == 5
    assert tuned["metrics"]["answer_tokens"] == sum(record["tokens"] for record in records[:5]) / 5

    shown = capsys.readouterr().out
    assert "perplexity" in shown and "edit_words" in shown and "checkpoint-2" in shown and str(out) in shown
    assert evaluate(*words) == 2, "neither file is written over"
    assert "exists, and nothing is overwritten" in capsys.readouterr().err


def test_checkpoints_by_name(lora, tmp_path, capsys):
    data, history = lora.parent / "eval.jsonl", json.loads((lora / "trainer_state.json").read_text())["log_history"]
    assert evaluate(lora, "--checkpoint", 2, "--file", data, "--no_generation", "--output", tmp_path / "a.json") == 0
    (column,) = figures(tmp_path / "a.json")
    same(column["metrics"], next(line for line in history if "eval_loss" in line and line["step"] == 2), "loss")
    assert "prompts" not in column["metrics"] and column["path"].endswith("checkpoint-2")
    words = (
        "--checkpoint",
        "checkpoint-2",
        "--raw_weights",
        "--file",
        data,
        "--no_generation",
        "--output",
        tmp_path / "b.json",
    )
    assert evaluate(lora, *words) == 0
    assert figures(tmp_path / "b.json")[0]["metrics"]["loss"] < column["metrics"]["loss"], "the average lags behind"
    assert evaluate(lora, "--checkpoint", 3, "--file", data) == 2
    assert "has no checkpoint '3'" in (told := capsys.readouterr().err) and "4, 2" in told


def test_a_folder_with_checkpoints_alone_and_one_without_a_model(lora, tmp_path, capsys):
    folder = tmp_path / "stopped"
    folder.mkdir()
    (folder / "checkpoint-2").symlink_to(lora / "checkpoint-2")
    data = lora.parent / "eval.jsonl"
    assert evaluate(folder, "--file", data) == 2
    assert "holds no final model; choose one of its checkpoints" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert evaluate(tmp_path / "empty", "--file", data) == 2
    assert "holds no model" in capsys.readouterr().err


def test_perplexity_of_a_bare_model_by_hand(plain, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(plain / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    nll, tokens, answers = 0.0, 0, []
    for line in (plain / "data.jsonl").read_text().splitlines():
        record = json.loads(line)
        ask = tokenizer.apply_chat_template(
            [{"role": "user", "content": record["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        ids = torch.tensor([[*ask, *tokenizer(record["completion"] + "<|im_end|>")["input_ids"]]])
        with torch.no_grad():
            logp = model(ids).logits[0, len(ask) - 1 : -1].log_softmax(-1)
            written = model.generate(torch.tensor([ask]), max_new_tokens=6, do_sample=False, eos_token_id=256)
        nll -= logp.gather(1, ids[0, len(ask) :, None]).sum().item()
        tokens += len(logp)
        answers.append(tokenizer.decode(written[0, len(ask) :], skip_special_tokens=True))
    out = tmp_path / "out.json"
    assert (
        evaluate(
            plain / "model", "--file", plain / "data.jsonl", *SHORT, "--output", out, "--rows", tmp_path / "r.jsonl"
        )
        == 0
    )
    (column,) = figures(out)
    assert column["metrics"]["supervised_tokens"] == tokens
    assert column["metrics"]["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert column["decoding"] is None and "bleu" in column["metrics"]
    assert any("no reference has a final answer" in note for note in column["notes"])
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert [record["answer"] for record in records] == answers


def test_wedlm_by_both_decodings(wedlm, tmp_path, capsys):
    data, out = wedlm.parent / "eval.jsonl", tmp_path / "out.json"
    words = ("--file", data, "--compare", "base", "--output", out, "--rows", tmp_path / "rows.jsonl", "--samples", 4)
    assert evaluate(wedlm, *words, *SHORT, *METRICS, "--entropy_threshold", 100) == 0
    parallel, stepwise, base = figures(out)
    assert [column["decoding"] for column in (parallel, stepwise, base)] == ["parallel", "autoregressive", None]
    run = json.loads((wedlm / "eval_results.json").read_text())
    same(
        parallel["metrics"],
        run,
        "loss",
        "perplexity",
        "token_accuracy",
        "any_order_bound",
        "masked_loss",
        "masked_loss_at_1.0",
    )
    assert stepwise["metrics"]["loss"] == parallel["metrics"]["loss"]
    assert stepwise["metrics"]["tokens_per_forward"] == 1.0 != parallel["metrics"]["tokens_per_forward"]
    assert "masked_loss" not in base["metrics"] and any("next tokens alone" in note for note in base["notes"])
    decodings = [json.loads(line).get("decoding") for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert decodings == ["parallel"] * 4 + ["autoregressive"] * 4 + [None] * 4
    shown = capsys.readouterr().out
    assert "masked_loss " in shown and "masked_loss_at" not in shown
    assert evaluate(wedlm, "--file", data, "--autoregressive", *SHORT, *METRICS, "--samples", 2) == 0
    assert evaluate(wedlm, "--file", data, "--autoregressive", "--window", 4) == 2


def test_a_causal_run_of_a_wedlm_model_is_measured_as_it_was_trained(wedlm, tmp_path):
    folder = Path(shutil.copytree(wedlm, tmp_path / "causal"))
    record = json.loads((folder / "args.json").read_text())
    del record["wedlm"]
    record["data"]["objective"] = "causal"
    (folder / "args.json").write_text(json.dumps(record))
    out = tmp_path / "out.json"
    assert evaluate(folder, "--file", wedlm.parent / "eval.jsonl", "--no_generation", "--output", out) == 0
    metrics = figures(out)[0]["metrics"]
    assert "masked_loss" not in metrics and math.exp(metrics["loss"]) == pytest.approx(metrics["perplexity"], rel=1e-9)


def test_preferences_are_measured_against_what_the_training_began_from(tmp_path):
    sides = [("Say a.", "a a a", "b"), ("Say b.", "b b", "a a a a"), ("Say c.", "c", "d d")]
    pairs = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in sides]
    data = runs.write_jsonl(tmp_path / "pairs.jsonl", pairs * 2)
    for mode in ("full", "lora"):
        values = runs.arguments(
            tmp_path, task_type="dpo", train_file=data, eval_file=data, max_steps=2, train_mode=mode, dpo_beta=0.5,
            dtype="float32", output_dir=str(tmp_path / mode),
        )  # fmt: skip
        folder = runs.train(values)
        out = tmp_path / f"{mode}.json"
        assert evaluate(folder, "--file", data, "--no_generation", "--output", out) == 0
        names = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "pairs")
        (column,) = figures(out)
        same(column["metrics"], json.loads((folder / "eval_results.json").read_text()), *names)
        assert column["metrics"]["rewards/margins"] != 0


# --- models side by side ----------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """Two models that no training has left, the second of which keeps the shorter ones of four records; and the data."""
    folders = [Path(tiny.save_tiny(tmp_path / name, seed=seed)) for seed, name in enumerate(("one", "short"))]
    (folders[1] / "args.json").write_text(json.dumps({"data": {"max_seq_length": 60}}))
    records = [{"prompt": "Say " + "it " * (20 * (n % 2)), "completion": f"yes {n}"} for n in (1, 2, 3, 4)]
    runs.write_jsonl(tmp_path / "data.jsonl", records)
    return [*folders, tmp_path / "data.jsonl"]


def test_all_models_answer_the_same_records(two, tmp_path, capsys):
    first, second, data = two
    out, rows = tmp_path / "out.json", tmp_path / "rows.jsonl"
    words = ("--file", data, "--compare", second, "--output", out, "--rows", rows, *SHORT, *METRICS)
    assert evaluate(first, *words, "--samples", 2, "--train_on", "assistant") == 0
    one, other = figures(out)
    assert (one["records"], other["records"]) == (4, 2)
    assert (one["data"]["max_seq_length"], other["data"]["max_seq_length"]) == (512, 60)
    assert one["metrics"]["supervised_tokens"] == 2 * other["metrics"]["supervised_tokens"]
    answers = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert [(each["source"], each["record"]) for each in answers] == [(str(data), 2), (str(data), 4)] * 2
    assert [each["row"] for each in answers] == [1, 3, 0, 1]
    assert [each["reference"] for each in answers] == ["yes 2", "yes 4"] * 2
    told = (
        f"the models keep different records ({first} 4, {second} 2; all of them 2): each loss is of the model's own, and the "
        "answers are to records that all keep"
    )
    assert told in one["notes"] and told in other["notes"]
    shown, logged = capsys.readouterr()
    assert shown.count("the models keep different records") == 1
    assert "compare no values per token" not in logged, "they are of other records"
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["arguments"] == ["--train_on", "assistant"] and written["options"]["samples"] == 2
    assert "failed" not in written and "sacrebleu" in written["versions"] and one["dtype"] == "float32"


@pytest.mark.parametrize(
    ("trained", "words", "said"),
    [
        (
            {"bf16": True},
            [],
            "losses are computed in float32, and training multiplied in bfloat16: --bf16 computes them so",
        ),
        ({"fp16": True}, [], "losses are computed in float32, and training multiplied in float16: --fp16 computes"),
        ({"bf16": True}, ["--bf16"], None),
        ({"bf16": True}, ["--dtype", "bfloat16"], None),
        ({}, [], None),
    ],
)
def test_another_type_than_that_of_training_is_named(two, capsys, trained, words, said):
    first, second, data = two
    (first / "args.json").write_text(json.dumps({"data": {"max_seq_length": 64}, "training": trained}))
    assert evaluate(first, "--compare", second, "--file", data, *SHORT, *words) == 0
    shown = capsys.readouterr().out
    assert f"one: {said}" in shown if said else "training multiplied" not in shown


def test_models_that_keep_the_same_records(two, tmp_path, capsys):
    first, second, data = two
    runs.write_jsonl(data, [{"prompt": "a", "completion": "b" * 400}, {"prompt": "a", "completion": "b"}])
    (first / "args.json").write_text(json.dumps({"data": {"max_seq_length": 64}}))
    runs.write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a", "completion": "b" * 400}])
    words = ("--file", data, "--compare", second, *SHORT)
    assert evaluate(first, *words) == 0
    assert "keep different records" not in capsys.readouterr().out
    assert evaluate(first, "--file", tmp_path / "long.jsonl", "--compare", second, *SHORT) == 2
    assert "max_seq_length" in capsys.readouterr().err


def test_the_rows_of_a_record_are_told_apart():
    from hf_sft.commands.measuring import _numbered

    keys = [(0, 1), (0, 2), (0, 1), (1, 1)]
    assert _numbered(keys) == {(0, 1, 0): 0, (0, 2, 0): 1, (0, 1, 1): 2, (1, 1, 0): 3}


def test_what_is_wrong_with_a_later_model_is_said_before_the_first_is_measured(two, tmp_path, monkeypatch, capsys):
    first, second, data = two
    (second / "config.json").unlink()

    def load(*_):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("hf_sft.commands.evaluate.load_found", load)
    assert evaluate(first, "--file", data, "--compare", second, *SHORT) == 2
    assert "No model config could be read from" in capsys.readouterr().err


def test_what_was_measured_is_kept_when_a_later_model_fails(two, tmp_path, capsys):
    first, second, data = two
    (second / "model.safetensors").write_bytes(b"no weights")
    out, rows = tmp_path / "out.json", tmp_path / "rows.jsonl"
    words = ("--file", data, "--compare", second, "--output", out, "--rows", rows, *SHORT, *METRICS)
    assert evaluate(first, *words) == 2
    shown, told = capsys.readouterr()
    assert "perplexity" in shown and "error: " in told
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [column["model"] for column in written["results"]] == [str(first)]
    assert written["failed"]["model"] == str(second) and "ValueError" in written["failed"]["error"]
    assert len(rows.read_text(encoding="utf-8").splitlines()) == 2


def test_different_numbers_of_tokens_are_warned_of(two, capsys):
    first, second, data = two
    (second / "args.json").unlink()
    words = (first, "--file", data, "--compare", second, "--no_generation")
    told = "compare no values per token (loss, perplexity)"
    assert evaluate(*words) == 0 and told not in capsys.readouterr().err
    tiny.tiny_model(vocab_size=264).save_pretrained(second)
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["yes"])
    tokenizer.save_pretrained(second)
    assert evaluate(*words) == 0 and told in capsys.readouterr().err


def test_the_system_message_of_a_run_is_that_of_its_saved_template(plain, tmp_path):
    """It stands in the template that is saved with the model; the args.json does not put it back into one without it."""
    data = plain / "data.jsonl"
    values = runs.arguments(
        tmp_path, train_file=str(data), eval_file=str(data), system_prompt="Be brief.", max_steps=1, dtype="float32"
    )
    folder = runs.train(values)

    def asked(name: str) -> tuple[dict, list[str]]:
        out, rows = tmp_path / f"{name}.json", tmp_path / f"{name}.jsonl"
        assert evaluate(folder, "--file", data, "--output", out, "--rows", rows, *SHORT, *METRICS) == 0
        prompts = [json.loads(line)["prompt"] for line in rows.read_text(encoding="utf-8").splitlines()]
        return figures(out)[0]["metrics"], prompts

    metrics, prompts = asked("as_saved")
    same(metrics, json.loads((folder / "eval_results.json").read_text()), "loss", "supervised_tokens")
    assert [prompt.count("Be brief.") for prompt in prompts] == [1, 1]
    tiny.tiny_tokenizer().save_pretrained(folder)
    assert [prompt.count("Be brief.") for prompt in asked("another")[1]] == [0, 0]


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_raw_texts_have_no_answers(plain, tmp_path, capsys):
    data = runs.write_jsonl(tmp_path / "texts.jsonl", [{"text": "once upon a time"}])
    words = (plain / "model", "--file", data, "--task_type", "pretrain")
    assert evaluate(*words) == 0
    assert "raw texts (task_type pretrain) have no prompts" in " ".join(capsys.readouterr().out.split())
    assert evaluate(*words, "--metrics", "bleu") == 2
    assert "bleu compare answers with references, and raw texts" in capsys.readouterr().err


def test_prompts_alone_name_the_metric(plain, tmp_path, capsys):
    data = runs.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}, {"prompt": "Who?"}])
    assert evaluate(plain / "model", "--file", data, "--metrics", "chrf") == 2
    told = capsys.readouterr().err
    assert "holds prompts without answers, and chrf compare with references" in told and "hf-sft generate" in told
    bad = runs.write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "Hi", "completion": "Yes"}, {"prompt": 5}])
    assert evaluate(plain / "model", "--file", bad) == 2
    assert "without answers" not in (told := capsys.readouterr().err) and "bad.jsonl" in told


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "name the data with --file, or benchmarks with --tasks"),
        (("--file", "DATA", "--samples", 0), "--samples is 0: use at least 1, or --no_generation"),
        (
            ("--file", "DATA", "--no_generation", "--metrics", "bleu"),
            "--no_generation makes no answers, and --metrics needs",
        ),
        (("--file", "DATA", "--metrics", "blue"), "no metric blue"),
        (("--file", "DATA", "--metrics", "final_answer"), "metrics has final_answer: no reference has a final answer"),
        (("--file", "DATA", "--output", "x.txt"), "the name of this file ends with .json"),
        (("--file", "DATA", "--limit", 3), "--limit belongs to benchmarks"),
        (("--file", "DATA", "--window", 4), "window"),
        (("--file", "DATA", "--compare", "base"), "names the model that the training began from"),
        (("--file", "DATA", "--max_seq_lenth", 64), "max_seq_length"),
        (("--file", "EMPTY"), "is empty"),
        (("--file", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--file", "DATA", "--eval_file", "x"), "--eval_file belongs to hf-sft train: name the data with --file"),
        (("other", "--file", "DATA"), "compare them with --compare"),
        (("--file", "DATA", "--eval-file=x"), "--eval_file belongs to hf-sft train"),
        (
            ("--file", "DATA", "--no_generation", "--generation_eval_steps", 1),
            "are asked for with --samples, --metrics",
        ),
        (
            ("--file", "DATA", "--generation-metrics=bleu"),
            "--generation_metrics is of the answers while a model trains",
        ),
        (("--file", "DATA", "--ema_decay", 0.5), "--ema_decay belongs to hf-sft train, and nothing is trained here"),
        (("--file", "DATA", "--early_stopping_patience", 2), "--early_stopping_patience belongs to hf-sft train"),
        (("--file", "DATA", "--no_stop_on_divergence"), "--no_stop_on_divergence belongs to hf-sft train"),
    ],
)
def test_bad_requests(plain, tmp_path, capsys, words, message):
    (tmp_path / "empty.jsonl").touch()
    files = {"DATA": plain / "data.jsonl", "EMPTY": tmp_path / "empty.jsonl"}
    assert evaluate(plain / "model", *(files.get(str(word), word) for word in words)) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_of_another_base(lora, plain, tmp_path, capsys):
    other = tiny.save_tiny(tmp_path / "other", hidden_size=16)
    assert evaluate(lora, "--base", other, "--file", plain / "data.jsonl") == 2
    assert "error: " in capsys.readouterr().err


# --- benchmarks -------------------------------------------------------------------------------------------------------


def test_benchmarks_are_handed_the_loaded_model(lora, monkeypatch, tmp_path, capsys):
    asked = []

    class Manager:
        def __init__(self, include_path=None):
            self.include_path = include_path

        def match_tasks(self, names):
            return [name for name in names if name in ("sums", "words")]

    def simple_evaluate(model, tasks, **options):
        asked.append((type(model.pretrained).__name__, tasks, options))
        if len(asked) > 4:
            raise KeyError("no such column")
        values = {"alias": "sums", "acc,none": 0.5, "acc,strict": 0.25, "acc_stderr,none": "N/A", "name": "sums"}
        return {"results": {task: values for task in tasks if task == "sums"}}

    stand_ins = {
        "lm_eval": SimpleNamespace(
            simple_evaluate=simple_evaluate, __spec__=importlib.machinery.ModuleSpec("lm_eval", None)
        ),
        "lm_eval.tasks": SimpleNamespace(TaskManager=Manager),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=SimpleNamespace),
    }
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    words = (lora, "--tasks", "sums,words", "--task_folder", tmp_path, "--compare", "base", "--limit", 3)
    assert evaluate(*words, "--output", tmp_path / "out.json") == 0
    tuned, _ = figures(tmp_path / "out.json")
    assert tuned["metrics"] == {"sums/acc": 0.5, "sums/acc (strict)": 0.25}
    models = ["PeftModelForCausalLM"] * 2 + ["LlamaForCausalLM"] * 2
    assert [each[:2] for each in asked] == list(zip(models, [["sums"], ["words"]] * 2, strict=True))
    assert asked[0][2]["limit"] == 3 and asked[0][2]["task_manager"].include_path == str(tmp_path)
    for tasks, failed in (("sums,words,sums", str(lora)), ("sums,words", "base")):
        del asked[2:]  # the third task from now on fails
        out = tmp_path / f"{len(tasks)}.json"
        with pytest.raises(KeyError):
            evaluate(lora, "--tasks", tasks, "--compare", "base", "--output", out)
        written = json.loads(out.read_text(encoding="utf-8"))
        assert [column["metrics"] for column in written["results"]] == [tuned["metrics"]]
        assert written["failed"]["model"] == failed and "no such column" in written["failed"]["error"]
    capsys.readouterr()
    assert evaluate(lora, "--tasks", "sums,difference") == 2
    assert "knows no task difference;" in capsys.readouterr().err


def test_without_the_harness(lora, monkeypatch, capsys):
    monkeypatch.setattr("hf_sft.commands.benchmarks.find_spec", lambda name: None)
    assert evaluate(lora, "--tasks", "gsm8k") == 2
    assert "pip install lm-eval" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_a_task_of_ones_own_by_the_harness(plain, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [
        {"question": f"{n} plus {n} is", "choices": [f" {2 * n}", f" {2 * n + 1}"], "label": 0} for n in range(6)
    ]
    data = runs.write_jsonl(tmp_path / "sums.jsonl", questions)
    (tmp_path / "sums.yaml").write_text(
        f'task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "{data}"}}}}\ntest_split: test\n'
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    words = ("--tasks", "sums", "--task_folder", tmp_path, "--file", plain / "data.jsonl", *SHORT)
    assert evaluate(plain / "model", *words, "--output", tmp_path / "out.json") == 0
    model, tokenizer = (kind.from_pretrained(plain / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))

    def logp(question: str, choice: str) -> float:
        start, ids = len(tokenizer(question)["input_ids"]), tokenizer(question + choice)["input_ids"]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(scores[place - 1, ids[place]].item() for place in range(start, len(ids)))

    right = [
        logp(each["question"], each["choices"][0]) > logp(each["question"], each["choices"][1]) for each in questions
    ]
    assert figures(tmp_path / "out.json")[0]["metrics"]["sums/acc"] == sum(right) / 6
