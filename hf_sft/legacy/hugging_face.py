"""Keys that transformers 5 (and late 4) removed or renamed."""

from __future__ import annotations

from typing import Any

from hf_sft.legacy.rules import (
    DROP,
    NONE,
    Gone,
    Old,
    Only,
    Several,
    Values,
    choice,
    flag,
    same_key,
    typed,
    unless_none,
    when,
)

FSDP = "layers are sharded as the model groups them; leave it out (fsdp_config can name layers)"
ATTENTION = "attention is chosen by attention_backend (auto, flash, segment, dense, flex or magi); leave it out"
_ENGINE = "the engine behind it is gone from transformers; leave it out"
_AUTOCAST = "mixed precision is torch.autocast"
_FLOORS = ("min_lr", "min_lr_rate", "min_lr_ratio", "lrf")


def _warmup_ratio(value: Any) -> Any:
    ratio = typed(value, float)
    if not 0 <= ratio < 1:
        raise ValueError("a share of all steps lies in [0, 1); from 1 on, warmup_steps counts steps")
    return ratio


def _checkpointing(value: Any) -> Any:
    """A flag; or an object of a trainer that chose between two implementations."""
    if not isinstance(value, dict):
        return value
    same_key(("activate", "checkpoint_type"), value, "gradient_checkpointing")
    return flag(value.get("activate", True))


def _floor(value: Any, key: str, values: Values) -> Any:
    """A learning rate that does not fall to 0 belongs to one kind of schedule here."""
    schedule = str(values.get("lr_scheduler_type", values.get("lr_scheduler", "none"))).lower()
    if value is None or (typed(value, float) == 0 and schedule != "cosine_with_min_lr"):
        return DROP
    if schedule not in ("cosine", "cosine_with_min_lr"):
        raise ValueError(
            f"it belongs to a cosine schedule, and lr_scheduler_type is {schedule}: set that to cosine, or leave {key} out"
        )
    kwargs = {key: typed(value, float)}
    new = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": kwargs}
    return Several(new, over=("lr_scheduler_type",))


def _schedule(value: Any, values: Values) -> Any:
    """Under a floor of the learning rate, the floor's rule names the schedule."""
    floored = any(key in values and values[key] is not None and typed(values[key], float) for key in _FLOORS)
    return Gone("the floor of the learning rate names the schedule") if floored else value


def schedule_key() -> Old:
    """A key that names the schedule."""
    return Old("lr_scheduler_type", seeing=_schedule)


HUGGING_FACE: dict[str, Old] = {
    "evaluation_strategy": Old("eval_strategy"),
    "warmup_ratio": Old("warmup_steps", _warmup_ratio, "below 1 it is a share of all steps"),
    "overwrite_output_dir": Old(
        None, note="a folder that holds another run is never overwritten: choose another output_dir, or resume"
    ),
    "logging_dir": Old(None, note="TensorBoard's folder is set by the environment variable TENSORBOARD_LOGGING_DIR"),
    "no_cuda": Old("use_cpu"),
    "use_mps_device": Old(None, note="the device is found by itself; use_cpu keeps off it"),
    "save_safetensors": Old(
        None, Only(("true", "1", "yes"), "weights are saved as safetensors only"), "weights are always safetensors"
    ),
    "group_by_length": Old("train_sampling_strategy", when("group_by_length")),
    "fsdp_min_num_params": Old(None, Only(NONE, FSDP)),
    "fsdp_transformer_layer_cls_to_wrap": Old(
        "fsdp_config",
        lambda value: {"transformer_layer_cls_to_wrap": value.split(",") if isinstance(value, str) else value},
    ),
    "gradient_checkpointing": Old(
        "activation_checkpointing", _checkpointing, doc="of an object {activate, checkpoint_type}, activate counts"
    ),
    "gradient_checkpointing_kwargs": Old("activation_checkpointing_kwargs"),
    "per_gpu_train_batch_size": Old("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Old("per_device_eval_batch_size"),
    "adafactor": Old("optim", when("adafactor")),
    "include_inputs_for_metrics": Old("include_for_metrics", when(["inputs"])),
    "include_tokens_per_second": Old(None, note="tokens per second are always logged"),
    "push_to_hub_model_id": Old("hub_model_id"),
    "push_to_hub_token": Old("hub_token", note="it stays out of every file and log"),
    "torchdynamo": Old("torch_compile_backend"),
    "dispatch_batches": Old("accelerator_config", lambda value: {"dispatch_batches": flag(value)}),
    "split_batches": Old("accelerator_config", lambda value: {"split_batches": flag(value)}),
    "xpu_backend": Old("ddp_backend"),
    "past_index": Old(None, Only(("-1", "none", "null"), "no model here returns a past to feed back; leave it out")),
    **dict.fromkeys(("half_precision_backend", "fp16_backend", "fp16_opt_level"), Old(None, note=_AUTOCAST)),
    "use_ipex": Old(None, Only(NONE, _ENGINE)),
    "jit_mode_eval": Old(None, Only(NONE, _ENGINE)),
    "sharded_ddp": Old(None, Only(NONE, "fairscale's sharding is gone; use fsdp or zero_stage")),
    "mp_parameters": Old(None, Only(NONE, _ENGINE)),
    "tpu_num_cores": Old(None, Only(NONE, _ENGINE)),
    "ray_scope": Old(None, note="hyperparameter search is not part of this project"),
    "torch_dtype": Old("dtype", choice({"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"})),
    **dict.fromkeys(("tokenizer", "tokenizer_name", "tokenizer_path"), Old("tokenizer_name_or_path", unless_none)),
    "attn_implementation": Old(None, Only((*NONE, "auto"), ATTENTION)),
    "min_lr": Old(
        "lr_scheduler_kwargs",
        seeing=lambda value, values: _floor(value, "min_lr", values),
        note="the learning rate falls to it on a cosine",
        also=("lr_scheduler_type",),
    ),
    **dict.fromkeys(
        ("min_lr_rate", "min_lr_ratio"),
        Old(
            "lr_scheduler_kwargs",
            seeing=lambda value, values: _floor(value, "min_lr_rate", values),
            note="the learning rate falls to this share of it on a cosine",
            also=("lr_scheduler_type",),
        ),
    ),
}
