"""What ``accelerate launch`` was told, as arguments. ``torchrun`` and ``deepspeed`` tell a script nothing but its rank.

accelerate hands its settings over in the environment, where Trainer would take some of them without a look at the arguments.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

_LAUNCHED = dict(os.environ)  # accelerate writes into it later
_OFF = ("", "false", "no", "none", "auto")


def from_launcher(
    values: Mapping[str, Any], environment: Mapping[str, str] = _LAUNCHED
) -> tuple[dict[str, Any], list[str], list[str]]:
    """(arguments, notes, problems).

    Args:
        values: the arguments that were given, which must not say otherwise.
        environment: as the process was started with.
    """
    found: dict[str, Any] = {}
    asked = {key: value for key, value in environment.items() if value.lower() not in _OFF}
    if "ACCELERATE_USE_CPU" in asked:
        found["use_cpu"] = True
    if (precision := asked.get("ACCELERATE_MIXED_PRECISION")) in ("bf16", "fp16"):
        found[precision] = True
    if "ACCELERATE_USE_DEEPSPEED" in asked:
        found |= _launched_deepspeed(asked)
    if "ACCELERATE_USE_FSDP" in asked:
        found |= {"fsdp": True, "fsdp_config": _launched_fsdp(asked)}
    notes, problems = _limits(asked, environment)
    for name in list(found):
        said = values.get(name)
        if said is None:
            notes.append(f"accelerate launch asks for {name} {found[name]!r}")
        elif said == found[name]:
            del found[name]
        elif name in ("fsdp_config", "fsdp"):
            del found[name]
            notes.append(f"{name} is the run's own, not that of accelerate launch")
        else:
            problems.append(f"{name} is {said!r}, and accelerate launch says {found.pop(name)!r}: say it in one place")
    return found, notes, problems


def _launched_deepspeed(asked: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if file := asked.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        return {"deepspeed": file}
    found["zero_stage"] = int(asked.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
    for name, word in (("offload_optimizer", "OPTIMIZER"), ("offload_param", "PARAM")):
        if device := asked.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{word}_DEVICE"):
            found[name] = device
        if device == "nvme" and (path := asked.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{word}_NVME_PATH")):
            found["nvme_path"] = path
    if steps := asked.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        found["gradient_accumulation_steps"] = int(steps)
    if clipping := asked.get("ACCELERATE_GRADIENT_CLIPPING"):
        found["max_grad_norm"] = float(clipping)
    return found


def _launched_fsdp(asked: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "version": int(asked.get("FSDP_VERSION", 1)),
        "cpu_offload": "FSDP_OFFLOAD_PARAMS" in asked,
        "reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD" in asked,
    }
    if layers := asked.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        found["transformer_layer_cls_to_wrap"] = [layer.strip() for layer in layers.split(",")]
    if "FSDP_ACTIVATION_CHECKPOINTING" in asked:
        found["activation_checkpointing"] = True
    return found


def _limits(asked: Mapping[str, str], environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(notes, problems) for what it says and we do not do."""
    notes, problems = [], []
    if (precision := asked.get("ACCELERATE_MIXED_PRECISION", "bf16")) not in ("bf16", "fp16"):
        problems.append(f"accelerate launch asks for mixed_precision {precision}: choose no, bf16 or fp16")
    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if f"ACCELERATE_USE_{name}" in asked:
            problems.append(f"accelerate launch asks for {name.lower()}, which is not supported: leave it out")
    if "ACCELERATE_USE_CPU" in asked and "MASTER_PORT" in environment and "RANK" not in environment:
        notes.append(
            "accelerate launch --cpu starts one process, whatever num_processes says: use --multi_gpu, or torchrun"
        )
    if "ACCELERATE_USE_FSDP" in asked and "FSDP_CPU_RAM_EFFICIENT_LOADING" in asked:
        notes.append(
            "fsdp_cpu_ram_efficient_loading is left out: weights are read by every process, max_loading_processes at a time"
        )
    return notes, problems
