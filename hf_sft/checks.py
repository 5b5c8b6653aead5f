"""Checks across arguments: what each value is right by itself, but not together with the others.

Every check adds sentences to one list, so that a user sees all problems of a configuration at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from hf_sft.arguments import DataArguments, LoraArguments, ModelArguments

LATER = {  # what the names of the interface promise and this version does not have yet
    "task_type": ("sft",),
    "objective": ("causal",),
    "attention_backend": ("auto", "dense", "segment"),
}


def check_model(model: ModelArguments, given: set[str]) -> Iterator[str]:
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


def check_lora(lora: LoraArguments, train_mode: str, given: set[str]) -> Iterator[str]:
    own = [entry.name for entry in fields(LoraArguments)]
    if train_mode == "full":
        named = [name for name in own if name in given]
        if named:
            verb = "belongs" if len(named) == 1 else "belong"
            yield (
                f"{', '.join(named)} {verb} to an adapter, and train_mode is full: "
                "set train_mode to lora or qlora, or leave them out"
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


def check_data(data: DataArguments) -> Iterator[str]:
    if data.train_file is None:
        yield "train_file is not set: name the training data"
    if data.max_seq_length < 2:
        yield f"max_seq_length is {data.max_seq_length}: a document needs at least 2 tokens"
    for name in ("max_train_samples", "max_eval_samples"):
        value = getattr(data, name)
        if value is not None and value < 1:
            yield f"{name} is {value}: use at least 1, or leave it out for all records"
    if data.max_eval_samples is not None and data.eval_file is None:
        yield "max_eval_samples is set and eval_file is not: name the evaluation data, or leave it out"


def check_later(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, available in LATER.items():
        if arguments[name] not in available:
            choice = " or ".join(available)
            yield f"{name} is {arguments[name]}, which is not available in this version; choose {choice}"


def check_training(training: Any, data: DataArguments, given: set[str]) -> Iterator[str]:
    """``training`` has the fields of TrainingArguments; it need not be built yet."""
    if training.fp16 and training.bf16:
        yield "fp16 and bf16 are both true: choose one (bf16 where the device has it)"
    if data.eval_file is None:
        wants = [f"eval_strategy is {_plain(training.eval_strategy)}"] if _plain(training.eval_strategy) != "no" else []
        wants += [f"{name} is true" for name in ("eval_on_start", "load_best_model_at_end") if getattr(training, name)]
        if training.do_eval and "do_eval" in given:
            wants.append("do_eval is true")
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
    if training.learning_rate < 0:
        yield f"learning_rate is {training.learning_rate:g}: a rate is not negative"
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        yield f"num_train_epochs is {training.num_train_epochs:g} and max_steps is not set: nothing would be trained"


def advice(model: ModelArguments) -> Iterator[str]:
    """Requests that are honoured and yet rarely what is meant."""
    if model.train_mode == "full" and model.dtype == "bfloat16":
        yield (
            "dtype is bfloat16 and train_mode is full: with 8 bits of mantissa most updates of a small learning rate "
            "are rounded away (at 3e-6 about 4 % of the weights move). Leave dtype out and set bf16 to true: float32 "
            "weights, bfloat16 arithmetic; or use an optimizer that keeps float32 masters"
        )


def _plain(value: Any) -> str:
    """The name of an enum's member, or the text itself."""
    return str(getattr(value, "value", value))
