"""DeepSpeed ZeRO and FSDP2: their settings, checked against the arguments; and both on CPUs.

Importing this module imports neither torch nor DeepSpeed.

accelerate leaves distributed engines out where it sees no GPU. ``enter_process_group`` brings the process group up beforehand,
on gloo, and hands accelerate a finished state: so everything that shards weights over GPUs also runs, and is tested, on CPUs.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Protocol

from hf_sft.arguments import EngineArguments

# What a section of a DeepSpeed file asks for, in our words.
_SCHEDULERS = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_ADAM = ("Adam", "AdamW")
_OTHER_PARALLELISM = ("tensor_parallel", "pipeline", "sequence_parallel_size")
_OTHER_WORK = (
    "amp.enabled",
    "compression_training",
    "progressive_layer_drop.enabled",
    "data_efficiency",
    "curriculum_learning",
)
_OF_THE_ARGUMENTS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
)  # fmt: skip
# Others look at the shape of a tensor, and see flat vectors (ZeRO) or shards (FSDP2) instead.
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
_FSDP_KEYS = frozenset(
    """
    version reshard_after_forward cpu_offload auto_wrap_policy transformer_layer_cls_to_wrap min_num_params state_dict_type
    activation_checkpointing cpu_ram_efficient_loading xla xla_fsdp_v2 xla_fsdp_grad_ckpt
    """.split()
)
_SECTIONS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")
# https://www.deepspeed.ai/docs/config-json/ and the names that deepspeed/runtime/constants.py reads.
_KNOWN_SECTIONS = frozenset(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler communication_data_type
    seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor sparse_gradients fp16 bf16 amp
    torch_autocast gradient_clipping zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    steps_per_print wall_clock_breakdown dump_state flops_profiler activation_checkpointing sparse_attention data_types
    aio comms_logger checkpoint tensorboard wandb csv_monitor comet memory_breakdown dataloader_drop_last
    load_universal_checkpoint legacy_fusion disable_python_gc gradient_allreduce_op managed_gradient_accumulation
    graph_harvesting use_data_before_expert_parallelism timers compile disable_allgather elasticity autotuning
    compression_training data_efficiency curriculum_learning tensor_parallel pipeline sequence_parallel_size hybrid_engine
    weight_quantization progressive_layer_drop eigenvalue nebula use_node_local_storage
    """.split()
)
_OFFLOADS = ("offload_optimizer", "offload_param")


class Settings(Protocol):
    """The training arguments that are read here."""

    deepspeed: Any
    fsdp: Any
    fsdp_config: Any
    use_cpu: bool
    accelerator_config: Any
    ddp_backend: Any
    ddp_timeout: int


# ---- DeepSpeed ----


def engine_settings(engine: EngineArguments, training: Any, notes: list[str]) -> dict[str, Any]:
    """The fields ``deepspeed``, ``fsdp`` and ``fsdp_config`` of TrainingArguments, where there is anything to set.

    Args:
        training: has the fields of TrainingArguments, as given.
        notes: gets a line for what was taken out of a file.

    Raises:
        ValueError: as the functions below.
    """
    found: dict[str, Any] = {}
    if (config := deepspeed_config(engine, training.deepspeed)) is not None:
        found["deepspeed"], more = settle_deepspeed(config, training)
        notes += more
    fsdp, fsdp_config = settle_fsdp(training.fsdp, training.fsdp_config)
    if (found or fsdp) and (problems := [*optimizer_problem(training)]):
        raise ValueError(problems[0])
    return found if not fsdp else {**found, "fsdp": fsdp, "fsdp_config": fsdp_config}


def deepspeed_config(engine: EngineArguments, given: str | Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The DeepSpeed settings that a file (or a mapping) and the keys of ``engine`` ask for; None if neither does.

    Raises:
        ValueError: the file cannot be read, or says otherwise than a key.
    """
    if given is None and engine.zero_stage is None:
        return None
    config = read_settings(given, "deepspeed") if given is not None else {}
    if problems := [*_shape_problems(config)]:
        raise ValueError("; ".join(problems))
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", engine.zero_stage or 0)
    if engine.zero_stage is not None and stage != engine.zero_stage:
        raise ValueError(f"zero_stage is {engine.zero_stage}, and the deepspeed file says {stage}: say it in one place")
    for name in _OFFLOADS:
        wanted = getattr(engine, name)
        if wanted is None:
            continue
        section = zero.setdefault(name, {"device": wanted})
        if section.get("device", "none") != wanted:
            raise ValueError(
                f"{name} is {wanted!r}, and the deepspeed file says {section.get('device')!r}: say it in one place"
            )
    for name in _OFFLOADS:
        section = zero.get(name) or {}
        if section.get("device") != "nvme":
            continue
        if section.setdefault("nvme_path", engine.nvme_path) is None:
            raise ValueError(
                f"the deepspeed file offloads to nvme ({name}): set nvme_path to a folder on a local NVMe disk"
            )
        if engine.nvme_path not in (None, section["nvme_path"]):
            raise ValueError(
                f"nvme_path is {engine.nvme_path!r}, and the deepspeed file says {section['nvme_path']!r}: say it in one place"
            )
    return config


def _shape_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Sections that are no objects, and names that DeepSpeed does not know."""
    zero, optimizer, scheduler = (config.get(name) for name in ("zero_optimization", "optimizer", "scheduler"))
    places: list[tuple[str, Any]] = [(name, config[name]) for name in _SECTIONS if name in config]
    places += [
        (f"zero_optimization.{name}", zero[name]) for name in _OFFLOADS if isinstance(zero, Mapping) and name in zero
    ]
    for name, section in (("optimizer", optimizer), ("scheduler", scheduler)):
        if isinstance(section, Mapping):
            places.append((f"{name}.params", section.get("params", {})))
            if not isinstance(section.get("type"), str):
                yield f"the deepspeed file sets {name}.type to {section.get('type')!r}: it must be a name"
    for name, value in places:
        if not isinstance(value, Mapping):
            yield f"the deepspeed file sets {name} to {value!r}: it must be an object"
    for name in config:
        if name not in _KNOWN_SECTIONS:
            close = difflib.get_close_matches(str(name), _KNOWN_SECTIONS, 1)
            meant = f"did you mean {close[0]}?" if close else "leave it out"
            yield f"the deepspeed file has {name}, which is no setting of DeepSpeed: {meant}"


def settle_deepspeed(config: Mapping[str, Any], training: Any) -> tuple[dict[str, Any], list[str]]:
    """``config`` as the run uses it: gaps filled by the training arguments, sections that repeat them taken out.

    The optimizer and the schedule are always the Trainer's: DeepSpeed's optimizer section puts weight decay on norms and biases
    as well, and its scheduler would take the place of lr_scheduler_type.

    Args:
        training: has the fields of TrainingArguments.

    Returns:
        (settings, notes).

    Raises:
        ValueError: everything in which the file contradicts the arguments, with both values.
    """
    settled: dict[str, Any] = copy.deepcopy(dict(config))
    notes: list[str] = []
    problems = [*_batch_problems(settled, training), *_unsupported(settled)]
    for section, check in (("optimizer", _optimizer_problems), ("scheduler", _scheduler_problems)):
        if (asked := settled.pop(section, None)) is not None:
            found = [*check(asked, training)]
            problems += found
            if not found:
                notes.append(f"the {section} section of the deepspeed file says what the arguments say: theirs is used")
    if problems:
        raise ValueError("; ".join(problems))
    settled |= dict.fromkeys(_OF_THE_ARGUMENTS, "auto")
    for name in ("bf16", "fp16"):
        settled.setdefault(name, {}).setdefault("enabled", "auto")
    settled["zero_allow_untested_optimizer"] = True
    settled["zero_force_ds_cpu_optimizer"] = False  # PyTorch's fused AdamW runs on CPUs too, and nothing is compiled
    return settled, notes


def _batch_problems(config: Mapping[str, Any], training: Any) -> Iterator[str]:
    """Batch size, clipping and precision."""
    batch, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    whole = int(os.environ.get("WORLD_SIZE", "1")) * batch * steps
    pairs = (
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size", batch),
        ("gradient_accumulation_steps", "gradient_accumulation_steps", steps),
        ("train_batch_size", "processes x per_device_train_batch_size x gradient_accumulation_steps", whole),
        ("gradient_clipping", "max_grad_norm", training.max_grad_norm),
        ("bf16.enabled", "bf16", bool(training.bf16)),
        ("fp16.enabled", "fp16", bool(training.fp16)),
    )
    for key, ours, value in pairs:
        asked = _at(config, key, "auto")
        if asked not in ("auto", value):
            yield _differs(key, asked, ours, value)


def _optimizer_problems(section: Mapping[str, Any], training: Any) -> Iterator[str]:
    kind, parameters = section.get("type"), section.get("params", {})
    optim = str(getattr(training.optim, "value", training.optim))
    if kind not in _ADAM or not optim.startswith("adamw_torch"):
        yield _differs("optimizer.type", kind, "optim", optim)
        return
    ours = {
        "lr": ("learning_rate", training.learning_rate),
        "betas": ("adam_beta1, adam_beta2", [training.adam_beta1, training.adam_beta2]),
        "eps": ("adam_epsilon", training.adam_epsilon),
        "weight_decay": ("weight_decay", training.weight_decay),
    }
    yield from _parameter_problems("optimizer", parameters, ours, {"torch_adam": None, "adam_w_mode": True})


def _scheduler_problems(section: Mapping[str, Any], training: Any) -> Iterator[str]:
    kind, name = section.get("type"), str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    if _SCHEDULERS.get(str(kind)) != name:
        meaning = f" (here {_SCHEDULERS[kind]})" if kind in _SCHEDULERS else ""
        yield _differs("scheduler.type", f"{kind}{meaning}", "lr_scheduler_type", name)
        return
    ours = {
        "warmup_min_lr": ("the first learning rate", 0),
        "warmup_max_lr": ("learning_rate", training.learning_rate),
        "warmup_num_steps": ("warmup_steps", training.warmup_steps),
        "total_num_steps": ("max_steps", training.max_steps),
    }
    # DeepSpeed's own default is a logarithmic warm-up, but files that say nothing mean the usual one.
    yield from _parameter_problems("scheduler", section.get("params", {}), ours, {"warmup_type": "linear"})


def _parameter_problems(
    section: str, parameters: Mapping[str, Any], ours: Mapping[str, tuple[str, Any]], harmless: Mapping[str, Any]
) -> Iterator[str]:
    for key, asked in parameters.items():
        if asked == "auto" or (key in harmless and harmless[key] in (None, asked)):
            continue
        if key not in ours:
            yield f"the deepspeed file sets {section}.params.{key} to {asked!r}, which no argument says: leave it out"
        elif asked != ours[key][1]:
            yield _differs(f"{section}.params.{key}", asked, *ours[key])


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
    for name in (*_OTHER_PARALLELISM, *_OTHER_WORK):
        if _at(config, name):
            yield (
                f"the deepspeed file has {name}, which is not supported (data-parallel ranks, hf_sft's own data, bf16 and "
                "fp16): leave it out"
            )
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage in (1, 2) and (zero.get("offload_param") or {}).get("device", "none") != "none":
        yield f"the deepspeed file offloads parameters, and its ZeRO stage is {stage}: only stage 3 shards parameters"
    if stage not in (1, 2, 3):
        yield f"the ZeRO stage of deepspeed is {stage!r}: choose 1, 2 or 3 (0 shards nothing: use torchrun alone)"


def optimizer_problem(training: Any) -> Iterator[str]:
    """An optimizer that computes something else on sharded tensors."""
    optim = str(getattr(training.optim, "value", training.optim))
    if optim not in ELEMENTWISE:
        yield (
            f"optim is {optim}, which would see flat vectors or shards instead of whole tensors under DeepSpeed and FSDP: choose "
            f"{', '.join(ELEMENTWISE)}"
        )


def _at(config: Mapping[str, Any], key: str, absent: Any = None) -> Any:
    """The value at ``section.name``."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part, absent) if isinstance(found, Mapping) else absent
    return found


def _differs(theirs: str, asked: Any, ours: str, value: Any) -> str:
    return (
        f"the deepspeed file sets {theirs} to {asked!r}, and {ours} is {value!r}: set it to auto in the file, or make them "
        "equal"
    )


# ---- FSDP ----


def settle_fsdp(fsdp: Any, config: Any) -> tuple[Any, dict[str, Any] | None]:
    """(fsdp, fsdp_config) as the Trainer takes them.

    Raises:
        ValueError: FSDP1, or settings under which weights could not be checked, scored or saved.
    """
    if fsdp in (None, False, "", []):
        if config:
            raise ValueError("fsdp_config is set and fsdp is not: set fsdp to true, or leave fsdp_config out")
        return None, None
    settings = {
        key.removeprefix("fsdp_"): value
        for key, value in (read_settings(config, "fsdp_config") if config else {}).items()
    }
    if unknown := [key for key in settings if key not in _FSDP_KEYS]:
        close = difflib.get_close_matches(unknown[0], _FSDP_KEYS, 1)
        meant = f"did you mean {close[0]}?" if close else f"FSDP2 has {', '.join(sorted(_FSDP_KEYS))}"
        raise ValueError(f"fsdp_config.{unknown[0]} is no setting of FSDP2: {meant}")
    words = fsdp.split() if isinstance(fsdp, str) else list(fsdp) if isinstance(fsdp, (list, tuple)) else []
    strategies = {"full_shard": True, "shard_grad_op": False, "true": None, "auto_wrap": None, "offload": None}
    if unknown := [word for word in words if str(word).lower() not in strategies]:
        raise ValueError(
            f"fsdp is {fsdp!r}: {unknown[0]} is not supported; choose true, full_shard, shard_grad_op, offload, auto_wrap"
        )
    for word in words:
        if (reshard := strategies[str(word).lower()]) is not None:
            said = settings.setdefault("reshard_after_forward", reshard)
            if str(said).lower() != str(reshard).lower():
                raise ValueError(
                    f"fsdp says {word}, and fsdp_config.reshard_after_forward is {said!r}: say it in one place"
                )
        if str(word).lower() == "offload":
            settings.setdefault("cpu_offload", True)
    if settings.setdefault("version", 2) not in (2, "2"):
        raise ValueError(
            f"fsdp_config.version is {settings['version']}: only FSDP2 is supported; set it to 2, or leave it out"
        )
    if str(settings.get("cpu_ram_efficient_loading", False)).lower() == "true":
        raise ValueError(
            "fsdp_config.cpu_ram_efficient_loading is true, and weights that one rank alone has cannot be checked before "
            "training: leave it out, and set max_loading_processes to 1 where the memory of the host is short"
        )
    if settings.get("xla"):
        raise ValueError("fsdp_config.xla is true: TPUs are not supported; leave it out")
    return True, settings


def read_settings(given: str | Mapping[str, Any], what: str) -> dict[str, Any]:
    """A mapping, or the JSON file of one.

    Raises:
        ValueError: no such file, or no JSON object in it.
    """
    if isinstance(given, Mapping):
        return copy.deepcopy(dict(given))
    if str(given).lstrip().startswith("{"):
        text, where = str(given), "the value"
    else:
        where = str(given)
        try:
            with open(given, encoding="utf-8") as file:
                text = file.read()
        except OSError as error:
            raise ValueError(
                f"{what} is {given!r}, which cannot be read ({error.strerror}): name a JSON file"
            ) from None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what}: {where} is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{what}: {where} holds no JSON object")
    return config


# ---- CPUs ----


def enter_process_group(training: Settings) -> None:
    """Bring up what accelerate leaves out: DeepSpeed and FSDP on CPUs (gloo), and DeepSpeed in a process without a launcher.

    Sets ``training.accelerator_config`` so that the finished state is used. Does nothing where accelerate does it all.

    Raises:
        ValueError: DeepSpeed is not installed.
    """
    if training.deepspeed and find_spec("deepspeed") is None:
        raise ValueError('deepspeed is asked for and not installed: pip install "deepspeed>=0.18"')
    if not (training.deepspeed or training.fsdp):
        _enter_plain_group(training)
        return
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # with it, accelerate refuses settings that are not its own
    import torch

    on_cpu = training.use_cpu or not torch.accelerator.is_available()
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
        training.use_cpu = True
        if training.fsdp and training.fsdp_config:
            training.fsdp_config = {**training.fsdp_config, "cpu_offload": False}  # the weights are there already
    if "RANK" not in os.environ:
        _launch_alone()
    if not on_cpu:
        return
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    timeout = timedelta(seconds=training.ddp_timeout)
    AcceleratorState._reset_state(reset_partial_state=True)
    if training.deepspeed:
        # DeepSpeed (0.19) calls collectives by names that torch is about to drop: a warning per call.
        warnings.filterwarnings("ignore", message=".*_tensor.*deprecated.*", category=FutureWarning)
        import deepspeed

        if not torch.distributed.is_initialized():
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, timeout=timeout, verbose=False)
        elif not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    elif not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timeout)
    state = PartialState(cpu=True, backend="gloo")
    state.distributed_type = DistributedType.DEEPSPEED if training.deepspeed else DistributedType.MULTI_GPU
    accelerator = training.accelerator_config
    if accelerator is None or isinstance(accelerator, Mapping):
        training.accelerator_config = {**(accelerator or {}), "use_configured_state": True}
    else:
        accelerator.use_configured_state = True


def _enter_plain_group(training: Settings) -> None:
    """DDP on CPUs: accelerate connects processes there only if it is told to, and transformers passes no timeout on to gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    import torch

    training.use_cpu = training.use_cpu or not torch.accelerator.is_available()
    plain = training.use_cpu and training.ddp_backend in (None, "gloo") and "MASTER_ADDR" in os.environ
    if plain and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=training.ddp_timeout))


def _launch_alone() -> None:
    """What a launcher would have set for one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update({**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
