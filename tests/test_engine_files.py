"""Engine files: the ready ones of train_args, and those that people bring: taken, or refused with both values."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hf_sft import training_arguments
from hf_sft.parsing import Arguments, ArgumentsError, parse_values

ROOT = Path(__file__).resolve().parents[1]
DEEPSPEED = sorted((ROOT / "train_args" / "deepspeed").glob("*.json"))
FSDP = sorted((ROOT / "train_args" / "fsdp").glob("*.json"))
MINIMUM = {"train_file": "t.jsonl", "model_name_or_path": "m", "use_cpu": True}


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch):
    """These tests read settings: no process group, and transformers' variables go again."""
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(training_arguments, "enter_process_group", lambda training: None)
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def parse(**values: Any) -> Arguments:
    return parse_values({**MINIMUM, **values})


def problems_of(**values: Any) -> str:
    with pytest.raises(ArgumentsError) as error:
        parse(**values)
    return str(error.value)


# --- ready files ------------------------------------------------------------------------------------------------------


def test_the_ready_files_are_there():
    names = ["zero1", "zero2", "zero2_offload", "zero3", "zero3_nvme", "zero3_offload"]
    assert [path.stem for path in DEEPSPEED] == names
    assert [path.stem for path in FSDP] == ["full_shard", "full_shard_offload", "shard_grad_op"]


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_ready_deepspeed_files_leave_every_decision_to_the_arguments(path):
    written = json.loads(path.read_text())
    assert not {"optimizer", "scheduler"} & written.keys()
    nvme = {"nvme_path": "disk"} if path.stem == "zero3_nvme" else {}
    arguments = parse(deepspeed=str(path), max_grad_norm=0.5, bf16=True, **nvme)
    assert arguments.notes == []
    used = arguments.training.hf_deepspeed_config.config
    assert (used["gradient_clipping"], used["bf16"]["enabled"], used["fp16"]["enabled"]) == (0.5, True, False)
    assert (used["train_micro_batch_size_per_gpu"], used["gradient_accumulation_steps"]) == (8, 1)
    zero = used["zero_optimization"]
    assert zero["stage"] == int(path.stem[4])
    offloaded = {name for name in ("offload_optimizer", "offload_param") if name in zero}
    assert len(offloaded) == {"offload": zero["stage"] - 1, "nvme": 2}.get(path.stem.partition("_")[2], 0)
    assert all(zero[name].get("nvme_path") == nvme.get("nvme_path") for name in offloaded)


@pytest.mark.parametrize("path", FSDP, ids=lambda path: path.stem)
def test_ready_fsdp_files_are_fsdp2(path):
    arguments = parse(fsdp=True, fsdp_config=str(path))
    used = arguments.training.fsdp_config
    assert (int(used["version"]), used["reshard_after_forward"]) == (2, path.stem != "shard_grad_op")
    assert used.get("cpu_offload", False) == path.stem.endswith("offload")


def test_nvme_needs_one_folder():
    file = str(ROOT / "train_args" / "deepspeed" / "zero3_nvme.json")
    assert "set nvme_path to a folder" in problems_of(deepspeed=file)
    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/a"}}}
    told = problems_of(deepspeed=config, nvme_path="/b")
    assert "nvme_path is '/b', and the deepspeed file says '/a'" in told


# --- files that people bring ------------------------------------------------------------------------------------------

ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
WARMUP_DECAY = {"type": "WarmupDecayLR", "params": {**WARMUP["params"], "total_num_steps": "auto"}}
BATCH = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
SCALING = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
QWEN_ZERO2 = {
    "fp16": {"enabled": "auto", **SCALING},
    "bf16": {"enabled": "auto"},
    "optimizer": ADAMW,
    "scheduler": WARMUP,
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    **BATCH,
    "steps_per_print": 100,
    "wall_clock_breakdown": False,
}
QWEN_ZERO3 = {
    **QWEN_ZERO2,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": {"device": "none", "pin_memory": True},
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
LLAMA_FACTORY_Z2 = {
    **BATCH,
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", **SCALING},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
        "round_robin_gradients": True,
    },
}
AXOLOTL_ZERO3_BF16 = {
    **BATCH,
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 0,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": True},
    "wall_clock_breakdown": False,
}
AXOLOTL_ZERO1 = {
    **BATCH,
    "zero_optimization": {"stage": 1, "overlap_comm": True},
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "auto_cast": False, **SCALING},
    "wall_clock_breakdown": False,
}
SAID_TWICE = "the {section} section of the deepspeed file says what the arguments say: theirs is used"
CONSTANT = {"lr_scheduler_type": "constant_with_warmup"}


def with_value(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """``config`` with new values at dotted paths, whose dots are written as two underscores."""
    changed = json.loads(json.dumps(config))
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = changed
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return changed


@pytest.mark.parametrize(
    "config, values, removed",
    [
        (QWEN_ZERO2, CONSTANT, ["optimizer", "scheduler"]),
        (QWEN_ZERO3, {**CONSTANT, "bf16": True}, ["optimizer", "scheduler"]),
        ({**QWEN_ZERO2, "scheduler": WARMUP_DECAY}, {"lr_scheduler_type": "linear"}, ["optimizer", "scheduler"]),
        (LLAMA_FACTORY_Z2, {}, []),
        (AXOLOTL_ZERO1, {}, []),
        (AXOLOTL_ZERO3_BF16, {"bf16": True}, []),
        (with_value(QWEN_ZERO2, optimizer__params__lr=1e-4), {**CONSTANT, "learning_rate": 1e-4}, ["optimizer", "scheduler"]),
        (with_value(LLAMA_FACTORY_Z2, gradient_clipping=0.3, train_micro_batch_size_per_gpu=2),
         {"max_grad_norm": 0.3, "per_device_train_batch_size": 2}, []),
    ],
    ids=["qwen2", "qwen3", "linear", "llama_factory", "axolotl1", "axolotl3_bf16", "same_lr", "same_batch"],
)  # fmt: skip
def test_files_that_agree_are_taken(config, values, removed):
    arguments = parse(deepspeed=config, **values)
    assert arguments.notes == [SAID_TWICE.format(section=section) for section in removed]
    used = arguments.training.hf_deepspeed_config.config
    assert not {"optimizer", "scheduler"} & used.keys()
    assert used["zero_optimization"]["stage"] == config["zero_optimization"]["stage"]
    assert used["bf16"]["enabled"] is bool(values.get("bf16"))


@pytest.mark.parametrize(
    "config, values, theirs, ours",
    [
        (QWEN_ZERO2, {"lr_scheduler_type": "cosine"}, "scheduler.type to 'WarmupLR", "lr_scheduler_type is 'cosine'"),
        (with_value(QWEN_ZERO2, optimizer__params__lr=1e-4), {**CONSTANT, "learning_rate": 2e-5}, "optimizer.params.lr to 0.0001",
         "learning_rate is 2e-05"),
        (with_value(QWEN_ZERO2, optimizer__type="Lamb"), CONSTANT, "optimizer.type to 'Lamb'", "optim is 'adamw_torch"),
        (with_value(QWEN_ZERO2, scheduler__params__warmup_num_steps=100), {**CONSTANT, "warmup_steps": 10},
         "scheduler.params.warmup_num_steps to 100", "warmup_steps is 10"),
        (with_value(LLAMA_FACTORY_Z2, gradient_clipping=0.3), {}, "gradient_clipping to 0.3", "max_grad_norm is 1.0"),
        (with_value(LLAMA_FACTORY_Z2, train_batch_size=64), {}, "train_batch_size to 64",
         "processes x per_device_train_batch_size x gradient_accumulation_steps is 8"),
        (AXOLOTL_ZERO3_BF16, {}, "bf16.enabled to True", "bf16 is False"),
    ],
    ids=["scheduler", "lr", "optimizer", "warmup", "clipping", "batch", "bf16"],
)  # fmt: skip
def test_files_that_contradict_are_refused_with_both_values(config, values, theirs, ours):
    told = problems_of(deepspeed=config, **values)
    assert theirs in told
    assert ours in told


def test_files_with_another_parallelism_or_fsdp1_are_refused():
    assert "sequence_parallel_size" in problems_of(deepspeed={**LLAMA_FACTORY_Z2, "sequence_parallel_size": 2})
    told = problems_of(fsdp="full_shard auto_wrap", fsdp_config={"fsdp_version": 1})
    assert "only FSDP2 is supported" in told
    taken = parse(fsdp="full_shard auto_wrap", fsdp_config={"fsdp_transformer_layer_cls_to_wrap": "Qwen3DecoderLayer"})
    assert taken.training.fsdp_config["transformer_layer_cls_to_wrap"] == ["Qwen3DecoderLayer"]
