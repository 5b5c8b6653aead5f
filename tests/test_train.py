"""train.py as users run it: what lands on the disk, what is said about wrong input, and real data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import runs
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_what_lands_in_the_output_folder(tmp_path) -> None:
    values = runs.arguments(tmp_path, save_strategy="steps", save_steps=4, eval_file=str(tmp_path / "eval.jsonl"))
    out = runs.train({**values, "report_to": "tensorboard", "hub_token": "hf_secret"})
    report = json.loads((out / "data_report.json").read_text())
    for split, records in (("train", 48), ("eval", 9)):
        part = report[split]
        assert part["records"] == records == part["kept"] + sum(part["dropped"].values()) + part["bad"]["count"]
        assert 0 < part["supervised_share"] < 1 and part["supervised_tokens"] < part["tokens"]
    assert 0.5 < report["packing"]["train"]["fill"] <= 1
    record = json.loads((out / "args.json").read_text())
    assert record["training"]["learning_rate"] == 1e-2 and record["versions"]["torch"] == metadata.version("torch")
    assert not [path for path in out.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert json.loads((out / "train_results.json").read_text())["train_loss"] > 0
    assert json.loads((out / "eval_results.json").read_text())["eval_perplexity"] > 1
    assert (out / "checkpoint-8" / "optimizer.pt").exists() and list(out.rglob("events.out.tfevents*"))
    saved = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert saved.dtype == torch.float32 and AutoTokenizer.from_pretrained(out).chat_template == tiny.CHATML


def test_the_saved_model_stops_where_it_learned_to_stop(tmp_path) -> None:
    """The template ends turns with <|im_end|>; the tokenizer's and the model's eos is another token."""
    values = runs.arguments(tmp_path)
    folder = tmp_path / "other-eos"
    shutil.copytree(values["model_name_or_path"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for mode in ({}, {"train_mode": "lora", "lora_rank": 2, "dtype": "float32"}):
        out = runs.train(
            {**values, **mode, "model_name_or_path": str(folder), "output_dir": str(tmp_path / f"o{len(mode)}")}
        )
        assert set(json.loads((out / "generation_config.json").read_text())["eos_token_id"]) == {end, eos}


@pytest.mark.parametrize("backend", ["flash", "flex"])
def test_a_backend_that_cannot_train_here_is_refused_before_data_are_read(tmp_path, monkeypatch, backend: str) -> None:
    values = runs.arguments(tmp_path, attention_backend=backend)
    monkeypatch.setattr("hf_sft.tasks.read_data_side", lambda *_: pytest.fail("data are read"))
    with pytest.raises(ValueError, match=f"attention_backend is {backend} and the training is on a CPU"):
        runs.train(values)


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_an_adapter_reloads_and_merges_to_the_trained_model(tmp_path, mode: str) -> None:
    from peft import PeftModel

    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
    from hf_sft.arguments import ModelArguments
    from hf_sft.commands import merge
    from hf_sft.models.loading import load_model

    base = tiny.save_tiny(tmp_path / "model-wide", hidden_size=64, intermediate_size=64)
    values = runs.arguments(tmp_path, model_name_or_path=base, train_mode=mode, lora_rank=4, dtype="float32")
    out, trainer = runs.train_in_memory({**values, "new_special_tokens": ["<|new|>"]})
    assert {path.name for path in out.glob("*.safetensors")} == {"adapter_model.safetensors"}
    ids = AutoTokenizer.from_pretrained(out)("<|im_start|>user\nabc<|new|>", return_tensors="pt")["input_ids"]

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model.eval()(input_ids=ids).logits

    trained = logits(trainer.model)
    fresh = AutoModelForCausalLM.from_pretrained(base)
    if mode == "qlora":
        fresh = trainer.model.unload()  # the same nf4 weights, without their adapter
    fresh.resize_token_embeddings(260, mean_resizing=False)
    before = logits(fresh)
    assert (trained - before)[..., :259].abs().max() > 1e-2  # something was learned that can be lost
    # The same numbers take the same road: nothing is rounded between saving and loading float32 weights.
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh, out)), trained, rtol=0, atol=1e-6)

    assert merge.main([str(out), "--output_dir", str(tmp_path / "merged")]) == 0
    merged = logits(load_model(ModelArguments(model_name_or_path=str(tmp_path / "merged"))))
    if mode == "lora":
        torch.testing.assert_close(merged, trained, rtol=0, atol=1e-5)
    else:  # merged into the weights before quantisation, whose rounding (about 7 % of a weight under nf4) is not in it
        assert (merged - trained).norm() < 0.5 * (before - trained).norm()


def test_the_record_says_what_came_of_the_arguments(tmp_path) -> None:
    out = runs.train(runs.arguments(tmp_path, max_steps=1, train_mode="lora", lora_rank=2))
    record = json.loads((out / "args.json").read_text())
    assert (record["model"]["attention_backend"], record["model"]["dtype"]) == ("auto", None)
    assert record["data"]["packing"] is None
    assert record["resolved"] == {
        "attention_backend": "segment", "packing": True, "dtype": "bfloat16", "quantization": None, "processes": 1,
        "last_step": 1,
    }  # fmt: skip
    padded = runs.train(runs.arguments(tmp_path, max_steps=1, packing=False, output_dir=str(tmp_path / "padded")))
    resolved = json.loads((padded / "args.json").read_text())["resolved"]
    assert (resolved["attention_backend"], resolved["packing"], resolved["dtype"]) == ("padded", False, "float32")


def test_a_diverged_model_is_not_saved(tmp_path) -> None:
    values = runs.arguments(tmp_path, learning_rate=1e30, max_grad_norm=0, lr_scheduler_type="constant", warmup_steps=0)
    with pytest.raises(ValueError, match=r"diverged: loss is nan in the log of step [2-8],.*Lower learning_rate"):
        runs.train(values)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "args.json", "data_report.json", "log.jsonl", "report.html",
    ]  # fmt: skip


def test_a_run_that_fails_before_its_first_step_can_be_mended(tmp_path, monkeypatch) -> None:
    from hf_sft.training.trainer import SFTTrainer

    def fail(*args, **kwargs):
        raise KeyError("no such scheduler")

    values = runs.arguments(tmp_path, max_steps=1)
    for place in ("create_optimizer", "create_scheduler"):
        with monkeypatch.context() as patch:
            patch.setattr(SFTTrainer, place, fail)
            with pytest.raises(KeyError):
                runs.train(values)
        assert not (tmp_path / "out").exists()
    runs.train(values)


def test_the_process_leaves_its_group(monkeypatch, tmp_path) -> None:
    import torch.distributed as dist

    from hf_sft.commands import train

    def fail(arguments) -> int:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        raise ValueError("wrong data")

    monkeypatch.setattr(train, "run", fail)
    with pytest.raises(ValueError, match="wrong data"):
        runs.train(runs.arguments(tmp_path))
    assert not dist.is_initialized()


def wrong_inputs(tmp_path: Path) -> dict[str, tuple[dict, str]]:
    def data(name: str, content: bytes) -> dict:
        (tmp_path / name).write_bytes(content)
        return {"train_file": str(tmp_path / name)}

    good = json.dumps(tiny.conversations(1)[0])
    plain = tmp_path / "no-template"
    tiny.tiny_model().save_pretrained(plain)
    tiny.tiny_tokenizer(chat_template=None).save_pretrained(plain)
    turn = '[{"role": "%s", "content": %s}, {"role": "assistant", "content": "x"}]\n'
    return {
        "missing file": ({"train_file": str(tmp_path / "nowhere.jsonl")}, "nowhere.jsonl"),
        "empty file": (data("empty.jsonl", b""), "empty.jsonl"),
        "no UTF-8": (data("latin.jsonl", good.encode() + b'\n{"a": "\xff"}\n'), "(?s)latin.jsonl.*line 2.*UTF-8"),
        "no JSON": (data("broken.jsonl", good.encode() + b"\n{oops\n"), "(?s)broken.jsonl.*line 2"),
        "unknown role": (data("role.jsonl", (turn % ("wizard", '"hi"')).encode()), "(?s)line 1.*wizard"),
        "content is no text": (data("content.jsonl", (turn % ("user", "7")).encode()), "(?s)line 1.*content"),
        "no template": ({"model_name_or_path": str(plain)}, "chat_template"),
        "too long": ({"max_seq_length": 100_000}, "max_seq_length.*512|100,?000"),
        "misspelt key": ({"learning_rat": 1e-3}, "did you mean learning_rate"),
        "wrong type": ({"max_seq_length": "many"}, "max_seq_length is 'many'"),
        "qlora with full": ({"quantization": "nf4"}, "only the frozen base of qlora"),
        "adapter with full": ({"lora_rank": 8}, "train_mode is full"),
        "no model": ({"model_name_or_path": str(tmp_path / "no-model")}, "no-model"),
        "conversations as pairs": ({"task_type": "dpo"}, "is no preference pair"),
        "all rows too long": ({"max_seq_length": 4}, "none is left"),
    }


def test_wrong_input_gets_a_sentence_and_leaves_nothing(tmp_path) -> None:
    for case, (changes, message) in wrong_inputs(tmp_path).items():
        values = runs.arguments(tmp_path, **changes)
        with pytest.raises(ValueError) as raised:
            runs.train(values)
        assert re.search(message, str(raised.value)), f"{case}: {raised.value}"
        assert not Path(values["output_dir"]).exists(), case


def test_packing_a_model_that_cannot_be_packed(tmp_path) -> None:
    values = runs.arguments(tmp_path, family="mamba", max_steps=2)
    with pytest.raises(ValueError, match="MambaForCausalLM cannot be packed"):
        runs.train({**values, "packing": True})
    assert not Path(values["output_dir"]).exists()
    out = runs.train(values)
    assert json.loads((out / "data_report.json").read_text()).get("packing", {}).get("train") is None
    assert runs.history(out)[-1] < runs.history(out)[0]


def test_the_process_says_it_in_a_line_and_fails(tmp_path) -> None:
    command = [sys.executable, runs.ROOT / "train.py", "--lerning_rate", "1"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (
        process.returncode == 2
        and "did you mean learning_rate?" in process.stderr
        and "Traceback" not in process.stderr
    )
    assert "train_file is not set" in process.stderr  # every problem at once


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260k-gsm8k-full", "stories260k-gsm8k-lora", "qwen3-tiny-gsm8k"])
def test_real_data_through_the_shipped_files(tmp_path, shared_data, name: str) -> None:
    """20 steps of each file in train_args/ that names real data: what is held out is predicted better than before."""
    from hf_sft.parsing import read_config

    config = runs.ROOT / "train_args" / f"{name}.json"
    short = {"max_steps": 20, "max_eval_samples": 60, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    process = runs.train_process({"train_args_file": str(config), "output_dir": str(tmp_path / "out"), **short})
    assert process.returncode == 0, process.stderr
    before = runs.history(tmp_path / "out", "eval_loss")[0]
    after = json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"]
    assert after < before - 0.5
    assert read_config(config)["eval_file"].startswith("../shared")
