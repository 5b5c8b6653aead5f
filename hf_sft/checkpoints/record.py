"""The record of a run: args.json, what makes a run this run, and the versions it ran on; secrets stay out."""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import hf_sft
from hf_sft.arguments import GROUPS
from hf_sft.conversion import is_secret
from hf_sft.data.cache import write_file

ARGUMENTS_FILE = "args.json"
# Groups of an args.json that say of the given values what came of them, and what they are where nobody gives them.
RESOLVED, DEFAULTS = "resolved", "defaults"
# What two runs must share for the second to go on with the first.
IDENTITY_FIELDS = (
    "model_name_or_path", "model_revision", "config_name_or_path", "config_overrides", "tokenizer_name_or_path",
    "new_special_tokens", "train_mode", "dtype", "quantization", "double_quantization",
    "lora_rank", "lora_alpha", "lora_target_modules", "lora_bias", "use_dora", "use_rslora", "modules_to_save",
    "train_file_hash", "max_train_samples", "eval_split", "data_format", "task_type", "objective", "train_on",
    "dpo_loss_type", "max_prompt_length", "max_answer_length", "chat_template",
    "chat_template_kwargs", "system_prompt", "special_tokens_in_text", "lazy_preprocess", "streaming", "shuffle_buffer",
    "block_size", "mask_per_block", "mask_sampling", "loss_weighting_scheme", "num_learnable_im_end", "mask_token",
    "mask_token_id", "enable_ar_loss", "ar_loss_weight", "max_seq_length", "overlength", "split_overlap", "pretrain_packing",
    "packing", "seed", "data_seed", "train_sampling_strategy", "freeze",
)  # fmt: skip
# What says nothing about the training: another value of these is not worth a line.
INCIDENTAL = frozenset({
    "resume_from_checkpoint", "output_dir", "local_rank", "run_name", "project", "disable_tqdm", "log_level", "log_level_replica",
    "log_on_each_node", "ddp_timeout", "enable_jit_checkpoint", "platform",
})  # fmt: skip
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "deepspeed")


def save_arguments(folder: str | os.PathLike[str], arguments: Mapping[str, Any]) -> str:
    """Write args.json: ``arguments`` (groups of plain values, such as {"model": asdict(model_args)}) and package versions.

    Values under keys that name a secret are left out, and the environment is never written. Returns the path.
    """
    record = {**_without_secrets(arguments), "versions": versions()}
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
    return str(write_file(Path(folder) / ARGUMENTS_FILE, text + "\n"))


def versions() -> dict[str, str]:
    """Python and the packages that a run's result depends on, as installed."""
    found = {"python": platform.python_version(), "hf_sft": hf_sft.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def identity(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of grouped ``arguments`` that make a run this run (IDENTITY_FIELDS), as they were given."""
    groups = [
        group for key, group in arguments.items() if key not in (RESOLVED, DEFAULTS) and isinstance(group, Mapping)
    ]
    flat = {name: value for group in groups for name, value in group.items()}
    return {name: flat[name] for name in IDENTITY_FIELDS if name in flat}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two grouped records beside their identity, one sentence for each value: "seed was 1 and is 2".

    Fields that only one of them has are not named: it may be of another version.
    """
    lines = []
    for key, group in now.items():
        old = before.get(key)
        if key in (RESOLVED, DEFAULTS) or not isinstance(group, Mapping) or not isinstance(old, Mapping):
            continue
        lines += [
            f"{name} was {old[name]!r} and is {value!r}"
            for name, value in as_json(group).items()
            if name in old and old[name] != value and name not in INCIDENTAL and name not in IDENTITY_FIELDS
        ]
    return lines


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """An args.json as :func:`save_arguments` wrote it.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        identity(record)
        return dict(record)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); choose another output_dir.") from error


@functools.lru_cache(maxsize=1)
def argument_defaults() -> dict[str, Any]:
    """Name -> default of every argument, as it comes back from JSON."""
    from hf_sft.training_arguments import TrainingArguments

    found = {}
    for each in (entry for cls in (TrainingArguments, *GROUPS) for entry in fields(cls)):
        if each.default_factory is not MISSING:
            found[each.name] = as_json(each.default_factory())
        elif each.default is not MISSING:
            found[each.name] = as_json(each.default)
    return found


def other_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> default of each of the grouped ``arguments`` that has another value: who reads them later needs no transformers."""
    known = argument_defaults()
    flat = {name: value for group in arguments.values() for name, value in as_json(group).items()}
    return {name: known[name] for name, value in flat.items() if name in known and value != known[name]}


def as_json(value: Any) -> Any:
    """As it comes back from an args.json."""
    return json.loads(json.dumps(_without_secrets(value), default=str))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _without_secrets(v) for k, v in value.items() if not (is_secret(str(k)) and isinstance(v, str))}
    return [_without_secrets(item) for item in value] if isinstance(value, (list, tuple)) else value
