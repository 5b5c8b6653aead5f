"""What is written is read back: adapters, weights, checkpoints to resume from, and the record of a run.

Nothing here deletes anything of a user's.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import tempfile
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import hf_sft

logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "args.json"
RESOLVED = "resolved"  # the group of an args.json that says what came of the given values
# What two runs must share for the second to go on with the first.
IDENTITY_FIELDS = (
    "model_name_or_path", "model_revision", "config_name_or_path", "config_overrides", "tokenizer_name_or_path",
    "new_special_tokens", "train_mode", "dtype", "quantization", "double_quantization",
    "lora_rank", "lora_alpha", "lora_target_modules", "lora_bias", "use_dora", "use_rslora", "modules_to_save",
    "train_file_hash", "max_train_samples", "eval_split", "data_format", "task_type", "objective", "train_on", "chat_template",
    "chat_template_kwargs", "system_prompt", "special_tokens_in_text", "lazy_preprocess", "streaming", "shuffle_buffer",
    "block_size", "mask_per_block", "mask_sampling", "loss_weighting_scheme", "num_learnable_im_end", "mask_token",
    "mask_token_id", "enable_ar_loss", "ar_loss_weight", "max_seq_length", "overlength", "packing", "seed", "data_seed",
    "train_sampling_strategy", "global_batch_size",
)  # fmt: skip
# What only a run that has ended leaves at the top of its folder.
_RESULTS = ("*.safetensors", "adapter_config.json", "config.json", "trainer_state.json", "*_results.json")
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "deepspeed")
_SECRET = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|credentials?)s?($|_)", re.IGNORECASE)
_NOT_SECRET = frozenset({"mask_token", "pad_token", "eos_token", "bos_token", "unk_token"})
Shapes = dict[str, tuple[int, ...]]


class CheckpointError(RuntimeError):
    """Something written is incomplete or unreadable; the message names the file and the tensor."""


# Weights


def verify_adapter(folder: str | os.PathLike[str], model: nn.Module) -> None:
    """Check that ``folder`` holds the whole adapter of ``model`` (a PeftModel): keys, shapes, nothing empty, readable.

    Only headers are read. Whole vocabulary matrices that PEFT saves beside the adapter may be there.

    Raises:
        CheckpointError: naming what is missing or wrong.
    """
    path = Path(folder)
    config = path / "adapter_config.json"
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Adapter {path}: adapter_config.json cannot be read ({error}).") from error
    found = _header(path / "adapter_model.safetensors")
    required, allowed = _adapter_shapes(model, False), _adapter_shapes(model, True)
    _compare(f"Adapter {path}", found, required, allowed)


def verify_weights(folder: str | os.PathLike[str], model: Any) -> None:
    """Check that ``folder`` holds the whole of ``model`` (a PreTrainedModel) by the headers of its safetensors files.

    Raises:
        CheckpointError: naming what is missing or wrong.
    """
    from transformers.core_model_loading import revert_weight_conversion

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"Model {path}: config.json is missing.")
    found = weight_shapes(path)
    # Some tensors are stored in another form than they are used, such as fused experts.
    stored = revert_weight_conversion(model, _blank(model.state_dict(keep_vars=True)))
    expected = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    held = {id(stored[name]) for name in found if name in stored}  # of tied tensors the file holds one
    required = {name: shape for name, shape in expected.items() if name in found or id(stored[name]) not in held}
    _compare(f"Model {path}", found, required, expected)


def weight_shapes(folder: Path, stem: str = "model") -> Shapes:
    """Names and shapes of all tensors in ``stem``.safetensors or its shards, from their headers.

    Raises:
        CheckpointError: no weights, an unreadable file, a shard or tensor that the index names and that is not there.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return _header(folder / f"{stem}.safetensors")
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{index} cannot be read ({error}).") from error
    shapes: Shapes = {}
    for shard in sorted(set(weight_map.values())):
        shapes.update(_header(folder / shard))
    if missing := sorted(set(weight_map) - set(shapes)):
        raise CheckpointError(f"{index} names {len(missing)} tensors that no shard holds, for example {missing[0]}.")
    return shapes


def _adapter_shapes(model: Any, with_embeddings: bool) -> Shapes:
    """Names and whole shapes of the adapter's tensors, without copying or gathering any."""
    from peft import get_peft_model_state_dict

    blank = _blank(model.state_dict(keep_vars=True))
    adapter = model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapter[0]
    state = get_peft_model_state_dict(model, blank, adapter_name=adapter, save_embedding_layers=with_embeddings)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _compare(what: str, found: Shapes, required: Shapes, allowed: Shapes) -> None:
    if empty := sorted(
        name for name, shape in found.items() if _count(shape) == 0 and _count(required.get(name, (1,)))
    ):
        raise CheckpointError(f"{what}: {len(empty)} tensors are empty, for example {empty[0]} {found[empty[0]]}.")
    if missing := sorted(set(required) - set(found)):
        raise CheckpointError(
            f"{what}: {len(missing)} of {len(required)} tensors are missing, for example {missing[0]}."
        )
    if extra := sorted(set(found) - set(required) - set(allowed)):
        raise CheckpointError(f"{what}: {len(extra)} tensors are not the model's, for example {extra[0]}.")
    for name, shape in found.items():
        if shape != (expected := required.get(name, allowed.get(name))):
            raise CheckpointError(f"{what}: {name} has shape {shape}, the model has {expected}.")


def _header(path: Path) -> Shapes:
    """Shapes in a safetensors file; a truncated one is found by its header."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} ({path.stat().st_size} bytes) cannot be read: {error}.") from error


def _blank(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of the same whole shapes without any numbers; names that share a tensor share its blank."""
    blanks = {
        id(tensor): torch.empty(tensor.shape, device="meta") for tensor in tensors.values() if torch.is_tensor(tensor)
    }
    return {name: blanks[id(tensor)] for name, tensor in tensors.items() if torch.is_tensor(tensor)}


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


# The record of a run


def save_arguments(folder: str | os.PathLike[str], arguments: Mapping[str, Any]) -> str:
    """Write args.json: ``arguments`` (groups of plain values, such as {"model": asdict(model_args)}) and package versions.

    Values under keys that name a secret are left out, and the environment is never written. Returns the path.
    """
    target = Path(folder) / ARGUMENTS_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {**_without_secrets(arguments), "versions": versions()}, indent=2, ensure_ascii=False, default=str
    )
    handle, beside = tempfile.mkstemp(dir=target.parent, prefix=f".{ARGUMENTS_FILE}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.chmod(beside, 0o644)
        os.replace(beside, target)
    except BaseException:
        os.unlink(beside)
        raise
    return str(target)


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
    groups = [group for key, group in arguments.items() if key != RESOLVED and isinstance(group, Mapping)]
    flat = {name: value for group in groups for name, value in group.items()}
    return {name: flat[name] for name in IDENTITY_FIELDS if name in flat}


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(k): _without_secrets(v) for k, v in value.items() if not (_is_secret(str(k)) and isinstance(v, str))
        }
    return [_without_secrets(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_secret(key: str) -> bool:
    return key not in _NOT_SECRET and _SECRET.search(key) is not None


# Checkpoints and resuming


def incomplete(checkpoint: str | os.PathLike[str]) -> str | None:
    """Why training cannot go on from ``checkpoint``, or None if it is complete."""
    path = Path(checkpoint)
    if not path.is_dir():
        return "it is no folder"
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"trainer_state.json cannot be read ({error})"
    try:
        if (path / "adapter_config.json").is_file():
            shapes = _header(path / "adapter_model.safetensors")
        else:
            shapes = weight_shapes(path)
    except CheckpointError as error:
        return str(error)
    if not shapes or any(_count(shape) == 0 for shape in shapes.values()):
        return "its weights are empty"
    return _incomplete_state(path)


def _incomplete_state(path: Path) -> str | None:
    """The same for optimizer, scheduler and random states."""
    random_states = sorted(path.glob("rng_state*.pth"))
    files = [*random_states, path / "scheduler.pt", path / "optimizer.pt"]
    if not random_states:
        return "rng_state.pth is missing"
    for file in files:
        if not file.is_file():
            return f"{file.name} is missing"
        if file.stat().st_size == 0 or not zipfile.is_zipfile(
            file
        ):  # torch saves zip archives; their end is written last
            return f"{file.name} ({file.stat().st_size} bytes) was not written to its end"
    return None


def steps_of(checkpoint: str | os.PathLike[str]) -> tuple[int, int]:
    """Optimizer steps that ``checkpoint`` has behind it, and those that its run was to take in all."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"]), int(state["max_steps"])


def _checkpoints(folder: Path) -> list[Path]:
    """``checkpoint-N``, newest first."""
    numbered = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest ``checkpoint-N`` that training can go on from; what is skipped is logged with the reason."""
    for path in _checkpoints(Path(output_dir)):
        reason = incomplete(path)
        if reason is None:
            return str(path)
        logger.warning("Checkpoint %s is skipped: %s.", path, reason)
    return None


def resolve_resume(output_dir: str | os.PathLike[str], value: str | bool | None) -> str | None:
    """The checkpoint to go on from: none for None or false, the newest complete one for true or "auto", or the given path.

    Raises:
        ValueError: the given path is no complete checkpoint.
    """
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (None, False, "", "false", "none", "no"):
        return None
    if word in (True, "true", "auto", "yes"):
        found = last_complete_checkpoint(output_dir)
        logger.info("Resuming from %s.", found) if found else logger.info(
            "No complete checkpoint in %s; starting anew.", output_dir
        )
        return found
    if (reason := incomplete(str(value))) is not None:
        raise ValueError(
            f"resume_from_checkpoint {value!r} cannot be resumed: {reason}. Name a complete checkpoint-N folder, or set auto."
        )
    return str(value)


def check_output_dir(
    output_dir: str | os.PathLike[str], identity: Mapping[str, Any], resume: str | bool | None
) -> None:
    """Refuse a folder that cannot be written to, and another run's.

    Args:
        identity: the fields that make this run what it is, as :func:`identity` gives them.
        resume: the value of resume_from_checkpoint.

    Raises:
        ValueError: no folder can be there; or it holds a run and nothing is resumed, or one that differs in ``identity``, or one
            that is finished and left no checkpoint to go on from.
    """
    folder = Path(output_dir)
    _check_writable(folder)
    held = {
        sign: sorted(path.name for path in folder.glob(sign)) for sign in (ARGUMENTS_FILE, "checkpoint-*", *_RESULTS)
    }
    names = sorted({name for found in held.values() for name in found})
    if not names:
        return
    where = f"output_dir {str(folder)!r}"
    if resume is None or resume is False or str(resume).strip().lower() in ("", "false", "none", "no"):
        raise ValueError(
            f"{where} holds another run ({', '.join(names[:4])}). Set resume_from_checkpoint to auto to go on "
            "with it, or choose another output_dir."
        )
    _check_identity(where, _saved_identity(folder / ARGUMENTS_FILE), identity)
    results = sorted({name for sign in _RESULTS for name in held[sign]})
    if results and all(incomplete(path) for path in _checkpoints(folder)):
        raise ValueError(
            f"{where} holds a finished run ({', '.join(results[:4])}) and no complete checkpoint to go on from; starting anew "
            "would write over it. Choose another output_dir."
        )


def _check_writable(folder: Path) -> None:
    """The folder, or the nearest one above it that exists, must take new files."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        raise ValueError(f"output_dir {str(folder)!r} cannot be made: {str(place)!r} is a file; name another folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir {str(folder)!r}: {str(place)!r} cannot be written to; name another folder.")


def _check_identity(where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [name for name, value in now.items() if name in before and _plain(value) != before[name]]
    if not differing:
        return
    lines = "; ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in differing)
    why = (
        " The global batch (processes x per_device_train_batch_size x gradient_accumulation_steps) decides which rows each step "
        "sees: with another, rows would be repeated or skipped."
        if "global_batch_size" in differing
        else ""
    )
    raise ValueError(
        f"{where} holds a run with other settings, so it cannot be resumed: {lines}.{why} "
        "Set them as they were, or choose another output_dir."
    )


def _saved_identity(path: Path) -> dict[str, Any]:
    """The identity in an args.json; nothing if there is none."""
    if not path.is_file():
        logger.warning("%s is missing: whether the run to resume has the same settings is not known.", path)
        return {}
    try:
        return identity(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); choose another output_dir.") from error


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))
