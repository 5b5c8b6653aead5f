"""Checks of typed values: their ranges, and what does not go together.

Every check yields sentences, so that a user sees all problems of a configuration at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import PurePath
from typing import Any, get_type_hints

from hf_sft.arguments import DataArguments, DPOArguments, EngineArguments, LoraArguments, ModelArguments, WeDLMArguments
from hf_sft.conversion import choices, convert, describe, takes
from hf_sft.sources import read_sources
from hf_sft.text_checks import check_cutting

FLASH_REFUSED = (
    "attention_backend is flash and objective is wedlm: flash kernels know whole causal documents by their lengths alone, and "
    "cannot be told which block of the noisy stream sees what; choose auto, segment, dense, flex or magi"
)
_NOT_NEGATIVE = (
    "learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "dataloader_num_workers", "logging_steps", "save_steps",
    "eval_steps",
)  # fmt: skip
# What report_to can name: the modules of which one is needed, and the package that brings it. kubeflow needs none.
_REPORTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "azure_ml": (("azureml",), "azureml-sdk"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}


def check_model(model: ModelArguments, given: set[str]) -> Iterator[str]:
    if model.thaw_at_step is not None and not model.freeze:
        yield f"thaw_at_step is {model.thaw_at_step} and freeze is not set: name the weights that are frozen until then"
    if model.thaw_at_step is not None and model.thaw_at_step < 1:
        yield f"thaw_at_step is {model.thaw_at_step}: use at least 1 step, or leave it out and nothing is thawed"
    if model.max_loading_processes is not None and model.max_loading_processes < 1:
        yield f"max_loading_processes is {model.max_loading_processes}: use at least 1, or leave it out"
    if (model.model_name_or_path is None) == (model.config_name_or_path is None):
        found = "neither is set" if model.model_name_or_path is None else "both are set"
        yield (
            f"model_name_or_path and config_name_or_path: {found}; give model_name_or_path to start from trained "
            "weights, or config_name_or_path to start from scratch"
        )
    if model.config_overrides and model.config_name_or_path is None:
        yield "config_overrides changes a model that is trained from scratch; give config_name_or_path, or leave it out"
    if model.train_mode == "qlora" and model.config_name_or_path is not None:
        yield (
            "train_mode qlora quantises trained weights, and config_name_or_path has none; "
            "use full, or model_name_or_path"
        )
    if model.train_mode == "lora" and model.config_name_or_path is not None:
        yield "train_mode lora needs a trained base, and config_name_or_path has none; use full, or model_name_or_path"
    if model.train_mode != "qlora":
        if model.quantization is not None:
            yield (
                f"quantization is {model.quantization} and train_mode is {model.train_mode}: only the frozen base of "
                "qlora is quantised; set train_mode to qlora, or leave quantization out"
            )
        if "double_quantization" in given:
            yield f"double_quantization belongs to train_mode qlora, and train_mode is {model.train_mode}; leave it out"
    if model.train_mode == "qlora" and model.quantization == "int8" and "double_quantization" in given:
        yield "double_quantization belongs to quantization nf4, and quantization is int8; leave it out"
    if model.dtype == "float16" and model.train_mode == "full":
        yield (
            "dtype is float16 and train_mode is full: gradients below 6e-8 vanish in float16 weights; "
            "leave dtype out (float32) and set fp16 to true for the arithmetic"
        )


def _elsewhere(group: type, given: set[str], where: str) -> Iterator[str]:
    """The arguments of ``group`` that were given, and belong to something that was not asked for."""
    if named := [entry.name for entry in fields(group) if entry.name in given]:
        yield f"{', '.join(named)} {'belongs' if len(named) == 1 else 'belong'} to {where}, or leave them out"


def check_lora(lora: LoraArguments, train_mode: str, given: set[str]) -> Iterator[str]:
    own = [entry.name for entry in fields(LoraArguments)]
    if train_mode == "full":
        yield from _elsewhere(
            LoraArguments, given, "an adapter, and train_mode is full: set train_mode to lora or qlora"
        )
        return
    if lora.lora_rank < 1:
        yield f"lora_rank is {lora.lora_rank}: a rank is at least 1"
    if not lora.lora_alpha > 0:
        yield f"lora_alpha is {lora.lora_alpha:g}: at 0 or below the adapter learns nothing; use a positive number"
    if not 0 <= lora.lora_dropout < 1:
        yield f"lora_dropout is {lora.lora_dropout:g}: it is a share in [0, 1)"
    if not lora.lora_target_modules:
        yield 'lora_target_modules is empty: name modules such as q_proj and v_proj, or "all-linear"'
    if lora.adapter_name_or_path is not None:
        fixed = [name for name in own if name in given and name != "adapter_name_or_path"]
        if fixed:
            yield (
                f"{', '.join(fixed)} and adapter_name_or_path: an adapter that exists brings its own settings; "
                "leave one of them out"
            )


def check_engine(engine: EngineArguments, training: Any, given: set[str]) -> Iterator[str]:
    sharded = engine.zero_stage is not None or training.deepspeed
    if sharded and training.fsdp:
        yield "DeepSpeed (zero_stage or deepspeed) and fsdp are both asked for: choose one of them"
    for name in ("offload_optimizer", "offload_param", "nvme_path"):
        if name in given and not sharded:
            yield f"{name} belongs to DeepSpeed, and neither zero_stage nor deepspeed is set: set one, or leave {name} out"
    if sharded and "nvme" in (engine.offload_optimizer, engine.offload_param) and engine.nvme_path is None:
        yield "offloading to nvme needs nvme_path: name a folder on a local NVMe disk"
    if engine.offload_param in ("cpu", "nvme") and engine.zero_stage in (1, 2):
        yield (
            f"offload_param is {engine.offload_param} and zero_stage is {engine.zero_stage}: parameters are sharded by stage 3 "
            "only; set zero_stage to 3, or leave offload_param out"
        )


def check_data(data: DataArguments, training: Any = None) -> Iterator[str]:
    """``training``, where it is known, has the fields of TrainingArguments."""
    if data.train_file is None:
        yield "train_file is not set: name the training data"
    for name in ("train_file", "eval_file"):
        try:
            if getattr(data, name) is not None:
                read_sources(getattr(data, name))
        except ValueError as error:
            yield f"{name}: {error}"
    if data.max_seq_length < 2:
        yield f"max_seq_length is {data.max_seq_length}: a document needs at least 2 tokens"
    for name in ("max_train_samples", "max_eval_samples"):
        value = getattr(data, name)
        if value is not None and value < 1:
            yield f"{name} is {value}: use at least 1, or leave it out for all records"
    if data.max_eval_samples is not None and not has_evaluation(data):
        yield "max_eval_samples is set and eval_file is not: name the evaluation data, or leave it out"
    if data.eval_split is not None:
        if data.eval_file is not None:
            yield "eval_split and eval_file are both set: evaluation data come from one of them"
        if (
            data.eval_split <= 0
            or data.eval_split == 1
            or (data.eval_split > 1 and data.eval_split != int(data.eval_split))
        ):
            yield f"eval_split is {data.eval_split:g}: use a share between 0 and 1, or a whole number of records from 2 on"
    if data.preprocessing_num_workers is not None and data.preprocessing_num_workers < 1:
        yield f"preprocessing_num_workers is {data.preprocessing_num_workers}: use at least 1"
    yield from _check_live(data, training)


def _check_live(data: DataArguments, training: Any) -> Iterator[str]:
    """Data that are tokenised while the model trains."""
    if data.streaming and data.lazy_preprocess:
        yield "streaming and lazy_preprocess are both true: both tokenise while training; choose one"
    for name in ("streaming", "lazy_preprocess"):
        if not getattr(data, name):
            continue
        if data.eval_split is not None:
            yield f"{name} is true and eval_split is set: the records are not known in advance; name eval_file"
    if data.lazy_preprocess and data.overlength_rule == "split" and not data.joins_texts:
        yield (
            "lazy_preprocess is true and overlength is split, and each record is one document there: set overlength to drop, "
            "truncate or error, or use streaming"
        )
    if (
        data.streaming
        and data.max_train_samples is not None
        and isinstance(data.train_file, list)
        and len(data.train_file) > 1
    ):
        yield "max_train_samples is set and streaming reads several sources at once: give each of them a limit instead"
    if data.shuffle_buffer < 1:
        yield f"shuffle_buffer is {data.shuffle_buffer}: use at least 1 (which keeps the order of the file)"
    if data.streaming and training is not None and training.max_steps <= 0:
        yield "streaming is true and max_steps is not set: the length of a stream is not known; say how many steps to take"


def has_evaluation(data: DataArguments) -> bool:
    """Whether evaluation data are named, or may come with the training data: a JSON object can hold both lists, and so can
    folders and data sets of the hub, which is seen when they are read."""
    if data.eval_file is not None or data.eval_split is not None:
        return True
    try:
        sources = [] if data.train_file is None else read_sources(data.train_file)
    except ValueError:
        return True  # said already
    return any(PurePath(source.path).suffix in ("", ".json", ".gz") for source in sources)


def check_values(arguments: Any) -> Iterator[str]:
    """Values of an arguments object made in Python, where nothing has typed them: each is of its field's type and choices."""
    hints = get_type_hints(type(arguments))
    for entry in fields(arguments):
        value = getattr(arguments, entry.name)
        try:
            same = convert(value, hints[entry.name]) == value
        except ValueError as wanted:
            yield f"{entry.name} is {value!r}: it must be {wanted}"
            continue
        if not same or (
            isinstance(value, str) and not takes(hints[entry.name], str) and not choices(hints[entry.name])
        ):
            yield f"{entry.name} is {value!r}: it must be {describe(hints[entry.name])}"


def check_task(data: DataArguments, given: set[str]) -> Iterator[str]:
    """What belongs to conversations, under pretrain; and the other way round."""
    if data.task_type == "pretrain":
        for name in ("train_on", "chat_template", "chat_template_kwargs", "system_prompt"):
            if name in given:
                yield f"{name} belongs to conversations, and task_type is pretrain, which learns every token: leave it out"
    elif data.overlength == "split":
        yield "overlength is split, which cuts texts of task_type pretrain; a conversation is dropped or truncated"
    yield from check_cutting(data, given)


def check_wedlm(wedlm: WeDLMArguments, data: DataArguments, backend: str, given: set[str]) -> Iterator[str]:
    if data.objective != "wedlm":
        where = f"objective wedlm, and objective is {data.objective}: set objective to wedlm"
        yield from _elsewhere(WeDLMArguments, given, where)
        return
    if not 1 <= wedlm.block_size <= data.max_seq_length:
        yield (
            f"block_size is {wedlm.block_size}: a block has at least 1 token and at most max_seq_length "
            f"({data.max_seq_length}); 32 is usual"
        )
    if wedlm.num_learnable_im_end < 0:
        yield f"num_learnable_im_end is {wedlm.num_learnable_im_end}: use 0 or more"
    if "num_learnable_im_end" in given and wedlm.num_learnable_im_end:
        why = "texts have no turns" if data.task_type == "pretrain" else "train_on is all"
        if data.task_type == "pretrain" or data.train_on == "all":
            yield f"num_learnable_im_end is {wedlm.num_learnable_im_end}, and {why}: leave it out, or set it to 0"
    if not 0 <= wedlm.ar_loss_weight < float("inf"):
        yield f"ar_loss_weight is {wedlm.ar_loss_weight:g}: use a number from 0 on"
    if not wedlm.enable_ar_loss and "ar_loss_weight" in given and wedlm.ar_loss_weight:
        yield f"ar_loss_weight is {wedlm.ar_loss_weight:g} and enable_ar_loss is false: leave out one of them"
    if wedlm.mask_token is not None and not wedlm.mask_token.strip():
        yield f"mask_token is {wedlm.mask_token!r}: name a token that is not blank"
    if data.packing is False:
        yield "packing is false and objective is wedlm: its two streams need a packed layout; leave packing out"
    if backend == "flash":
        yield FLASH_REFUSED


def check_dpo(dpo: DPOArguments, data: DataArguments, given: set[str], train_mode: str | None = None) -> Iterator[str]:
    if data.task_type != "dpo":
        where = f"task_type dpo, and task_type is {data.task_type}: set task_type to dpo"
        yield from _elsewhere(DPOArguments, given, where)
        return
    loss = dpo.dpo_loss_type
    if data.objective != "causal":
        yield f"task_type is dpo and objective is {data.objective}: preferences are learned with objective causal"
    if not 0 < dpo.dpo_beta < float("inf"):
        yield f"dpo_beta is {dpo.dpo_beta:g}: use a positive number; 0.1 is usual"
    if not 0 <= dpo.label_smoothing < 0.5:
        yield f"label_smoothing is {dpo.label_smoothing:g}: the share of wrong preferences lies in [0, 0.5)"
    if dpo.label_smoothing and loss not in ("sigmoid", "robust", "simpo"):
        yield f"label_smoothing is {dpo.label_smoothing:g}, and dpo_loss_type {loss} knows none: leave it out"
    if loss == "robust" and not dpo.label_smoothing:
        yield "dpo_loss_type is robust and label_smoothing is 0, which is sigmoid: set the share of wrong preferences"
    if not 0 <= dpo.dpo_sft_weight < float("inf"):
        yield f"dpo_sft_weight is {dpo.dpo_sft_weight:g}: use 0 or more"
    if not 0 <= dpo.simpo_gamma < float("inf"):
        yield f"simpo_gamma is {dpo.simpo_gamma:g}: use 0 or more"
    if "simpo_gamma" in given and loss != "simpo":
        yield f"simpo_gamma belongs to dpo_loss_type simpo, and dpo_loss_type is {loss}: leave it out"
    if dpo.max_prompt_length is not None and not 1 <= dpo.max_prompt_length < data.max_seq_length:
        yield (
            f"max_prompt_length is {dpo.max_prompt_length}: it lies between 1 and max_seq_length - 1 "
            f"({data.max_seq_length - 1}), which prompt and answer share"
        )
    if dpo.max_answer_length is not None and dpo.max_answer_length < 1:
        yield f"max_answer_length is {dpo.max_answer_length}: use at least 1"
    yield from _check_reference(dpo, given, train_mode)
    if data.data_format not in ("auto", "preference"):
        yield f"data_format is {data.data_format} and task_type is dpo, which reads preference pairs: leave it out"
    if "train_on" in given and data.train_on != "assistant":
        yield f"train_on is {data.train_on} and task_type is dpo, which compares the answers alone: leave it out"


def _check_reference(dpo: DPOArguments, given: set[str], train_mode: str | None) -> Iterator[str]:
    """What a preference is measured against."""
    named, loss = dpo.reference_model_name_or_path, dpo.dpo_loss_type
    if loss in ("orpo", "simpo"):
        for name in ("dpo_reference", "reference_model_name_or_path"):
            if name in given and getattr(dpo, name) not in (None, "auto"):
                yield f"{name} is {getattr(dpo, name)}, and dpo_loss_type {loss} needs no reference: leave it out"
        return
    if named is not None and dpo.dpo_reference not in ("auto", "model"):
        yield (
            f"reference_model_name_or_path is {named} and dpo_reference is {dpo.dpo_reference}: leave one of them out"
        )
    if dpo.dpo_reference == "adapter_off" and train_mode == "full":
        yield "dpo_reference is adapter_off and train_mode is full, which has no adapter: choose model or precomputed"


def evaluation_wanted(training: Any, given: set[str]) -> list[str]:
    """The settings that make no sense without evaluation data, in words."""
    wants = [f"eval_strategy is {_plain(training.eval_strategy)}"] if _plain(training.eval_strategy) != "no" else []
    wants += ["save_strategy is best"] if _plain(training.save_strategy) == "best" else []
    wants += [f"{name} is true" for name in ("eval_on_start", "load_best_model_at_end") if getattr(training, name)]
    return wants + (["do_eval is true"] if training.do_eval and "do_eval" in given else [])


_POLICIES = ("full", "attention", "products")


def checkpointing_problems(policy: str, training: Any) -> Iterator[str]:
    """Why ``activation_checkpointing_policy`` cannot be honoured; ``training`` has the fields of TrainingArguments."""
    if policy not in _POLICIES:
        yield f"activation_checkpointing_policy is {policy!r}: choose {', '.join(_POLICIES)}"
    if policy not in _POLICIES[1:]:
        return
    said = f"activation_checkpointing_policy is {policy}"
    on, settings = (
        getattr(training, f"activation_{name}", None) or getattr(training, f"gradient_{name}", None)
        for name in ("checkpointing", "checkpointing_kwargs")
    )
    config = getattr(training, "fsdp_config", None)
    if isinstance(config, Mapping) and is_true(config.get("activation_checkpointing")):
        yield (
            f"{said}, and fsdp_config asks for FSDP's own activation checkpointing, which computes everything again: set "
            "activation_checkpointing to true beside fsdp_config instead, or leave the policy out"
        )
    elif not on:
        yield f"{said} and activation_checkpointing is not true: set it, or leave the policy out"
    if isinstance(settings, Mapping) and is_true(settings.get("use_reentrant")):
        yield (
            f"{said} and activation_checkpointing_kwargs has use_reentrant true, which keeps a layer's input alone: set it to "
            "false, or leave the policy out"
        )
    if getattr(training, "torch_compile", False):
        yield (
            f"{said} and torch_compile is true: policies do not see products inside of what is compiled; leave one of them out"
        )


def is_true(value: Any) -> bool:
    """Nested settings say it as a word, too."""
    return str(value).lower() in ("true", "1", "yes")


def check_training(training: Any, data: DataArguments, given: set[str]) -> Iterator[str]:
    """``training`` has the fields of TrainingArguments; it need not be built yet."""
    if training.fp16 and training.bf16:
        yield "fp16 and bf16 are both true: choose one (bf16 where the device has it)"
    if not has_evaluation(data):
        wants = evaluation_wanted(training, given)
        if wants:
            yield f"{' and '.join(wants)}, and eval_file is not set: name the evaluation data, or leave evaluation out"
    elif "do_eval" in given and not training.do_eval:
        yield "do_eval is false, and eval_file is set: leave one of them out"
    elif training.load_best_model_at_end and _plain(training.eval_strategy) == "no":
        yield "load_best_model_at_end is true and eval_strategy is no: set eval_strategy to steps or epoch"
    if "do_train" in given and not training.do_train:
        yield "do_train is false, and train.py trains: leave it out"
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training, name) < 1:
            yield f"{name} is {getattr(training, name)}: use at least 1"
    if training.max_steps < -1:
        yield f"max_steps is {training.max_steps}: use 1 or more, or leave it out (-1: as many as num_train_epochs has)"
    for name in _NOT_NEGATIVE:
        if (getattr(training, name) or 0) < 0:
            yield f"{name} is {getattr(training, name):g}: it must not be negative; use 0 or more"
    for name in ("seed", "data_seed"):
        value = getattr(training, name)
        if value is not None and not 0 <= value < 2**32:
            yield f"{name} is {value}: a seed lies between 0 and 2**32 - 1"
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(training, name) < 1:
            yield f"{name} is {getattr(training, name):g}: it is a share in [0, 1)"
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        yield f"num_train_epochs is {training.num_train_epochs:g} and max_steps is not set: nothing would be trained"


def check_report_to(training: Any) -> Iterator[str]:
    asked = training.report_to
    for name in asked if isinstance(asked, list) else [asked]:
        if name in (None, "none", "all", "kubeflow"):
            continue
        if name not in _REPORTERS:
            yield f"report_to is {name!r}: it must be none, all, kubeflow, {', '.join(sorted(_REPORTERS))}"
            continue
        modules, package = _REPORTERS[name]
        if all(find_spec(module) is None for module in modules):
            yield (
                f"report_to is {name}, and {' or '.join(modules)} is not installed: pip install {package}, "
                "or set report_to to none"
            )


def check_scheduler(training: Any) -> Iterator[str]:
    """``lr_scheduler_kwargs`` against the signature of the scheduler that will take them."""
    kwargs = training.lr_scheduler_kwargs
    if isinstance(kwargs, str):
        yield f'lr_scheduler_kwargs is {kwargs!r}: it must be an object, such as {{"num_cycles": 2}}'
        return
    kwargs, name = kwargs or {}, _plain(training.lr_scheduler_type)
    taken, needed = _scheduler_parameters(name)
    unknown = [key for key in kwargs if key not in taken]
    if unknown:
        takes = f"takes {', '.join(taken)}" if taken else "takes none: leave lr_scheduler_kwargs out"
        yield f"lr_scheduler_kwargs has {', '.join(map(repr, unknown))}, and lr_scheduler_type {name} {takes}"
    missing = [key for key in needed if key not in kwargs]
    if missing:
        yield f"lr_scheduler_type {name} needs {', '.join(missing)}: set it in lr_scheduler_kwargs"
    floors = [key for key in ("min_lr", "min_lr_rate") if kwargs.get(key) is not None]
    if {"min_lr", "min_lr_rate"} <= taken.keys() and len(floors) != 1:
        found = "both are set" if floors else "neither is set"
        yield f"lr_scheduler_type {name} needs min_lr or min_lr_rate in lr_scheduler_kwargs, and {found}: set one of them"


def _scheduler_parameters(name: str) -> tuple[Mapping[str, Any], list[str]]:
    """What lr_scheduler_kwargs can set for the scheduler, and which of it has no default."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    if name in ("constant", "constant_with_warmup"):
        return {}, []  # transformers passes nothing on to these two
    function: Any = next(value for key, value in TYPE_TO_SCHEDULER_FUNCTION.items() if _plain(key) == name)
    if any(each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values()):
        from torch.optim.lr_scheduler import ReduceLROnPlateau
        from transformers import optimization

        function = ReduceLROnPlateau if name == "reduce_lr_on_plateau" else optimization.GreedyLR
    callers = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    taken = {key: each for key, each in inspect.signature(function).parameters.items() if key not in callers}
    return taken, [key for key, each in taken.items() if each.default is each.empty]


def _plain(value: Any) -> str:
    """The name of an enum's member, or the text itself."""
    return str(getattr(value, "value", value))
