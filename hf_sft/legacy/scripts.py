"""Keys that many fine-tuning scripts share, among them Firefly, the finetune.py of Qwen and FastChat, Alpaca-LoRA,
LLaMA-Factory and Pygmalion's training code."""

from __future__ import annotations

from typing import Any

from hf_sft.legacy.hugging_face import ATTENTION, schedule_key
from hf_sft.legacy.rules import (
    DROP,
    NONE,
    Old,
    Only,
    Several,
    Values,
    asks,
    choice,
    is_none,
    names,
    share,
    typed,
    unless_none,
    when,
)

TOKENS = "the tokenizer's own tokens count: set it in its tokenizer_config.json; new_special_tokens adds tokens"
QUANTISED = ("load_in_4bit", "load_in_8bit", "quantization_bit")
_OWN_TEMPLATE = "name one in chat_template, or leave it out: the tokenizer's own counts"
_FREEZE = (
    "layers are frozen by patterns for names of parameters here: name them in freeze, such as model.layers.[0-9].*, and leave "
    "this out"
)
# Names of templates that are another name's here.
_TEMPLATES = {"qwen": "chatml", "yi": "chatml", "internlm2": "chatml", "mixtral": "mistral", "phi": "phi3"}


def _percentage(value: Any) -> Any:
    found = share(value)
    return found if found is DROP else found / 100


def _template(value: Any) -> Any:
    return DROP if is_none(value) or value == "default" else _TEMPLATES.get(str(value).lower(), value)


def _finetuning_type(value: Any, values: Values) -> Any:
    """QLoRA is LoRA with a key for the base's bits there."""
    if str(value).lower() == "freeze":
        raise ValueError(_FREEZE)
    return "qlora" if str(value).lower() == "lora" and asks(values, *QUANTISED) else value


def _batch_size(value: Any, values: Values) -> Any:
    """Of one process, and for evaluation as well; beside ``micro_batch_size`` it is that of a whole step."""
    if asks(values, "micro_batch_size"):
        raise ValueError(
            "beside micro_batch_size it counts the documents of a step: leave it out, and set gradient_accumulation_steps to "
            "batch_size / (micro_batch_size x processes)"
        )
    size = typed(value, int)
    both = {"per_device_train_batch_size": size, "per_device_eval_batch_size": size}
    if asks(values, "per_device_eval_batch_size", "per_gpu_eval_batch_size", "eval_batch_size", "val_batch_size"):
        both.pop("per_device_eval_batch_size")
    return Several(both)


def _eval_every(value: Any) -> Any:
    return Several({"eval_strategy": "steps", "eval_steps": value})


def _delay(value: Any) -> Any:
    return 1 if value is not None and typed(value, float) > 0 else DROP


def _special_tokens(value: Any) -> Any:
    if is_none(value):
        return DROP
    return [token for token in value.split(",") if token] if isinstance(value, str) else value


SCRIPTS: dict[str, Old] = {
    **dict.fromkeys(
        ("data_path", "train_data", "train_data_path", "train_data_file", "dataset_path", "dataset_name",
         "pretrain_train_file"), Old("train_file"),
    ),
    **dict.fromkeys(
        ("eval_data_path", "eval_data", "eval_data_file", "validation_file", "valid_file", "dev_file"),
        Old("eval_file", unless_none),
    ),
    **dict.fromkeys(
        ("model_path", "model_name", "base_model", "pretrained_model_name_or_path"), Old("model_name_or_path")
    ),
    **dict.fromkeys(
        ("max_length", "model_max_length", "cutoff_len", "max_seq_len", "seq_length"), Old("max_seq_length")
    ),
    **dict.fromkeys(("val_size", "val_set_size", "validation_split"), Old("eval_split", share)),
    "validation_split_percentage": Old("eval_split", _percentage, "as a share"),
    **dict.fromkeys(("eos_token", "pad_token", "bos_token"), Old(None, Only(("none", "null"), TOKENS))),
    **dict.fromkeys(("lora_r", "lora_dim"), Old("lora_rank")),
    "num_epochs": Old("num_train_epochs"),
    "lr": Old("learning_rate"),
    "lr_scheduler": schedule_key(),
    "batch_size": Old(
        "per_device_train_batch_size",
        seeing=_batch_size,
        doc="of one process; with packing it counts bins",
        also=("per_device_eval_batch_size",),
    ),
    **dict.fromkeys(("micro_batch_size", "train_batch_size"), Old("per_device_train_batch_size")),
    **dict.fromkeys(("eval_batch_size", "val_batch_size"), Old("per_device_eval_batch_size")),
    **dict.fromkeys(
        ("gradient_accumulation", "gradient_accumulation_step", "gradient_accumuate_step", "accumulation_steps",
         "accumulate_grad_batches", "grad_accum_steps"),
        Old("gradient_accumulation_steps"),
    ),
    **dict.fromkeys(("grad_clip", "clip_grad_norm", "max_norm"), Old("max_grad_norm")),
    **dict.fromkeys(("save_every", "save_interval"), Old("save_steps")),
    **dict.fromkeys(("log_every", "log_interval", "logging_interval"), Old("logging_steps")),
    **dict.fromkeys(("eval_every", "eval_interval"), Old("eval_steps", _eval_every, also=("eval_strategy",))),
    **dict.fromkeys(("lora_target", "target_modules"), Old("lora_target_modules", names)),
    **dict.fromkeys(("additional_target", "lora_modules_to_save"), Old("modules_to_save", names)),
    **dict.fromkeys(
        ("lora_weight_path", "lora_path", "adapter_path", "peft_path"), Old("adapter_name_or_path", unless_none)
    ),
    **dict.fromkeys(
        ("template_name", "template", "prompt_template"),
        Old("chat_template", _template, doc="qwen and yi are chatml; without one, the tokenizer's own counts"),
    ),
    "template_dir": Old(
        None, Only(NONE, f"templates are Jinja chat templates here: {_OWN_TEMPLATE}"),
        "the tokenizer's own chat template counts",
    ),
    **dict.fromkeys(("tokenize_num_workers", "dataset_num_proc", "num_proc"), Old("preprocessing_num_workers")),
    **dict.fromkeys(("default_system", "system"), Old("system_prompt", unless_none)),
    **dict.fromkeys(("dataset_format", "dataset_type"), Old("data_format")),
    "max_samples": Old("max_train_samples"),
    "split_special_tokens": Old("special_tokens_in_text", when("text")),
    **dict.fromkeys(("overwrite_cache", "overwrite_data_cache"), Old("rebuild_cache")),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), Old("train_on", when("all"))),
    "mask_history": Old("train_on", when("last")),
    "finetuning_type": Old(
        "train_mode", seeing=_finetuning_type, doc="lora with a key for the base's bits is qlora; freeze is a key of its own"
    ),
    **dict.fromkeys(
        ("freeze_trainable_layers", "freeze_extra_modules", "freeze_layers", "num_layer_trainable"),
        Old(None, Only(("none", "null"), _FREEZE), "see freeze"),
    ),
    "freeze_trainable_modules": Old(None, Only(("all", "none", "null"), _FREEZE), "see freeze"),
    "stage": Old("task_type", choice({"pt": "pretrain"})),
    "load_in_4bit": Old("quantization", when("nf4")),
    "load_in_8bit": Old("quantization", when("int8")),
    "quantization_bit": Old("quantization", lambda value: choice({"4": "nf4", "8": "int8"})(unless_none(value))),
    "use_double_quant": Old("double_quantization"),
    "bnb_4bit_use_double_quant": Old("double_quantization"),
    "bnb_4bit_quant_type": Old(
        None, Only(("nf4",), "the 4-bit type is nf4; leave it out"), "quantization is nf4 by default"
    ),
    "bnb_4bit_compute_dtype": Old(None, note="a quantised base computes in the type of bf16 or fp16"),
    **dict.fromkeys(
        ("flash_attn", "use_flash_attn", "use_flash_attention_2"),
        Old(None, Only((*NONE, "auto", "disabled", "sdpa"), ATTENTION)),
    ),
    **dict.fromkeys(
        ("use_xformers", "apply_xformers"), Old(None, note="PyTorch's own attention needs no more memory than xFormers'")
    ),
    "use_unsloth": Old(None, note="training runs on transformers and PEFT alone; what is learned is the same"),
    "cache_dir": Old(None, note="the hub's cache is set by the environment variable HF_HUB_CACHE"),
    "model_cache_dir": Old(None, note="the hub's cache is set by the environment variable HF_HUB_CACHE"),
    "padding_side": Old(None, note="documents are packed; where they are padded, no padding is seen or scored"),
    "low_cpu_mem_usage": Old(None, note="weights are always read without a second copy"),
    "device_map": Old(
        None, Only((*NONE, "auto"), "each process has a device, and large models are sharded: use zero_stage 3 or fsdp"),
        "each process has a device; zero_stage 3 and fsdp shard large models",
    ),
    "model_load_delay_per_rank": Old("max_loading_processes", _delay, "processes take turns at loading instead of waiting"),
    "enable_profiler": Old(None, note="training is not profiled here; run it under a profiler of your own"),
    "add_special_tokens": Old("new_special_tokens", _special_tokens),
    "uft": Old(
        "task_type", when("pretrain"), "every token is learned; an .arrow file of it holds one text in each record batch"
    ),
    "plot_loss": Old(None, note="trainer_state.json has the losses; report_to draws them"),
}  # fmt: skip
MODE_FLAGS = {"use_lora": "lora", "use_peft": "lora", "use_qlora": "qlora", "q_lora": "qlora", "qlora": "qlora"}


def quantised(values: Values) -> bool:
    """Whether a key asks for a quantised base, which is trained as qlora."""
    return asks(values, *QUANTISED) or str(values.get("bit")) in ("4", "8")
