"""Keys that transformers dropped and keys of older fine-tuning scripts: one table, one line per translation.

``translate`` runs before values have types: it sees what the file or the command line said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_sft.conversion import convert, show

DROP = object()  # a converter's answer: nothing remains to be said under the new key


@dataclass(frozen=True)
class Old:
    """What became of an old key.

    Args:
        new: the key that replaces it, or None where it only goes.
        value: from the old value to the new one, or ``DROP``; a ValueError is a problem for the user.
        note: a reason or remark, added to the line that is logged.
    """

    new: str | None
    value: Callable[[Any], Any] = lambda value: value
    note: str = ""


def _flag(value: Any) -> bool:
    try:
        return bool(convert(value, bool))
    except ValueError as wanted:
        raise ValueError(f"it must be {wanted}") from None


def _when(true: Any = DROP, false: Any = DROP) -> Callable[[Any], Any]:
    """A flag that becomes one value when true and another, or nothing, when false."""
    return lambda value: true if _flag(value) else false


def _refuse_unless(harmless: tuple[Any, ...], why: str) -> Callable[[Any], Any]:
    """Values in ``harmless`` (as text, any case) ask for nothing; others cannot be honoured."""
    words = {str(value).lower() for value in harmless}

    def check(value: Any) -> Any:
        if str(value).lower() in words:
            return DROP
        raise ValueError(why)

    return check


def _choice(table: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Values renamed by a table; others pass and are judged under the new key."""
    return lambda value: table.get(str(value).lower(), value)


def _warmup_ratio(value: Any) -> Any:
    try:
        ratio = convert(value, float)
    except ValueError as wanted:
        raise ValueError(f"it must be {wanted}") from None
    if not 0 <= ratio < 1:
        raise ValueError("a share of all steps lies in [0, 1); from 1 on, warmup_steps counts steps")
    return ratio


def _share(value: Any) -> Any:
    """0 asks for no split."""
    try:
        return convert(value, float) or DROP
    except ValueError as wanted:
        raise ValueError(f"it must be {wanted}") from None


def _percentage(value: Any) -> Any:
    share = _share(value)
    return share if share is DROP else share / 100


def _modules(value: Any) -> Any:
    """LLaMA-Factory and others write "q_proj,v_proj" or "all"."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    return ["all-linear"] if value == ["all"] else value


_NONE = ("false", "none", "null", "", "0", "no")
_FSDP = "layers are sharded as the model groups them; leave it out (fsdp_config can name layers)"
_ATTENTION = "attention is chosen by attention_backend (auto, segment, dense, flex or magi); leave it out"
_TOKENS = "the tokenizer's own tokens count: set it in its tokenizer_config.json; new_special_tokens adds tokens"
_ENGINE = "the engine behind it is gone from transformers; leave it out"

# Removed or renamed in transformers 5 (and late in 4).
_TRANSFORMERS: dict[str, Old] = {
    "evaluation_strategy": Old("eval_strategy"),
    "warmup_ratio": Old("warmup_steps", _warmup_ratio, "below 1 it is a share of all steps"),
    "overwrite_output_dir": Old(
        None, note="a folder that holds another run is never overwritten: choose another output_dir, or resume"
    ),
    "logging_dir": Old(None, note="TensorBoard's folder is set by the environment variable TENSORBOARD_LOGGING_DIR"),
    "no_cuda": Old("use_cpu"),
    "use_mps_device": Old(None, note="the device is found by itself; use_cpu keeps off it"),
    "save_safetensors": Old(
        None,
        _refuse_unless(("true", "1", "yes"), "weights are saved as safetensors only"),
        "weights are always safetensors",
    ),
    "group_by_length": Old("train_sampling_strategy", _when("group_by_length")),
    "fsdp_min_num_params": Old(None, _refuse_unless(_NONE, _FSDP)),
    "fsdp_transformer_layer_cls_to_wrap": Old(
        "fsdp_config",
        lambda value: {"transformer_layer_cls_to_wrap": value.split(",") if isinstance(value, str) else value},
    ),
    "gradient_checkpointing": Old("activation_checkpointing"),
    "gradient_checkpointing_kwargs": Old("activation_checkpointing_kwargs"),
    "per_gpu_train_batch_size": Old("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Old("per_device_eval_batch_size"),
    "adafactor": Old("optim", _when("adafactor")),
    "include_inputs_for_metrics": Old("include_for_metrics", _when(["inputs"])),
    "include_tokens_per_second": Old(None, note="tokens per second are always logged"),
    "push_to_hub_model_id": Old("hub_model_id"),
    "push_to_hub_token": Old("hub_token"),
    "torchdynamo": Old("torch_compile_backend"),
    "dispatch_batches": Old("accelerator_config", lambda value: {"dispatch_batches": _flag(value)}),
    "split_batches": Old("accelerator_config", lambda value: {"split_batches": _flag(value)}),
    "xpu_backend": Old("ddp_backend"),
    "past_index": Old(
        None, _refuse_unless(("-1", "none", "null"), "no model here returns a past to feed back; leave it out")
    ),
    "half_precision_backend": Old(None, note="mixed precision is torch.autocast"),
    "fp16_backend": Old(None, note="mixed precision is torch.autocast"),
    "fp16_opt_level": Old(None, note="mixed precision is torch.autocast"),
    "use_ipex": Old(None, _refuse_unless(_NONE, _ENGINE)),
    "jit_mode_eval": Old(None, _refuse_unless(_NONE, _ENGINE)),
    "sharded_ddp": Old(None, _refuse_unless(_NONE, "fairscale's sharding is gone; use fsdp or zero_stage")),
    "mp_parameters": Old(None, _refuse_unless(_NONE, _ENGINE)),
    "tpu_num_cores": Old(None, _refuse_unless(_NONE, _ENGINE)),
    "ray_scope": Old(None, note="hyperparameter search is not part of this project"),
    "torch_dtype": Old("dtype", _choice({"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"})),
    "tokenizer": Old("tokenizer_name_or_path"),
    "tokenizer_name": Old("tokenizer_name_or_path"),
    "tokenizer_path": Old("tokenizer_name_or_path"),
    "attn_implementation": Old(None, _refuse_unless((*_NONE, "auto"), _ATTENTION)),
}

# Keys of widely used fine-tuning scripts.
_SCRIPTS: dict[str, Old] = {
    **dict.fromkeys(
        ("data_path", "train_data", "train_data_path", "train_data_file", "dataset_path"), Old("train_file")
    ),
    **dict.fromkeys(
        ("eval_data_path", "eval_data", "eval_data_file", "validation_file", "valid_file", "dev_file"), Old("eval_file")
    ),
    **dict.fromkeys(
        ("model_path", "model_name", "base_model", "pretrained_model_name_or_path"), Old("model_name_or_path")
    ),
    **dict.fromkeys(
        ("max_length", "model_max_length", "cutoff_len", "max_seq_len", "seq_length"), Old("max_seq_length")
    ),
    **dict.fromkeys(("val_size", "val_set_size", "validation_split"), Old("eval_split", _share)),
    "validation_split_percentage": Old("eval_split", _percentage),
    **dict.fromkeys(("eos_token", "pad_token", "bos_token"), Old(None, _refuse_unless(("none", "null"), _TOKENS))),
    **dict.fromkeys(("lora_r", "lora_dim"), Old("lora_rank")),
    **dict.fromkeys(("num_epochs", "epochs"), Old("num_train_epochs")),
    "lr": Old("learning_rate"),
    "lr_scheduler": Old("lr_scheduler_type"),
    "micro_batch_size": Old("per_device_train_batch_size"),
    **dict.fromkeys(("lora_target", "target_modules"), Old("lora_target_modules", _modules)),
    **dict.fromkeys(("additional_target", "lora_modules_to_save"), Old("modules_to_save", _modules)),
    **dict.fromkeys(("lora_weight_path", "lora_path", "adapter_path", "peft_path"), Old("adapter_name_or_path")),
    **dict.fromkeys(("template_name", "template", "prompt_template"), Old("chat_template")),
    **dict.fromkeys(
        ("tokenize_num_workers", "dataset_num_proc", "num_proc"),
        Old("preprocessing_num_workers"),
    ),
    **dict.fromkeys(("default_system", "system"), Old("system_prompt")),
    **dict.fromkeys(("dataset_format", "dataset_type"), Old("data_format")),
    **dict.fromkeys(("split_special_tokens",), Old("special_tokens_in_text", _when("text"))),
    **dict.fromkeys(("overwrite_cache", "overwrite_data_cache"), Old("rebuild_cache")),
    "train_on_inputs": Old("train_on", _when("all")),
    "train_on_prompt": Old("train_on", _when("all")),
    "mask_history": Old("train_on", _when("last")),
    "finetuning_type": Old("train_mode"),
    "mask_eps": Old(None, note="no mask is drawn with a ratio of 0"),
    "stage": Old("task_type", _choice({"pt": "pretrain"})),
    "load_in_4bit": Old("quantization", _when("nf4")),
    "load_in_8bit": Old("quantization", _when("int8")),
    "quantization_bit": Old("quantization", _choice({"4": "nf4", "8": "int8"})),
    "use_double_quant": Old("double_quantization"),
    "bnb_4bit_use_double_quant": Old("double_quantization"),
    "bnb_4bit_quant_type": Old(
        None, _refuse_unless(("nf4",), "the 4-bit type is nf4; leave it out"), "quantization is nf4 by default"
    ),
    **dict.fromkeys(
        ("flash_attn", "use_flash_attn", "use_flash_attention_2"), Old(None, _refuse_unless(_NONE, _ATTENTION))
    ),
    "deepspeed_zero_stage": Old("zero_stage", lambda value: DROP if str(value).lower() in _NONE else value),
}
LEGACY: dict[str, Old] = {**_TRANSFORMERS, **_SCRIPTS}
MODE_FLAGS = {"use_lora": "lora", "use_peft": "lora", "use_qlora": "qlora", "q_lora": "qlora", "qlora": "qlora"}

# Values that were renamed under a key that stayed.
LEGACY_VALUES: dict[str, dict[str, str]] = {
    "optim": {"adamw_hf": "adamw_torch"},
    "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"},
}


def translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Bring old keys and values up to date.

    Args:
        values: key -> value as found in one source (the file, or the command line).

    Returns:
        the new values, one line per translation ("lora_r is now lora_rank ..."), and the problems: an old value that
        cannot be honoured, or an old key that contradicts the new one.
    """
    new = {key: value for key, value in values.items() if key not in LEGACY and key not in MODE_FLAGS}
    notes: list[str] = []
    problems: list[str] = []
    said_by = {key: key for key in new}
    _translate_mode(values, new, said_by, notes, problems)
    for key, rule in LEGACY.items():
        if key not in values:
            continue
        try:
            value = rule.value(values[key])
        except ValueError as error:
            problems.append(f"{key} is {show(key, values[key])}: {error}")
            continue
        remark = f": {rule.note}" if rule.note else ""
        if rule.new is None or value is DROP:
            gone = f" (it asked for nothing that is not the default of {rule.new})" if rule.new else ""
            notes.append(f"{key} is no longer used{gone}{remark}")
        else:
            _put(new, rule.new, value, key, said_by, problems)
            notes.append(f"{key} is now {rule.new} ({show(key, value)}){remark}")
    for key, renamed in LEGACY_VALUES.items():
        value = new.get(key)
        if isinstance(value, str) and value in renamed:
            new[key] = renamed[value]
            notes.append(f"{key} {value} is now {renamed[value]}")
    return new, notes, problems


def _put(new: dict[str, Any], key: str, value: Any, old_key: str, said_by: dict[str, str], problems: list[str]) -> None:
    """Set the new key, unless another key already gave it another value. Objects are merged item by item."""
    known = new.get(key, value)
    if isinstance(known, dict) and isinstance(value, dict) and all(known.get(k, v) == v for k, v in value.items()):
        new[key] = {**known, **value}
    elif str(known) != str(value):
        problems.append(
            f"{old_key} ({show(old_key, value)}) is now {key}, and {said_by[key]} says {show(key, known)}: "
            f"keep one of them ({key} is the new name)"
        )
    else:
        new[key] = known
    said_by.setdefault(key, old_key)


def _translate_mode(
    values: Mapping[str, Any], new: dict[str, Any], said_by: dict[str, str], notes: list[str], problems: list[str]
) -> None:
    """``use_lora`` and ``q_lora`` say the train_mode between them: QLoRA is LoRA, so both together mean qlora."""
    asked: list[tuple[str, str]] = []
    denied: list[tuple[str, str]] = []
    for key, mode in MODE_FLAGS.items():
        if key not in values:
            continue
        try:
            (asked if _flag(values[key]) else denied).append((key, mode))
        except ValueError as error:
            problems.append(f"{key} is {show(key, values[key])}: {error}")
    explicit = new.get("train_mode")
    mode = "qlora" if ("qlora" in [mode for _, mode in asked] or explicit == "qlora") else "lora"
    for key, _ in asked:
        if explicit is not None and explicit != mode:
            problems.append(
                f"{key} is true, and train_mode says {explicit!r}: leave {key} out, or set train_mode to {mode}"
            )
        else:
            new["train_mode"] = mode
            said_by.setdefault("train_mode", key)
            notes.append(f"{key} is now train_mode ({mode!r})")
    for key, meant in denied:
        if new.get("train_mode") == meant or (meant == "lora" and new.get("train_mode") == "qlora"):
            problems.append(
                f"{key} is false, and {said_by['train_mode']} asks for {new['train_mode']}: leave {key} out"
            )
        else:
            notes.append(f"{key} is no longer used (train_mode says it)")
