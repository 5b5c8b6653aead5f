"""docs/migrating.md, made of the table: what became of every old key, by origin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hf_sft.legacy.hugging_face import HUGGING_FACE
from hf_sft.legacy.llama_factory import LLAMA_FACTORY
from hf_sft.legacy.lr0 import LR0
from hf_sft.legacy.preferences import PREFERENCES
from hf_sft.legacy.rules import Old
from hf_sft.legacy.scripts import SCRIPTS
from hf_sft.legacy.tracking import ENVIRONMENT, TRACKING
from hf_sft.legacy.translate import LEGACY, MODE_FLAGS
from hf_sft.legacy.wedlm import WEDLM

_INTRO = """\
# Old configurations

Files and flags of older fine-tuning scripts run as they are: `hf-sft train old.yaml`, `train.py --data_path a.json --use_lora`.
Old keys are translated, and each translation is a line in the log. What cannot be honoured is an error with the way out, and
an unknown key is an error that names the nearest one. To have the new names in a file:

    hf-sft migrate old.json new.yaml       # old: .json, .yaml, or a shell script (.sh) with the training command
    hf-sft migrate new.yaml -- --data_path a.json --use_lora True --lora_r 64
    hf-sft migrate new.yaml -- torchrun --nproc_per_node 8 finetune.py --data_path a.json --use_lora True

The new file has a comment beside each key that was called otherwise and, at its end, the keys that have no counterpart, with the
reason; a `.json` has no comments, so they are printed. It gives the same arguments as the old one and parses without a line. A
file that exists is never written over. Secrets (`wandb_key`, `hub_token`) are neither written nor logged.

Two things that older scripts do without a key for them:

- A batch is of records there; here `per_device_train_batch_size` counts rows, each with several documents. A file (or a command
  line) with an old key and a batch size for training becomes `packing: false`, so that it takes as many steps as it did. Training
  is faster with `packing: true`, which is never changed; the steps are then fewer and larger.
- `cutoff_len`, `model_max_length`, `max_length`, `max_seq_len` and `seq_length` cut longer records, and so does Firefly's
  `max_seq_length` (beside `template_name` or `tokenize_num_workers`): they become `overlength: truncate`, where `overlength` says
  nothing else. By default, longer records are dropped.

Neither holds for texts (`task_type: pretrain`), which are packed and split, and for WeDLM, whose two streams need a packed
layout; nor is packing touched where `attention_backend` names one that packs. A key on the command line replaces the file's key
of the same name, and wins over another name for it.

This page is made from the table in `hf_sft/legacy` (`hf-sft migrate --table`).
"""
# The names that a script has beside those of TrainingArguments, the ones that stayed among them.
_FIREFLY = """
    model_name_or_path train_file eval_file max_seq_length task_type train_mode template_name tokenize_num_workers
    max_prompt_length beta lora_rank lora_alpha lora_dropout use_unsloth pretrain_train_file min_lr
""".split()
_WEDLM = """
    model_path train_data output_dir max_seq_length trust_remote_code block_size mask_per_block loss_weighting_scheme
    num_learnable_im_end enable_ar_loss ar_loss_weight attention_backend rebuild_cache
""".split()
_QWEN = """
    model_name_or_path data_path eval_data_path lazy_preprocess cache_dir model_max_length use_lora q_lora lora_r lora_alpha
    lora_dropout lora_target_modules lora_weight_path lora_bias flash_attn padding_side trust_remote_code
    gradient_checkpointing evaluation_strategy
""".split()
_PYGMALION = """
    model_name_or_path train_file eval_file use_lora lora_rank lora_alpha lora_dropout lora_target_modules uft use_xformers
    apply_xformers low_cpu_mem_usage model_load_delay_per_rank enable_profiler add_special_tokens
""".split()
_LR0 = """
    seed data_path template_dir project attn_implementation max_length batch_size warmup_steps weight_decay
    gradient_accumuate_step gradient_checkpointing model_cache_dir
""".split()
_REMARKS = {"project": "with `name`, `output_dir` is project/name"}
_PREFERENCES = "stage max_length max_prompt_length label_smoothing simpo_gamma".split()
ORIGINS: list[tuple[str, str, Iterable[str]]] = [
    ("Firefly", "JSON files with `train_mode` and `template_name`.", _FIREFLY),
    (
        "WeDLM (Tencent)",
        "YAML files with `model_path`, `train_data` and `use_deepspeed`. They name no objective; it becomes `objective: wedlm`.",
        [*_WEDLM, *WEDLM],
    ),
    (
        "Qwen and FastChat",
        "Flags of `finetune.py`. `--lazy_preprocess` is honoured; training is faster without it.",
        _QWEN,
    ),
    (
        "Pygmalion",
        "Flags of `hf_trainer.py`. Its `.arrow` files are read as they are: token rows `{input_ids, labels}`, or, with `--uft`, "
        "bare token ids.",
        _PYGMALION,
    ),
    (
        "`lr0`, `lrf` and `epochs`",
        "YAML files with `lr0`, `lrf`, `bit` and `peft_config_path`. Paths in them are read from the folder in which the command "
        "runs.",
        [*_LR0, *LR0],
    ),
    ("Preferences: TRL, LLaMA-Factory", "DPO, ORPO and SimPO.", [*_PREFERENCES, *PREFERENCES]),
    (
        "Weights & Biases",
        "`wandb_project`, `wandb_entity`, `wandb_group` and `wandb_base_url` stay; they become environment variables "
        "("
        + ", ".join(f"`{name}`" for name in list(ENVIRONMENT.values())[:-1])
        + ") of a process that reports to wandb.",
        [*ENVIRONMENT, *TRACKING],
    ),
    ("transformers", "Arguments of the Trainer that version 5 removed or renamed.", HUGGING_FACE),
    (
        "Other keys of many scripts",
        "LLaMA-Factory, Alpaca-LoRA and others.",
        [key for key in (*LLAMA_FACTORY, *MODE_FLAGS, *SCRIPTS) if key not in {*_FIREFLY, *_QWEN, *_PYGMALION, *LR0}],
    ),
]


def page() -> str:
    """docs/migrating.md."""
    parts = [_INTRO]
    for title, text, keys in ORIGINS:
        rows = "\n".join(_row(key, LEGACY) for key in dict.fromkeys(keys))
        parts.append(f"## {title}\n\n{text}\n\n| old | new | |\n|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def _row(key: str, table: Mapping[str, Old]) -> str:
    if key in MODE_FLAGS:
        return f"| `{key}` | `train_mode` | {MODE_FLAGS[key]}; both together are qlora |"
    if key in ENVIRONMENT:
        return f"| `{key}` | the same | `{ENVIRONMENT[key]}` |"
    if key not in table:
        return f"| `{key}` | the same | {_REMARKS.get(key, '')} |".replace("|  |", "| |")
    rule = table[key]
    new = ", ".join(f"`{name}`" for name in rule.keys) or "-"
    text = rule.doc or rule.why or rule.note
    return f"| `{key}` | {new} | {text} |".replace("|  |", "| |")
