"""The ready files of train_args/: they parse, say all that a run depends on, and run with a tiny model of the same family.

What a test changes in a file is what a machine without GPU and hub needs: the model, the data (records of the same shape), sizes.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

from hf_sft.data.templates import _NEEDED_TOKENS
from hf_sft.parsing import parse_args, read_config

FOLDER = runs.ROOT / "train_args"
# File -> (family of its model, whether the model's tokenizer brings a chat template).
READY: dict[str, tuple[str, bool]] = {
    "bloom-1b1-sft-full": ("bloom", False),
    "gemma-2b-sft-qlora": ("gemma", False),
    "llama2-7b-sft-qlora": ("llama2", False),
    "llama3-8b-dpo-qlora": ("llama3", True),
    "llama3.1-8b-sft-fsdp": ("llama3", False),
    "mamba-1.4b-sft-lora": ("mamba", False),
    "mamba-2.8b-sft-qlora": ("mamba", False),
    "pythia-410m-sft-full": ("gpt_neox", False),
    "qwen2-7b-sft-full-zero3": ("qwen2", True),
    "qwen2-7b-sft-lora": ("qwen2", True),
    "qwen3-8b-sft-qlora": ("qwen3", True),
    "qwen3-8b-wedlm-pretrain": ("qwen3", True),
    "wedlm-8b-sft-full-zero2": ("wedlm", True),
    "wedlm-8b-sft-lora": ("wedlm", True),
}
ENGINES = ("deepspeed", "fsdp", "fsdp_config")
WITH_ENGINE = ("llama3.1-8b-sft-fsdp", "qwen2-7b-sft-full-zero3", "wedlm-8b-sft-full-zero2")
SMALL = {
    "max_seq_length": 256, "max_steps": 3, "logging_steps": 1, "eval_steps": 2, "save_steps": 2,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip

# What a file says whatever it trains; and what its kind of training asks for beside that.
ALWAYS = frozenset(
    """
    model_name_or_path train_file output_dir train_mode max_seq_length special_tokens_in_text bad_records
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type
    warmup_steps weight_decay max_grad_norm bf16 logging_steps eval_strategy eval_steps save_strategy save_steps
    save_total_limit seed
    """.split()
)
ADAPTER = frozenset({"lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"})
WEDLM = frozenset({"block_size", "enable_ar_loss", "ar_loss_weight"})
DPO = frozenset({"dpo_beta", "dpo_loss_type", "max_prompt_length"})


def written(name: str) -> dict[str, Any]:
    return read_config(FOLDER / f"{name}.json")


# --- what they say ----------------------------------------------------------------------------------------------------


def test_every_file_is_known_here():
    """Files on data of this repository's examples and tests have tests of their own."""
    others = ("quickstart", "wedlm-example", "stories260k", "qwen3-tiny")
    assert set(READY) <= {path.stem for path in FOLDER.glob("*.json")}
    more = {path.stem for path in FOLDER.glob("*-sft-*.json")} | {path.stem for path in FOLDER.glob("*-dpo-*.json")}
    assert {name for name in more if not name.startswith(others)} <= set(READY)


@pytest.mark.parametrize("name", READY)
def test_a_file_parses_without_a_note_or_a_warning(name: str, no_engine_starts, monkeypatch, recwarn):
    monkeypatch.chdir(runs.ROOT)
    arguments = parse_args([str(FOLDER / f"{name}.json"), "--use_cpu"])
    assert arguments.notes == []
    assert [str(warning.message) for warning in recwarn if "hf_sft" in warning.filename] == []
    assert arguments.given == {*written(name), "use_cpu"}, "every key is one of today's names"
    if name in WITH_ENGINE:
        config = getattr(arguments.training, "hf_deepspeed_config", None)
        stage = config.config["zero_optimization"]["stage"] if config is not None else None
        assert (stage, arguments.training.fsdp) == {"zero2": (2, None), "zero3": (3, None)}.get(name[-5:], (None, True))


@pytest.mark.parametrize("name", READY)
def test_a_file_is_complete(name: str):
    values, (_, own_template) = written(name), READY[name]
    task, mode = values.get("task_type", "sft"), values["train_mode"]
    needed = set(ALWAYS) | ({"max_steps"} if values.get("streaming") else {"num_train_epochs"})
    needed |= ADAPTER if mode != "full" else set()
    needed |= WEDLM if values.get("objective") == "wedlm" else set()
    needed |= DPO if task == "dpo" else set()
    needed |= set() if own_template or task == "pretrain" else {"chat_template"}
    needed |= {"eval_split"} if "eval_file" not in values else {"eval_file"}
    assert needed - set(values) == set()
    small = values["model_name_or_path"].endswith("410m")
    assert small or values.get("activation_checkpointing") or values["fsdp_config"]["activation_checkpointing"]
    assert values["output_dir"] == f"output/{name}"
    assert not {"trust_remote_code", "hub_token"} & set(values)
    words = name.split("-")
    assert mode in words or words[-1] in ("fsdp", "pretrain")
    assert task in words


# --- runs -------------------------------------------------------------------------------------------------------------


def _alpaca(number: int, row: list[dict[str, str]]) -> dict[str, Any]:
    return {"instruction": row[0]["content"], "input": "abc" if number % 2 else "", "output": row[1]["content"]}


def _chat(number: int, row: list[dict[str, str]]) -> dict[str, Any]:
    return {"prompt": row[0]["content"], "prompt_id": str(number), "messages": row}


def _pair(number: int, row: list[dict[str, str]]) -> dict[str, Any]:
    worse = [row[0], {"role": "assistant", "content": "no " + row[1]["content"]}]
    scores = {"score_chosen": 8.0, "score_rejected": 4.5}
    return _chat(number, row[:2]) | {"chosen": row[:2], "rejected": worse} | scores


def _text(number: int, row: list[dict[str, str]]) -> dict[str, Any]:
    return {"text": " ".join(turn["content"] for turn in row) * 3, "id": str(number)}


# Data set of the hub -> a record in its shape.
RECORDS = {
    "yahma/alpaca-cleaned": _alpaca,
    "HuggingFaceH4/ultrachat_200k": _chat,
    "HuggingFaceH4/ultrafeedback_binarized": _pair,
    "HuggingFaceFW/fineweb-edu": _text,
    "NeelNanda/pile-10k": _text,
}
ROWS = 272  # of the vocabulary: the tokenizer's, and some that no token has, as official checkpoints have


def save_model(folder: Path, family: str, tokenizer: Any) -> str:
    """A tiny model of the family, and the tokenizer."""
    if family == "wedlm":
        from hf_sft.models.wedlm import WeDLMConfig, WeDLMForCausalLM

        config = WeDLMConfig(
            **{**tiny.tiny_model("qwen3", vocab_size=ROWS).config.to_diff_dict(), "mask_token_id": 270}
        )
        model = WeDLMForCausalLM(config)
    else:
        model = tiny.tiny_model(family, vocab_size=ROWS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tokenizer_for(values: dict[str, Any], own_template: bool) -> Any:
    """Byte tokens, the special tokens that the file's template writes, and a template of its own only where the model has one."""
    tokenizer = tiny.tiny_tokenizer(tiny.CHATML if own_template else None)
    if tokens := _NEEDED_TOKENS.get(values.get("chat_template", "")):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *tokens]})
    return tokenizer


def local(folder: Path, files: Any) -> Any:
    """Sources of the hub as files here, with records of the same shape."""
    if isinstance(files, str):
        return local(folder, [{"path": files}])[0]["path"]
    found = []
    for source in files:
        make = RECORDS[source["path"]]
        path = folder / f"{make.__name__}-{source.get('split', 'train')}.jsonl"
        rows = [make(number, row) for number, row in enumerate(tiny.conversations(40, seed=len(path.name)))]
        found.append({key: source[key] for key in ("limit",) if key in source} | {"path": runs.write_jsonl(path, rows)})
    return found


def small_run(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The file's values with a tiny model, local records and small sizes."""
    values, (family, own_template) = written(name), READY[name]
    names = {"model_name_or_path": save_model(folder / "model", family, tokenizer_for(values, own_template))}
    names |= {key: local(folder, values[key]) for key in ("train_file", "eval_file") if key in values}
    split = {"eval_split": 8} if "eval_split" in values else {}
    prompt = {"max_prompt_length": 64} if "max_prompt_length" in values else {}
    return {**values, **names, **split, **prompt, **SMALL, "output_dir": str(folder / "out"), **changes}


def write_run(folder: Path, values: dict[str, Any]) -> str:
    file = folder / "run.json"
    file.write_text(json.dumps(values))
    return str(file)


def check_result(values: dict[str, Any]) -> None:
    """The log is finite, a checkpoint is whole, what was saved loads and is not what it was."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import hf_sft.models.wedlm  # noqa: F401  # its Auto classes

    out = Path(values["output_dir"])
    losses = runs.history(out)
    assert losses and all(0 < loss < 20 for loss in losses)
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] > 0
    assert (out / "checkpoint-2" / "complete.json").is_file()
    base = AutoModelForCausalLM.from_pretrained(values["model_name_or_path"], dtype=torch.float32)
    ids = torch.tensor([[65, 66, 67, 68]])
    with torch.no_grad():
        before = base.eval()(ids).logits
        if values["train_mode"] == "full":
            trained = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            assert trained.config.model_type == base.config.model_type
        else:
            trained = PeftModel.from_pretrained(base, out)
            assert trained.peft_config["default"].r == values["lora_rank"]
        after = trained.eval()(ids).logits[..., : before.shape[-1]]
    assert after.isfinite().all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", READY)
def test_a_file_runs(name: str, tmp_path):
    """As it stands but for the engine, which needs processes."""
    if written(name)["train_mode"] == "qlora":
        pytest.importorskip("bitsandbytes")
    values = {key: value for key, value in small_run(tmp_path, name).items() if key not in ENGINES}
    runs.train({"train_args_file": write_run(tmp_path, values)} | {"output_dir": values["output_dir"]})
    check_result(values)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_ENGINE)
def test_a_file_runs_under_its_engine(name: str, tmp_path):
    values = small_run(tmp_path, name)
    # gloo now and then aborts a process at its exit: the result decides.
    process = runs.train_process({"train_args_file": write_run(tmp_path, values)}, 2)
    assert (tmp_path / "out" / "trainer_state.json").is_file(), process.stderr[-2000:]
    engine = "FSDP2" if name.endswith("fsdp") else f"DeepSpeed ZeRO-{name[-1]}"
    assert engine in process.stderr + process.stdout
    check_result(values)


# --- docs/recipes.md --------------------------------------------------------------------------------------------------


def recipe_lines() -> list[str]:
    text = (runs.ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if "train.py" in line]


def test_the_docs_start_every_file_once():
    names = [re.findall(r"train_args/(\S+)\.json", line) for line in recipe_lines()]
    assert sorted(name for found in names for name in found) == sorted(READY)


@pytest.mark.parametrize("line", recipe_lines())
def test_a_launch_line_of_the_docs_is_accepted(line: str, no_engine_starts, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    words = shlex.split(line)
    launcher, words = words[0], words[words.index("train.py") + 1 :]
    arguments = parse_args([*words, "--use_cpu"])
    several = arguments.training.deepspeed or arguments.training.fsdp
    assert (launcher == "python") == (not several)


def test_the_docs_speak_of_every_file():
    text = (runs.ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = text.split("## What they train")[1]
    for name in READY:
        (rate,) = re.findall(rf"\| `{re.escape(name)}` \| [^|]* \| ([\de-]+) \|", table)
        assert float(rate) == written(name)["learning_rate"]
        assert f"`{written(name)['model_name_or_path']}`" in text
