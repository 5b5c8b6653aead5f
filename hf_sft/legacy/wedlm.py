"""Keys of Tencent's training code for WeDLM."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hf_sft.arguments import WeDLMArguments
from hf_sft.legacy.rules import DROP, Gone, Old, Only, Values, asks, flag, is_none, typed, unless_none

_OFF = Gone("use_deepspeed is false")
_FILE = Gone("the file of deepspeed says it")
_BUCKETS = "DeepSpeed's own value is used; a file given with deepspeed can set another"


def objective(values: Values) -> list[str]:
    """The keys that make a file one of Tencent's: those of WeDLM beside old names; empty where it is none, or says its objective.

    That code has one objective, and its files do not name it.
    """
    own = [entry.name for entry in fields(WeDLMArguments) if entry.name in values]
    old = [key for key in ("model_path", "train_data", *WEDLM) if key in values]
    return own if own and old and "objective" not in values else []


def _sharded(value: Any, values: Values) -> Any:
    """What counts only where DeepSpeed is on, and no file has the last word; None where ``value`` counts."""
    if "use_deepspeed" in values and not flag(values["use_deepspeed"]):
        return _OFF
    return _FILE if asks(values, "deepspeed_config_file") else None


def _stage(value: Any, values: Values) -> Any:
    gone = _sharded(value, values)
    return gone or (DROP if is_none(value) else value)


def _use_deepspeed(value: Any, values: Values) -> Any:
    """Stage 2 is the default of that code."""
    if not flag(value) or asks(values, "deepspeed_zero_stage", "deepspeed_config_file", "zero_stage", "deepspeed"):
        return Gone("deepspeed_zero_stage says it" if flag(value) else "zero_stage asks for DeepSpeed")
    return 2


def _place(value: Any, values: Values) -> Any:
    if gone := _sharded(value, values):
        return gone
    if not flag(value):
        return DROP
    return "nvme" if "deepspeed_offload_nvme" in values and flag(values["deepspeed_offload_nvme"]) else "cpu"


def _place_of_parameters(value: Any, values: Values) -> Any:
    stage = values.get("deepspeed_zero_stage", values.get("zero_stage", 2))
    if flag(value) and typed(stage, int) != 3 and _sharded(value, values) is None:
        return Gone("parameters are sharded by stage 3 alone")
    return _place(value, values)


def _nvme(value: Any, values: Values) -> Any:
    if gone := _sharded(value, values):
        return gone
    used = "deepspeed_offload_nvme" in values and flag(values["deepspeed_offload_nvme"])
    return value if used else Gone("nothing is offloaded to NVMe")


def _file(value: Any, values: Values) -> Any:
    off = "use_deepspeed" in values and not flag(values["use_deepspeed"])
    return _OFF if off and not is_none(value) else unless_none(value)


WEDLM: dict[str, Old] = {
    "mask_eps": Old(
        None, note="no mask is drawn with a ratio of 0 (mask_sampling: reference has the arithmetic of Tencent's code)"
    ),
    "is_mask_im_end": Old(
        None,
        Only(
            ("true", "1", "yes"),
            "the end of a turn is learned, and masked, like every token of the answer, or the model would not stop; "
            "num_learnable_im_end: 0 leaves out the ends behind it",
        ),
        "the end of a turn is always learned, and masked, like every token of the answer",
    ),
    "log_loss_for_debug": Old(None, note="masked and next-token losses are always logged apart"),
    "use_deepspeed": Old("zero_stage", seeing=_use_deepspeed, doc="stage 2, where none is named"),
    "deepspeed_zero_stage": Old("zero_stage", seeing=_stage),
    "deepspeed_offload_optimizer": Old("offload_optimizer", seeing=_place, doc="cpu, or nvme with deepspeed_offload_nvme"),
    "deepspeed_offload_param": Old(
        "offload_param", seeing=_place_of_parameters, doc="cpu, or nvme with deepspeed_offload_nvme; stage 3 alone"
    ),
    "deepspeed_offload_nvme": Old(None, note="offload_optimizer and offload_param say it"),
    "deepspeed_nvme_path": Old("nvme_path", seeing=_nvme),
    "deepspeed_config_file": Old("deepspeed", seeing=_file),
    **dict.fromkeys(
        ("deepspeed_pin_memory", "deepspeed_overlap_comm", "deepspeed_contiguous_gradients", "deepspeed_reduce_bucket_size",
         "deepspeed_stage3_prefetch_bucket_size", "deepspeed_stage3_param_persistence_threshold",
         "deepspeed_stage3_max_live_parameters", "deepspeed_stage3_max_reuse_distance"),
        Old(None, note=_BUCKETS),
    ),
}  # fmt: skip
