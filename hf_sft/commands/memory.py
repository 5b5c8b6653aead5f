"""``hf-sft inspect --memory``: what a training needs of each device, and what to change so that it fits."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hf_sft.commands.options import CommandParser

if TYPE_CHECKING:
    from hf_sft.memory.advice import Change
    from hf_sft.memory.plan import Estimate, Plan
    from hf_sft.parsing import Arguments

_OF_AN_ENGINE = ("zero_stage", "offload_optimizer", "offload_param", "nvme_path")
_ENGINE = (*_OF_AN_ENGINE, "deepspeed", "fsdp", "fsdp_config")
# What TrainingArguments refuses without a GPU. fp16 takes as much as bf16; the others change nothing that is counted, but Liger's
# layers keep less than those that are.
_OF_A_GPU = ("fp16", "tf32", "use_liger_kernel", "liger_kernel_config", "ddp_backend")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_GIB = 2**30

logger = logging.getLogger("hf_sft")


def main(words: Sequence[str]) -> int:
    """Print the estimate for a run; returns 0. Raises ValueError for everything that a user can put right."""
    options, rest = _parser().options_and_rest(words)
    if rest and not rest[0].startswith("-") and options.train_args_file is None:
        options.train_args_file = rest.pop(0)  # as train takes it
    _check(options, rest)
    plan = read_plan(options, rest)
    memory, where = _memory(options, plan)

    from hf_sft.memory.plan import estimate

    try:
        found = estimate(plan)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"layers of the sizes in the model's config cannot be run ({said}): correct them") from error
    lines, record = _report(plan, found, memory, where)
    print("\n".join(lines))
    if options.json is not None:
        from hf_sft.data.cache import write_file

        print(f"JSON: {write_file(options.json, json.dumps(record, indent=1))}")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="hf-sft inspect --memory",
        description="Estimate the peak memory of a training on each device, from its arguments and the model's config alone: no "
        "weights and no data are read. If it does not fit: what to change. If it fits: what would be faster within it.",
        epilog="Every argument of hf-sft train may follow, such as --train_mode lora or --max_seq_length 4096. A model that is "
        "not at hand is described by --config_name_or_path (a folder or config.json) and --config_overrides.",
    )
    parser.add_argument("--train_args_file", "--config", help="JSON or YAML file of a run")
    parser.add_argument("--model", help="folder or hub name of a model; its config is read")
    parser.add_argument("--devices", type=int, help="processes; default: 8 with an engine that shards, else 1")
    parser.add_argument(
        "--gpu_memory", type=float, metavar="GIB", help="of a device; default: that of the GPU here, if any"
    )
    parser.add_argument("--json", help="write everything as JSON to this file (.json)")
    parser.add_argument("--overwrite", action="store_true", help="write over this file")
    return parser


def _check(options: argparse.Namespace, rest: Sequence[str]) -> None:
    if options.train_args_file is None and options.model is None and not rest:
        raise ValueError("name a run with --train_args_file, or a model with --model")
    if options.devices is not None and options.devices < 1:
        raise ValueError(f"--devices is {options.devices}: it must be 1 or more")
    if options.gpu_memory is not None and not 0 < options.gpu_memory < float("inf"):
        raise ValueError(f"--gpu_memory is {options.gpu_memory:g}: it must be a number of GiB above 0, such as 80")
    if options.json is not None:
        from hf_sft.drawing import check_new_file

        check_new_file("json", options.json, (".json",), overwrite=options.overwrite)


# ---- arguments -> plan ----


def read_plan(options: argparse.Namespace, rest: Sequence[str]) -> Plan:
    """The training that the command line asks for."""
    from hf_sft.legacy import translate
    from hf_sft.parsing import ArgumentsError, read_words

    words = list(rest)
    words += ["--train_args_file", options.train_args_file] if options.train_args_file is not None else []
    words += ["--model_name_or_path", options.model] if options.model is not None else []
    problems: list[str] = []
    values, _, found = translate(*read_words(words, problems))
    if problems := problems + list(found):
        raise ArgumentsError(problems)
    return plan_of(values, options.devices)


def plan_of(values: Mapping[str, Any], devices: int | None = None, config: Any = None) -> Plan:
    """The training that ``values`` ask for, under the names of train's arguments.

    The engine is read apart: its settings need no process group here, and no DeepSpeed. So is what needs a GPU, which need not
    be here. With ``use_liger_kernel`` activations are counted as without it, which is more than Liger's layers keep.

    Args:
        devices: processes; default: 8 with an engine that shards, else 1.
        config: of the model; default: what the values name.
    """
    from hf_sft.checks import is_true
    from hf_sft.parsing import parse_values

    values = dict(values)
    names = ("config_name_or_path", "config_overrides")
    scratch: dict[str, Any] = {name: values.pop(name) for name in names if name in values}
    if "config_name_or_path" in scratch:  # the shape takes the place of the model, which an adapter needs as well
        values["model_name_or_path"] = scratch["config_name_or_path"]
    elif scratch:
        raise ValueError("config_overrides changes a config: name it with --config_name_or_path")
    device = "cpu" if is_true(values.get("use_cpu")) else "cuda"
    apart = (*_ENGINE, *(_OF_A_GPU if device == "cuda" else ()))
    own = _own_values({name: values.pop(name) for name in apart if values.get(name) is not None})
    values |= {"use_cpu": True, "train_file": values.get("train_file", "none.jsonl")}
    for name in ("resume_from_checkpoint", "report_to", "push_to_hub"):
        values.pop(name, None)
    arguments = parse_values(values)
    settings = {**_engine(own, arguments, devices), "device": device}
    return _plan(arguments, config or _config(arguments.model, scratch), "fp16" if own.get("fp16") else None, settings)


def _own_values(own: Mapping[str, Any]) -> dict[str, Any]:
    """What TrainingArguments cannot be given here, typed as it would be."""
    from hf_sft.parsing import ArgumentsError, field_hints, typed_values

    typed, failed = typed_values(own, *field_hints())
    if failed:
        raise ArgumentsError(list(failed.values()))
    return typed


def _plan(arguments: Arguments, config: Any, half: str | None, settings: dict[str, Any]) -> Plan:
    from hf_sft.checks import is_true
    from hf_sft.memory.activations import MicroBatch
    from hf_sft.memory.plan import Plan

    model, data, training, ema = arguments.model, arguments.data, arguments.training, arguments.ema
    accelerator: Any = training.accelerator_config
    evaluated = str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no"
    objective = "dpo" if data.task_type == "dpo" else data.objective
    checkpointing = bool(training.activation_checkpointing) or settings.get("checkpointing_of_fsdp", False)
    return Plan(
        config,
        train_mode=model.train_mode,
        lora=arguments.lora,
        quantization=model.quantization or "nf4",
        double_quantization=model.double_quantization,
        dtype=_dtype(arguments),
        freeze=tuple(model.freeze) if model.thaw_at_step is None else (),
        precision=half or ("bf16" if training.bf16 else None),
        optim=str(getattr(training.optim, "value", training.optim)),
        optim_args=training.optim_args,
        decays=training.weight_decay != 0,
        average=None if ema.ema_decay is None else "host" if ema.ema_cpu else "device",
        reference=objective == "dpo" and _has_second_model(arguments),
        batch=MicroBatch(
            training.per_device_train_batch_size, data.max_seq_length, objective, arguments.wedlm.block_size
        ),
        accumulation=training.gradient_accumulation_steps,
        sync_each_batch=is_true((accelerator.gradient_accumulation_kwargs or {}).get("sync_each_batch")),
        eval_rows=training.per_device_eval_batch_size if evaluated else 0,
        checkpointing=checkpointing,
        policy=model.activation_checkpointing_policy,
        backend=model.attention_backend,
        **settings,
    )


def _dtype(arguments: Arguments) -> Any:
    from hf_sft.models.loading import resolve_dtype

    return resolve_dtype(arguments.model, arguments.lora)


def _has_second_model(arguments: Arguments) -> bool:
    from hf_sft.preference_losses import REFERENCE_FREE

    dpo = arguments.dpo
    if dpo.dpo_loss_type in REFERENCE_FREE:
        return False
    return dpo.dpo_reference == "model" or (
        dpo.dpo_reference == "auto" and dpo.reference_model_name_or_path is not None
    )


def _config(model: Any, scratch: Mapping[str, Any]) -> Any:
    """The model's config: from a folder or the hub, or the shape that ``scratch`` describes."""
    from hf_sft.arguments import ModelArguments
    from hf_sft.models.loading import load_config, scratch_config

    if scratch:
        from huggingface_hub.errors import StrictDataclassError

        try:
            config = scratch_config(ModelArguments(**scratch, trust_remote_code=model.trust_remote_code))
        except (TypeError, StrictDataclassError) as error:
            raise ValueError(
                f"{scratch['config_name_or_path']!r} is no model's config: {' '.join(str(error).split())}"
            ) from error
        config._name_or_path = str(scratch["config_name_or_path"])
        _tell_unsaid(config, config._name_or_path, model.model_revision, scratch.get("config_overrides"))
        return config
    try:
        config = load_config(model.model_name_or_path, model)
    except ValueError as error:
        raise ValueError(
            f"{error} Only the config is needed: name a folder or a config.json of the same shape with --config_name_or_path, "
            "and change what differs with --config_overrides"
        ) from error
    _tell_unsaid(config, model.model_name_or_path, model.model_revision)
    return config


def _tell_unsaid(config: Any, name: str, revision: str | None, overrides: Any = None) -> None:
    """Warn of sizes that neither the file nor ``overrides`` give: the defaults of the class are counted."""
    from transformers import PretrainedConfig

    from hf_sft.models.loading import overrides_of

    text, fields = config.get_text_config(), PretrainedConfig.get_config_dict(name, revision=revision)[0]
    said = {*fields, *fields.get("text_config", {}), *overrides_of(overrides)}
    own = {size: text.attribute_map.get(size, size) for size in _SIZES if getattr(text, size, None) is not None}
    unsaid = [f"{key} {getattr(text, key)}" for size, key in own.items() if not said & {size, key}]
    if unsaid:
        logger.warning("%s does not give %s: counted as %s has it by default", name, ", ".join(unsaid), text.model_type)


def _engine(own: Mapping[str, Any], arguments: Arguments, devices: int | None) -> dict[str, Any]:
    """The fields of a plan that the engine's arguments say, checked as training checks them.

    Args:
        own: what was kept from ``arguments``, typed.
    """
    from hf_sft.arguments import EngineArguments
    from hf_sft.checks import check_engine, check_training, checkpointing_problems, is_true
    from hf_sft.engines import engine_settings, read_settings
    from hf_sft.parsing import ArgumentsError
    from hf_sft.training_arguments import kernel_refusals

    training: Any = SimpleNamespace(**{**vars(arguments.training), **own})
    engine = EngineArguments(**{name: own[name] for name in _OF_AN_ENGINE if name in own})
    problems = [*check_engine(engine, training, set(own)), *check_training(training, arguments.data, set())]
    problems += [said for _, said in kernel_refusals(vars(training), anywhere=True)]
    try:
        if training.deepspeed is not None:  # how many processes there are is asked for here, and not the environment's
            training.deepspeed = {**read_settings(training.deepspeed, "deepspeed"), "train_batch_size": "auto"}
        found = engine_settings(engine, training, [])
    except ValueError as error:
        raise ArgumentsError([*problems, str(error)]) from None
    training.fsdp_config = found.get("fsdp_config")
    problems += checkpointing_problems(arguments.model.activation_checkpointing_policy, training)
    by_fsdp = is_true((training.fsdp_config or {}).get("activation_checkpointing"))
    if by_fsdp and training.activation_checkpointing:  # the Trainer refuses them as well
        problems.append(
            "activation_checkpointing and fsdp_config.activation_checkpointing are both true: leave one out"
        )
    if problems:
        raise ArgumentsError(problems)
    if "deepspeed" in found:
        return {
            **_zero(found["deepspeed"]["zero_optimization"]),
            "devices": devices or 8,
            "engine_file": "deepspeed" in own,
        }
    if "fsdp" in found:
        sharding = found["fsdp_config"]
        away = [is_true(sharding.get("cpu_offload"))] * 2
        return {
            "engine": "fsdp", "devices": devices or 8, "offload_optimizer": away[0], "offload_param": away[1],
            "reshard": is_true(sharding.get("reshard_after_forward", True)),
            "checkpointing_of_fsdp": by_fsdp,
        }  # fmt: skip
    return {"engine": "ddp" if (devices or 1) > 1 else "none", "devices": devices or 1}


def _zero(zero: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a plan that DeepSpeed's section zero_optimization says."""
    from hf_sft.checks import is_true
    from hf_sft.memory.plan import Plan

    optimizer, parameters = (
        ((zero.get(name) or {}).get("device") or "none") != "none" for name in ("offload_optimizer", "offload_param")
    )
    bucket, group = (zero.get(name) for name in ("reduce_bucket_size", "sub_group_size"))
    return {
        "engine": f"zero{zero['stage']}", "offload_optimizer": optimizer, "offload_param": parameters,
        "bucket": int(bucket) if isinstance(bucket, (int, float)) else Plan.bucket if bucket is None else 0,
        "overlap": is_true(zero.get("overlap_comm")),
        "sub_group": int(group) if isinstance(group, (int, float)) else Plan.sub_group,
    }  # fmt: skip


# ---- what is said of it ----


def _memory(options: argparse.Namespace, plan: Plan) -> tuple[float | None, str]:
    """GiB of a device, and where that is from."""
    import torch

    if options.gpu_memory is not None:
        return options.gpu_memory, f"{options.gpu_memory:g} GiB"
    if plan.device == "cuda" and torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return device.total_memory / _GIB, f"{device.name}, {device.total_memory / _GIB:.1f} GiB"
    return None, ""


def _report(plan: Plan, found: Estimate, memory: float | None, where: str) -> tuple[list[str], dict[str, Any]]:
    """Lines for the terminal, and the same as JSON."""
    from hf_sft.memory.advice import on_more_devices, what_is_faster, what_to_change
    from hf_sft.memory.plan import fits, is_counted

    fitting = None if memory is None else fits(found.total, memory)
    changes = what_to_change(plan, memory) if memory is not None and not fitting and fits(0, memory) else []
    faster = what_is_faster(plan, memory) if memory is not None and fitting else []
    described = _described(plan)
    moments = {name: sum(parts.values()) for name, parts in found.moments.items()}
    record: dict[str, Any] = {
        "plan": described, "moment": found.moment, "parts": found.parts, "moments": moments, "total": found.total,
        "host": found.host, "card": found.card, "gpu_memory": memory, "fits": fitting,
        "changes": [vars(change) for change in changes], "faster": [vars(change) for change in faster],
    }  # fmt: skip
    words = list(described.values())
    lines = [", ".join(words[:5]), ", ".join(words[5:]), "", *_table(found), ""]
    if plan.device == "cuda":
        lines.append(f"fits on: {_card(found.card)}, with a tenth and 2 GiB for what is not counted")
    if not is_counted(plan.optim):
        lines.append(f"optim {plan.optim} is counted as AdamW")
    if memory is None and plan.device == "cuda":
        lines.append("--gpu_memory with the GiB of a device says what to change to fit, or what would be faster")
    if fitting is not None:
        lines.append(f"{where}: it {'fits' if fitting else 'does not fit'}")
    if changes:
        lines += ["", "what to change, each on top of those before:", *_listed(changes, plan.devices)]
    if memory is not None and not fits(0, memory):
        lines.append("2 GiB are set aside for what is not counted: nothing fits into less")
    elif fitting is False and not (changes and changes[-1].fits):
        lines.append("that does not fit either: take a smaller model, or more devices (--devices)")
    enough = changes and changes[-1].fits and all(change.learns_the_same for change in changes)
    if fitting is False and not enough and memory is not None and (more := on_more_devices(plan, memory)) is not None:
        record["more_devices"] = vars(more)
        lines += ["", "or, changing nothing in what is learned:", *_listed([more], plan.devices)]
    if faster:
        lines += ["", "what would be faster within it, each by itself:", *_listed(faster, plan.devices)]
    return lines, record


def _described(plan: Plan) -> dict[str, str]:
    """What was estimated, in words."""
    name, batch = plan.config._name_or_path or plan.config.model_type, plan.batch
    state = plan.state
    parameters = state.frozen + (state.trained if plan.train_mode == "full" else 0)
    many = "" if plan.engine == "none" else f" x {plan.devices}"
    engine = {"none": "one device", "ddp": "DDP", "fsdp": "FSDP2"}.get(plan.engine, f"ZeRO-{plan.engine[-1]}")
    checkpointing = "" if not plan.checkpointing else "" if plan.policy == "full" else f", {plan.policy} kept"
    return {
        "model": f"{name} ({parameters / 1e9:.2f} x 10^9 parameters)"
        if parameters >= 1e8
        else f"{name} ({parameters:,} parameters)",
        "mode": f"{plan.train_mode}, {state.trained / 1e6:,.1f} x 10^6 trained",
        "precision": "no mixed precision" if plan.precision is None else f"mixed precision {plan.precision}",
        "objective": batch.objective,
        "engine": engine + many,
        "tokens": f"{plan.activations.tokens:,} tokens a micro-batch",
        "attention": f"attention {plan.chosen_backend}",
        "checkpointing": f"activation checkpointing {'on' if plan.checkpointing else 'off'}{checkpointing}",
    }


def _table(found: Estimate) -> list[str]:
    unit, name_of_unit = _unit(found.total)
    rows = [(f"{name_of_unit} on each device", "")]
    rows += [(name, f"{size / unit:.2f}") for name, size in found.parts.items()]
    rows.append((f"sum, at the peak ({found.moment})", f"{found.total / unit:.2f}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {size:>8}".rstrip() for name, size in rows]
    if found.host:
        lines.append(f"{'in the memory of the host':<{width}}  {found.host / unit:>8.2f}")
    return lines


def _unit(size: int) -> tuple[int, str]:
    return (_GIB, "GiB") if size >= _GIB else (2**20, "MiB")


def _listed(changes: Sequence[Change], devices: int) -> list[str]:
    found = []
    for change in changes:
        settings = ", ".join(f"{name} {json.dumps(value).strip(chr(34))}" for name, value in change.arguments.items())
        on = f" on {change.devices} GPUs" if change.devices != devices else ""
        unit, name = _unit(change.total)
        found.append(f"  {settings}{on} -> {change.total / unit:.1f} {name}{', fits' if change.fits else ''}")
    return found


def _card(card: int | None) -> str:
    return "no usual GPU" if card is None else f"a GPU of {card} GiB"
