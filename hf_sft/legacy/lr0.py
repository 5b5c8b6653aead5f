"""Keys of trainers whose YAML says ``lr0``, ``lrf``, ``epochs`` and ``bit``."""

from __future__ import annotations

from typing import Any

from hf_sft.legacy.hugging_face import FSDP
from hf_sft.legacy.rules import (
    DROP,
    NONE,
    Gone,
    Old,
    Only,
    Several,
    Values,
    asks,
    flag,
    is_none,
    names,
    read_object,
    same_key,
    typed,
)
from hf_sft.legacy.scripts import MODE_FLAGS, TOKENS

_DTYPES = {
    "16": "float16",
    "32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
}
_QUANTISED = {"4": "nf4", "8": "int8"}
_NO_STOP = (
    "a model that is not taught to end its answers never stops; leave it out: the end of every answer is learned (turns with "
    "train: false are not)"
)
_EMA_DECAY = 0.999
_EMA_NOTE = "the average of the weights; its decay grew to 0.9999 over thousands of steps, which short runs have not"
_PEFT = {  # fields of a PEFT LoraConfig -> ours
    "r": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "lora_target_modules",
    "bias": "lora_bias", "use_dora": "use_dora", "use_rslora": "use_rslora", "modules_to_save": "modules_to_save",
}  # fmt: skip
_PEFT_FIXED = {"peft_type": ("lora",), "type": ("lora",), "task_type": ("causal_lm",), "init_lora_weights": ("true",)}
_PEFT_SILENT = (
    "inference_mode",
    "base_model_name_or_path",
    "auto_mapping",
    "revision",
    "fan_in_fan_out",
    "peft_version",
)


# ---- precision and adapters ----


def _dtype(value: Any) -> str:
    word = str(value).lower().removeprefix("torch.")
    word = _DTYPES.get(word, word)
    if word not in ("float32", "float16", "bfloat16"):
        raise ValueError("it must be 4, 8, 16, 32, float32, float16 or bfloat16")
    return word


def _bit(value: Any, values: Values) -> Any:
    """4 and 8 quantise the base of an adapter; under full training the weights are float32, and arithmetic has the type."""
    adapter = asks(values, "peft_config_path", *MODE_FLAGS) or values.get("train_mode") in ("lora", "qlora")
    if (kind := _QUANTISED.get(str(value))) is not None:
        if not adapter:
            raise ValueError(
                "a quantised base is trained through an adapter: set train_mode to qlora, or bit to bfloat16"
            )
        return Several({"quantization": kind})
    word = _dtype(value)
    if adapter:
        return Several({"dtype": word})
    if word == "float32":
        return Gone("weights are float32 under full training")
    return Several({"bf16" if word == "bfloat16" else "fp16": True}, note="weights stay float32 under full training")


def _amp(value: Any, values: Values) -> Any:
    if not flag(value):
        return DROP
    bfloat = str(values.get("bit")).lower() in ("bfloat16", "bf16", "torch.bfloat16")
    return Several({"bf16" if bfloat else "fp16": True})


def _peft(value: Any, values: Values) -> Any:
    """The fields of a LoraConfig, as JSON or YAML; false trains without an adapter."""
    if is_none(value):
        return Several({"train_mode": "full"})
    config = read_object(value, "the file" if isinstance(value, str) else "it")
    config = {key: entry for key, entry in config.items() if entry is not None and entry != []}
    new: dict[str, Any] = {"train_mode": "qlora" if str(values.get("bit")) in _QUANTISED else "lora"}
    for key, entry in config.items():
        if key in _PEFT:
            new[_PEFT[key]] = names("all" if entry == "all-linear" else entry) if key == "target_modules" else entry
        elif key in _PEFT_FIXED:
            if str(entry).lower().removeprefix("tasktype.") not in _PEFT_FIXED[key]:
                raise ValueError(f"its {key} is {entry!r}: adapters are LoRA for causal language models")
        elif key not in _PEFT_SILENT and not (is_none(entry) or entry == {}):
            raise ValueError(f"its {key} is {entry!r}, which no argument says: leave it out of the file")
    return Several(new)


def _quant_config(value: Any, values: Values) -> Any:
    """The fields of a BitsAndBytesConfig; they count where ``bit`` is 4 or 8."""
    if is_none(value) or str(values.get("bit")) not in _QUANTISED:
        return DROP if is_none(value) else Gone("bit quantises nothing")
    config = read_object(value, "the file" if isinstance(value, str) else "it")
    if str(config.get("bnb_4bit_quant_type", "nf4")).lower() != "nf4" and str(values["bit"]) == "4":
        raise ValueError(f"its bnb_4bit_quant_type is {config['bnb_4bit_quant_type']!r}: the 4-bit type is nf4")
    if "bnb_4bit_use_double_quant" in config and str(values["bit"]) == "4":
        return Several({"double_quantization": flag(config["bnb_4bit_use_double_quant"])})
    return Gone("bit says it")


# ---- data and tokens ----


def _model(value: Any, values: Values) -> Any:
    """With a size beside it, it is a name inside that trainer."""
    if not asks(values, "model_size"):
        return value
    if asks(values, "model_name_or_path"):
        return Gone("model_name_or_path names the model")
    raise ValueError(
        "with model_size it is a name inside that trainer: set model_name_or_path to the model's folder or hub name"
    )


def _name(value: Any, values: Values) -> Any:
    """``project`` and ``name`` made the folder."""
    if is_none(value) or "output_dir" in values or not asks(values, "project"):
        return DROP if is_none(value) else Several({"run_name": value})
    folder = f"{str(values['project']).rstrip('/')}/{value}"
    return Several({"output_dir": folder}, over=("project",), note="project/name was the folder")


def _kinds(value: Any) -> Any:
    kinds = {str(kind).lower() for kind in (value if isinstance(value, list) else [value])}
    if kinds <= {"qa", "sft", "none"}:
        return DROP
    if kinds == {"ar"}:
        return "pretrain"
    raise ValueError("one task is trained at a time: train texts (ar) with task_type pretrain in a run of their own")


def _pad(value: Any) -> Any:
    return Gone("padding is never seen or scored, and needs no token of its own")


# ---- steps ----


def _epochs_or_steps(value: Any, values: Values) -> Any:
    """Which of two lengths counts."""
    if str(value).lower() not in ("epoch", "step"):
        raise ValueError("it must be epoch or step")
    by_epoch = str(value).lower() == "epoch"
    over = ("warmup_steps",) if by_epoch and "warmup_steps" in values else ()
    return Several({}, over=over, note="epochs and warmup_epochs count" if by_epoch else "steps and warmup_steps count")


def _counts(criterion: str, values: Values) -> bool:
    """Whether the keys of this criterion count; without one, both do."""
    return str(values.get("optimizer_step_criterion", criterion)).lower() == criterion


def _epochs(value: Any, values: Values) -> Any:
    return value if _counts("epoch", values) else Gone("optimizer_step_criterion is step")


def _steps(value: Any, values: Values) -> Any:
    return value if _counts("step", values) else Gone("optimizer_step_criterion is epoch")


def _warmup_epochs(value: Any, values: Values) -> Any:
    if not _counts("epoch", values):
        return Gone("optimizer_step_criterion is step")
    warm, all_ = typed(value, float), typed(values.get("epochs", values.get("num_train_epochs", 0)), float)
    if not warm:
        return DROP
    if not 0 < warm < all_:
        raise ValueError("it is part of epochs: use fewer than these")
    return warm / all_


def _final_rate(value: Any, values: Values) -> Any:
    """The last learning rate is lr0 * lrf."""
    rate = typed(value, float)
    if not 0 <= rate <= 1:
        raise ValueError("the last learning rate as a share of the first lies in [0, 1]")
    kind = str(values.get("scheduler_type", "cosine")).lower()
    if kind == "linear":
        if not rate:
            return Several({"lr_scheduler_type": "linear"})
        last = rate * typed(values.get("lr0", values.get("learning_rate", 5e-5)), float)
        return Several({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": last, "power": 1.0}})
    if not rate:
        return Several({"lr_scheduler_type": "cosine"})
    return Several({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": rate}})


def _scheduler(value: Any, values: Values) -> Any:
    return Gone("lrf names the schedule") if "lrf" in values else value


_EVALUATION = ("eval_file", "eval_data_path", "eval_data", "validation_file", "eval_split", "val_size")
_NO_EVALUATION = Gone("no evaluation data are named")


def _validation_interval(value: Any, values: Values) -> Any:
    """A share of an epoch."""
    share = typed(value, float)
    if not 0 < share <= 1:
        raise ValueError("a share of an epoch lies in (0, 1]")
    if not asks(values, *_EVALUATION):
        return _NO_EVALUATION
    epochs = values.get("epochs") if _counts("epoch", values) else None
    if share == 1 or epochs is None:
        return Several({"eval_strategy": "epoch"})
    return Several({"eval_strategy": "steps", "eval_steps": share / typed(epochs, float)})


def _records(value: Any, values: Values) -> Any:
    if is_none(value):
        return DROP
    if not asks(values, *_EVALUATION):
        return _NO_EVALUATION
    number = typed(value, float)
    if number < 1 or not number.is_integer():
        raise ValueError("it is a number of records: use a whole number from 1 on")
    return int(number)


def _patience(value: Any, values: Values) -> Any:
    if is_none(value):
        return DROP
    if not asks(values, *_EVALUATION):
        return _NO_EVALUATION
    if not asks(values, "validation_step_interval_prop", "eval_strategy", "evaluation_strategy"):
        return Gone("nothing is evaluated while the model trains")
    return value


def _metrics(value: Any, values: Values) -> Any:
    """Texts are generated where one of the metrics is of texts."""
    asked = {str(name).lower() for name in (value if isinstance(value, list) else [value])}
    if not asked - {"ppl", "perplexity", "loss", "none"}:
        return Gone("an evaluation measures loss, perplexity and token accuracy")
    return 0 if asks(values, *_EVALUATION) else _NO_EVALUATION


# ---- devices ----


def _device(value: Any) -> Any:
    if str(value).lower() == "cpu":
        return Several({"use_cpu": True})
    return Gone("torchrun --nproc_per_node and CUDA_VISIBLE_DEVICES choose the devices")


def _fsdp(value: Any, values: Values) -> Any:
    """FSDP2 as far as it has these settings; they count where fsdp_train is true."""
    if not isinstance(value, dict):
        raise ValueError("it must be an object")
    same_key(
        ("cpu_offload", "amp_training", "wrap_policy", "size_based", "transformer_based"), value, "fsdp_hyperparameters"
    )
    if not ("fsdp_train" in values and flag(values["fsdp_train"])):
        return Gone("fsdp_train is not true")
    config: dict[str, Any] = {}
    if flag(value.get("cpu_offload", False)):
        config["cpu_offload"] = True
    wrapped = value.get("transformer_based") or {}
    if not isinstance(wrapped, dict):
        raise ValueError("transformer_based in it must be an object")
    layers = wrapped.get("fsdp_layer_cls")
    if value.get("wrap_policy") == "transformer_based" and layers:
        config["transformer_layer_cls_to_wrap"] = names(layers)
    new: dict[str, Any] = {"fsdp_config": config} if config else {}
    if flag(value.get("amp_training", False)) and not asks(values, "amp_training", "bf16", "fp16"):
        new |= _amp(True, values).values
    note = "size_based wrapping is gone: layers are sharded as the model groups them" if not layers else None
    return Several(new, note=note)


LR0: dict[str, Old] = {
    "train_type": Old(None, Only(("llm", "none", "null"), "language models alone are trained here")),
    "model": Old(
        "model_name_or_path", seeing=_model, doc="unless model_size says that it is a name inside that trainer"
    ),
    "model_size": Old(None, note="model_name_or_path names the model"),
    "name": Old("run_name", seeing=_name, doc="with project, output_dir is project/name", also=("output_dir",)),
    "data_train_type": Old("task_type", _kinds, doc="qa and sft are sft, ar is pretrain"),
    "is_multi_turn": Old(None, note="records have the turns that they have; train_on says which are learned"),
    "user_prompt_masking_start_step": Old(
        None, Only((*NONE, "0"), "prompts are learned in every step (train_on: all) or in none; leave it out")
    ),
    "add_bos_token_when_response_start": Old(
        None, note="chat template and tokenizer say where a BOS stands, as at inference"
    ),
    "add_eos_token_when_response_end": Old(
        None, Only(("true", "1", "yes"), _NO_STOP), "the end of every answer is learned"
    ),
    "pad_token_id": Old(None, _pad, "add, null or a number: padding is never seen or scored"),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), Old(None, Only(("none", "null"), TOKENS))),
    **dict.fromkeys(("cls_token_id", "sep_token_id", "unk_token_id"), Old(None, note="no row of training has it")),
    "data_verbose": Old(None, note="data_report.json and hf-sft inspect show the data"),
    "train_verbose": Old(None, note="disable_tqdm and log_level say how much is shown"),
    "inference_result_verbose": Old(None, note="answers are in predictions.jsonl and in the report"),
    "generation_max_time": Old(
        None, note="generation_max_new_tokens limits an answer, max_generation_seconds all of them"
    ),
    "del_logits_after_forward": Old(None, note="the logits of a step never stand in memory at once"),
    "deterministic": Old("full_determinism"),
    "device": Old("use_cpu", _device, doc="cpu; other devices are chosen by the launcher and CUDA_VISIBLE_DEVICES"),
    "workers": Old("dataloader_num_workers"),
    "total_cpu_use": Old(None, note="the environment variable OMP_NUM_THREADS sets the threads"),
    "bit": Old(
        "quantization",
        seeing=_bit,
        doc="4: nf4, 8: int8 (qlora); 16, 32 and names: dtype under an adapter, bf16 or fp16 under full training",
        also=("dtype", "bf16", "fp16"),
    ),
    "quant_config": Old(
        "double_quantization", seeing=_quant_config, doc="its file is read; bit says what is quantised"
    ),
    "load_unnecessary_half": Old(None, note="dtype, bf16 and fp16 say what is held and computed in which type"),
    "half_inference": Old(None, note="an evaluation computes as training does (bf16, fp16), on the same weights"),
    "amp_training": Old("fp16", seeing=_amp, doc="bf16 where bit is bfloat16", also=("bf16",)),
    "peft_config_path": Old(
        "train_mode",
        seeing=_peft,
        doc="the fields of its LoraConfig (JSON or YAML); false is full training, and bit 4 or 8 makes it qlora",
        also=tuple(_PEFT.values()),
    ),
    "adapter_save_type": Old(
        None,
        Only(("adapter_only", "merge", "none", "null"), "it must be merge or adapter_only"),
        "the adapter is saved; hf-sft merge writes the merged model",
    ),
    "fsdp_train": Old("fsdp", lambda value: True if flag(value) else DROP),
    "fsdp_hyperparameters": Old(
        "fsdp_config",
        seeing=_fsdp,
        doc=f"cpu_offload and fsdp_layer_cls; amp_training is bf16 or fp16; of size_based: {FSDP.split(';')[0]}",
        also=("bf16", "fp16"),
    ),
    "optimizer_step_criterion": Old(None, seeing=_epochs_or_steps, note="it says whether epochs or steps count"),
    "epochs": Old("num_train_epochs", seeing=_epochs),
    "warmup_epochs": Old("warmup_steps", seeing=_warmup_epochs, note="as a share of all steps"),
    "steps": Old("max_steps", seeing=_steps),
    "lr0": Old("learning_rate"),
    "lrf": Old(
        "lr_scheduler_type",
        seeing=_final_rate,
        note="the last learning rate is lrf times the first",
        also=("lr_scheduler_kwargs",),
    ),
    "scheduler_type": Old("lr_scheduler_type", seeing=_scheduler),
    "momentum": Old("adam_beta1", note="it was the first beta of AdamW"),
    "warmup_momentum": Old(None, note="the betas of AdamW do not change during training"),
    "early_stop_criterion": Old("early_stopping_patience", seeing=_patience, note="evaluations without an improvement"),
    "ema_updating": Old("ema_decay", lambda value: _EMA_DECAY if flag(value) else DROP, note=_EMA_NOTE),
    "common": Old(None, note="losses and learning rate are always logged"),
    "metrics": Old(
        "generation_eval_steps",
        seeing=_metrics,
        doc="0 (in every evaluation) where one of them is of generated text; answers are scored by all that can be computed",
    ),
    "fast_validation_n": Old("max_eval_samples", seeing=_records, doc="a number of records, not a share"),
    "fast_validation_step_interval": Old(
        None, note="an evaluation takes every batch; max_eval_samples makes it shorter"
    ),
    "validation_step_interval_prop": Old(
        "eval_strategy", seeing=_validation_interval, note="a share of an epoch", also=("eval_steps",)
    ),
    "tensorboard_logging_interval": Old("logging_steps"),
}
