"""hf-sft inspect --memory: the figures are the room's, what it says to change fits, and what cannot be is said."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import runs
import tiny

from hf_sft.cli import main
from hf_sft.commands.memory import plan_of
from hf_sft.memory import advice
from hf_sft.memory.advice import on_more_devices, what_to_change
from hf_sft.memory.plan import estimate, fits

sys.path.insert(0, str(runs.ROOT / "benchmarks"))
import memory

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "head_dim": 256, "vocab_size": 32000}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """A config.json and nothing else: 0.35 x 10^9 parameters."""
    folder = tmp_path_factory.mktemp("config")
    tiny._config("qwen3", **SIZES, max_position_embeddings=8192).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def inspect(capsys, tmp_path):
    def run(*words: Any) -> tuple[dict[str, Any], str]:
        path = tmp_path / "memory.json"
        path.unlink(missing_ok=True)
        assert main(["inspect", "--memory", *map(str, words), "--json", str(path)]) == 0
        return json.loads(path.read_text(encoding="utf-8")), capsys.readouterr().out

    return run


def test_the_figures_are_the_rooms(config, inspect):
    words = ["--bf16", "--max_seq_length", 1024, "--per_device_train_batch_size", 2, "--train_mode", "qlora"]
    found, text = inspect("--model", config, *words)
    values = {"model_name_or_path": config, "bf16": True, "max_seq_length": 1024, "per_device_train_batch_size": 2}
    said = estimate(plan_of({**values, "train_mode": "qlora"}))
    assert found["parts"] == said.parts and found["total"] == said.total == sum(found["parts"].values())
    assert found["total"] == max(found["moments"].values()) and found["card"] == said.card == 8
    assert "qlora" in text and "2,048 tokens a micro-batch" in text and f"{said.total / 2**30:.2f}" in text
    assert found["fits"] is None and found["changes"] == found["faster"] == []  # no device is known


@pytest.mark.parametrize("said", [["--bf16"], ["--fp16"], []])
def test_the_precision_is_named(config, inspect, said):
    found, text = inspect("--model", config, *said)
    named = f"mixed precision {said[0].strip('-')}" if said else "no mixed precision"
    assert found["plan"]["precision"] == named and named in text


def test_sizes_that_the_config_does_not_give_are_told(tmp_path, inspect, caplog):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_embd": 64, "vocab_size": 512}))
    inspect("--config_name_or_path", path, "--config_overrides", '{"n_head": 4}', "--max_seq_length", 64)
    assert f"{path} does not give n_layer 12: counted as gpt2 has it by default" in caplog.text


def test_sizes_that_the_config_gives_are_not_told(config, inspect, caplog):
    inspect("--model", config)
    assert "does not give" not in caplog.text


def test_what_to_change_fits_when_it_is_done(config, inspect):
    words = ["--config_name_or_path", config, "--bf16", "--max_seq_length", 2048, "--per_device_train_batch_size", 4]
    words += ["--gradient_accumulation_steps", 2]
    found, text = inspect(*words, "--gpu_memory", 8)
    assert found["fits"] is False and "what to change" in text
    changes = found["changes"]
    assert changes[0]["arguments"] == {"activation_checkpointing": True}
    assert [change["fits"] for change in changes] == [False] * (len(changes) - 1) + [True]
    settings: dict[str, Any] = {}
    for change in changes[-1:] + changes[:1]:
        settings = {}
        for step in changes[: changes.index(change) + 1]:
            settings |= step["arguments"]
        again, _ = inspect(*words, *(word for name, value in settings.items() for word in (f"--{name}", value)))
        assert again["total"] == change["total"] and fits(again["total"], 8) is change["fits"]
    more = found["more_devices"]
    assert more["fits"] and more["arguments"]["zero_stage"] == 3
    again, _ = inspect(*words, "--zero_stage", 3, "--activation_checkpointing", "--devices", more["devices"])
    assert again["total"] == more["total"]


def test_more_devices_are_proposed_with_all_that_is_asked_for(config, inspect):
    words = ["--config_name_or_path", config, "--bf16", "--max_seq_length", 2048, "--activation_checkpointing"]
    words += ["--activation_checkpointing_policy", "products"]
    found, _ = inspect(*words, "--gpu_memory", 8)
    more = found["more_devices"]
    assert more["arguments"] == {"zero_stage": 3, "activation_checkpointing_policy": "full"}
    again, _ = inspect(*words[:-1], "full", "--zero_stage", 3, "--devices", more["devices"])
    assert again["total"] == more["total"]


@pytest.mark.parametrize("number", [0, 1])
def test_the_examples_of_the_docs_are_what_is_printed(number, tmp_path, monkeypatch, capsys):
    page = (runs.ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    example = re.findall(r"\n\n((?:    .*\n|\n)*    qwen3-8b \(8.19(?:.*\n|\n)(?:    .*\n|\n)*)", page)[number]
    memory.config_of(memory.SHAPES["Qwen/Qwen3-8B"]).save_pretrained(tmp_path / "qwen3-8b")
    monkeypatch.chdir(tmp_path)
    words = "--config_name_or_path qwen3-8b --bf16 --max_seq_length 4096 --gpu_memory 80".split()
    words += (
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 2".split(),
        "--train_mode lora --activation_checkpointing --per_device_train_batch_size 1 --gradient_accumulation_steps 8".split(),
    )[number]
    assert main(["inspect", "--memory", *words]) == 0
    printed = capsys.readouterr().out
    assert [line.strip() for line in printed.splitlines() if line] == [
        line.strip() for line in example.splitlines() if line
    ]


def test_small_models_are_told_in_mib_and_what_to_name_is_said(tmp_path, inspect):
    small = tiny.save_tiny(tmp_path / "small")
    _, text = inspect("--model", small, "--bf16", "--max_seq_length", 64)
    assert "MiB on each device" in text and "--gpu_memory with the GiB" in text
    assert re.search(r"\([\d,]+ parameters\)", text)
    _, text = inspect("--model", small, "--bf16", "--max_seq_length", 64, "--gpu_memory", 8)
    assert "--gpu_memory with" not in text


def test_advised_files_are_counted_with_their_own_buckets(config):
    """What the advice says of a ready file is what the command says once it is named."""
    shared = {"config_name_or_path": str(config), "bf16": True, "max_seq_length": 256}
    own = {"deepspeed": {"zero_optimization": {"stage": 1}}}
    changes = [*advice._sharding(plan := plan_of({**shared, **own}, 4))]
    changes += [change for _, each in changes for change in advice._offloading(each)]
    assert plan.engine_file and len(changes) == 4
    for arguments, changed in changes:
        named = plan_of({**shared, "deepspeed": str(runs.ROOT / arguments["deepspeed"])}, 4)
        assert estimate(named).total == estimate(changed).total, arguments


def test_what_is_faster_fits_as_well(config, inspect):
    words = [
        "--model",
        config,
        "--bf16",
        "--train_mode",
        "lora",
        "--max_seq_length",
        2048,
        "--activation_checkpointing",
    ]
    words += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 8]
    found, text = inspect(*words, "--gpu_memory", 24)
    assert found["fits"] is True and "faster" in text
    assert {next(iter(change["arguments"])) for change in found["faster"]} == {
        "activation_checkpointing",
        "per_device_train_batch_size",
    }
    for change in found["faster"]:
        assert change["total"] > found["total"] and fits(change["total"], 24)
    batch = found["faster"][-1]["arguments"]
    assert batch["per_device_train_batch_size"] * batch["gradient_accumulation_steps"] == 8
    assert plan_of({"model_name_or_path": config, **batch}).batch.rows == batch["per_device_train_batch_size"]


def test_engines_and_files_are_read(config, tmp_path):
    def plan(devices: int | None = None, **values: Any) -> Any:
        return plan_of({"model_name_or_path": config, "bf16": True, **values}, devices)

    assert (plan(4).engine, plan(4).devices, plan().engine) == ("ddp", 4, "none")
    zero = plan(deepspeed=str(runs.ROOT / "train_args/deepspeed/zero2_offload.json"))
    assert (zero.engine, zero.devices, zero.offload_optimizer, zero.bucket) == ("zero2", 8, True, 200_000_000)
    assert plan(2, zero_stage="3", offload_param="cpu").offload_param is True
    sharded = plan(fsdp="shard_grad_op", fsdp_config={"activation_checkpointing": True})
    assert (sharded.engine, sharded.reshard, sharded.checkpointing) == ("fsdp", False, True)
    assert plan(fsdp=True).reshard is True
    assert plan(fp16=True, bf16=False).precision == "fp16" and plan(bf16=False).precision is None
    assert plan(use_cpu=True).chosen_backend == "segment" and plan().chosen_backend == "flash"
    assert plan(objective="wedlm").chosen_backend == "flex" and plan(bf16=False).chosen_backend == "segment"
    pairs = plan(task_type="dpo", dpo_reference="model", ema_decay=0.9)
    assert pairs.reference and pairs.average == "device" and pairs.batch.objective == "dpo"


def test_gradients_that_fsdp_sends_after_each_micro_batch(config):
    def plan(**values: Any) -> Any:
        return plan_of({"model_name_or_path": config, "bf16": True, "fsdp": True, "max_seq_length": 64, **values})

    sent = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
    steps, rows = {"gradient_accumulation_steps": 4}, {"per_device_train_batch_size": 4}
    long = {"max_seq_length": 1024}  # rows that need more than their gradients, which then stand
    whole, part, at_once = (
        estimate(plan(**values)).moments["forward pass"]["gradients"] for values in (steps, {**steps, **sent}, sent)
    )
    trained = plan().state.trained
    assert (whole, part, at_once) == (4 * trained, round(4 * trained / 8), 0)
    asked = next(change for change in what_to_change(plan(**steps), 0.0) if change.arguments == sent)
    assert asked.learns_the_same
    assert not any("accelerator_config" in change.arguments for change in what_to_change(plan(**steps, **sent), 0.0))
    smaller = next(
        change for change in what_to_change(plan(**rows, **long), 0.0) if rows.keys() <= change.arguments.keys()
    )
    assert sent.items() <= smaller.arguments.items(), "one micro-batch that becomes several keeps no whole gradients"


def test_arguments_of_a_gpu_need_none_here(config):
    def plan(**values: Any) -> Any:
        return plan_of({"model_name_or_path": config, "bf16": True, **values})

    liger = {"use_liger_kernel": True, "liger_kernel_config": {"rope": True}}
    for values in (liger, {"tf32": True}, {"tf32": "true", "ddp_backend": "nccl"}, {"attention_backend": "flex"}):
        assert estimate(plan(**values)).total == estimate(plan()).total
    assert plan(optim="paged_adamw_8bit").optim == "paged_adamw_8bit" and plan(torch_compile=True).devices == 1
    automatic = {"stage": 3, "reduce_bucket_size": "auto", "sub_group_size": 5e8}
    zero = plan(deepspeed={"zero_optimization": automatic, "bf16": {"enabled": "auto"}, "train_batch_size": 64})
    assert (zero.engine, zero.bucket, zero.sub_group) == ("zero3", 0, 5e8)
    every = {"fsdp_version": 2, "fsdp_cpu_offload": True, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "xla": False}
    every |= {"state_dict_type": "FULL_STATE_DICT", "transformer_layer_cls_to_wrap": ["A"], "min_num_params": 0}
    assert plan(fsdp="full_shard auto_wrap", fsdp_config=every).offload_optimizer is True


@pytest.mark.parametrize(
    "values, said",
    [
        ({"optim": "adafactor", "zero_stage": 2}, "optim is adafactor, which would see flat vectors or shards"),
        ({"optim": "paged_adamw_8bit", "fsdp": True}, "choose adamw_torch, adamw_torch_fused, sgd, rmsprop"),
        ({"zero_stage": 2, "fsdp": True}, "choose one of them"),
        ({"zero_stage": 2, "offload_param": "cpu"}, "set zero_stage to 3"),
        ({"offload_optimizer": "cpu"}, "belongs to DeepSpeed"),
        ({"zero_stage": 3, "offload_optimizer": "disk"}, "offload_optimizer is 'disk': it must be one of"),
        ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "the ZeRO stage of deepspeed is 0: choose 1, 2 or 3"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}}}, "bf16.enabled to False"),
        (
            {"fsdp": True, "activation_checkpointing": True, "fsdp_config": {"activation_checkpointing": True}},
            "fsdp_config.activation_checkpointing are both true",
        ),
        ({"fp16": True}, "fp16 and bf16 are both true"),
        ({"fp16": True, "bf16": False, "use_cpu": True}, "use_cpu is true"),
        ({"use_liger_kernel": True, "use_cpu": True}, "which needs a GPU"),
        ({"use_liger_kernel": True, "torch_compile": True}, "choose one"),
        ({"use_liger_kernel": True, "liger_kernel_config": {"cross_entropy": True}}, "asks for cross_entropy"),
        ({"tf32": "maybe"}, "tf32 is 'maybe': it must be true or false"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args has 'momentum': write name=value"),
    ],
)
def test_what_training_refuses_is_refused_with_its_words(config, values: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        _ = plan_of({"model_name_or_path": config, "bf16": True, **values}).state


def test_optimizers_are_counted_under_engines_and_no_engine_is_proposed_for_others(config, inspect):
    def plan(devices: int | None = None, **values: Any) -> Any:
        return plan_of({"model_name_or_path": config, "bf16": True, "max_seq_length": 256, **values}, devices)

    adam, plain = (estimate(plan(zero_stage=2, optim=optim)) for optim in ("adamw_torch_fused", "sgd"))
    assert adam.parts["optimizer"] == 3 * plain.parts["optimizer"] > 0
    _, text = inspect("--model", config, "--max_seq_length", 256, "--optim", "grokadamw")
    assert "optim grokadamw is counted as AdamW" in text
    assert on_more_devices(plan(optim="grokadamw"), 5) is None is not on_more_devices(plan(), 5)
    assert list(advice._sharding(plan(4, optim="adafactor"))) == [] != list(advice._sharding(plan(4)))


@pytest.mark.parametrize("name", ["qwen3-8b-wedlm-pretrain", "llama3-8b-dpo-qlora"])
def test_a_ready_file_with_a_shape_in_the_place_of_its_model(name: str, config, inspect):
    file = runs.ROOT / "train_args" / f"{name}.json"
    found, text = inspect("--train_args_file", file, "--config_name_or_path", config)
    assert found["total"] > 0 and ("ZeRO-2 x 8" in text) is (name == "qwen3-8b-wedlm-pretrain")
    smaller, _ = inspect(file, "--config_name_or_path", config, "--config_overrides", '{"num_hidden_layers": 2}')
    assert smaller["total"] < found["total"]


def test_every_ready_file_can_be_planned():
    for path in memory.ready_files():
        values = json.loads(path.read_text(encoding="utf-8"))
        name = values["model_name_or_path"]
        shape = memory.config_of(memory.SHAPES[memory.ALIKE.get(name, name)])
        plan = plan_of(values, config=shape)
        assert plan.checkpointing is (path.stem != "pythia-410m-sft-full")


def test_shapes_that_cannot_be_and_a_single_layer(config, inspect):
    for sizes, said in (
        ({"num_key_value_heads": 0}, "no qwen3 model can be built from the config"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0 in the model's config: it must be 1 or more"),
    ):
        shape = {"config_name_or_path": config, "config_overrides": sizes}
        with pytest.raises(ValueError, match=said):
            _ = plan_of(shape).state
    one = ["--config_name_or_path", config, "--max_seq_length", 64, "--config_overrides"]
    few, more = (inspect(*one, json.dumps({"num_hidden_layers": layers}))[0]["total"] for layers in (1, 2))
    assert 0 < few < more


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "name a run with --train_args_file, or a model with --model"),
        (["--model", "M", "--devices", "0"], "--devices is 0: it must be 1 or more"),
        (["--model", "M", "--gpu_memory", "-1"], "--gpu_memory is -1: it must be a number of GiB above 0"),
        (["--model", "M", "--gpu_memory", "nan"], "--gpu_memory is nan"),
        (["--model", "./nowhere"], "does not exist"),
        (["--model", "some/model"], "--config_name_or_path"),
        (["--model", "M", "--max_seq_lenth", "5"], "did you mean max_seq_length?"),
        (["--model", "M", "--config_overrides", "{}"], "name it with --config_name_or_path"),
        (["--model", "M", "--zero_stage", "4"], "zero_stage is '4': it must be one of 1, 2, 3"),
        (["--model", "M", "--json", "a.txt"], "json"),
        (["--masks", "--model", "M"], "give one of them"),
    ],
)  # fmt: skip
def test_bad_input_says_the_way_out(words: list[str], said: str, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["inspect", "--memory", *words]) != 0
    assert said in capsys.readouterr().err


def test_help_names_the_mode(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    assert "--memory" in capsys.readouterr().out
