"""Checkpoints of DeepSpeed ZeRO and of FSDP as plain folders: a model's, or an adapter's.

What is read: ``global_step*`` folders with a ``latest`` file (DeepSpeed's ``save_checkpoint``; the float32 masters), a folder
``pytorch_model_fsdp_0`` of torch.distributed.checkpoint, or the file ``pytorch_model_fsdp.bin``. DeepSpeed's files are pickles:
convert only those that come from people you trust.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from hf_sft.arguments import ModelArguments
from hf_sft.checkpoints import ARGUMENTS_FILE, CheckpointError, verify_weights, weight_shapes
from hf_sft.merging.folders import new_folder
from hf_sft.merging.merge import write_configs
from hf_sft.models.adapters import read_adapter_config
from hf_sft.models.averages import has_average
from hf_sft.models.inference import DTYPES
from hf_sft.models.loading import load_config
from hf_sft.tensor_files import StreamedTensor, held, size_in_bytes, split_by_size, write_shards

logger = logging.getLogger(__name__)

Tensors = dict[str, StreamedTensor]
_TEXTS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.*",
    ARGUMENTS_FILE, "generation_config.json",
)  # fmt: skip
_FSDP_FOLDER, _FSDP_FILE = "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"
_WRAPPERS = re.compile(r"(^|\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)(?=\.)")
_ERRORS = (OSError, ValueError, RuntimeError, KeyError, IndexError, EOFError, pickle.UnpicklingError)


def convert_checkpoint(
    checkpoint: str,
    output_dir: str,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
) -> str:
    """Write the weights of a ZeRO or FSDP checkpoint to ``output_dir`` as from_pretrained reads them; returns the folder.

    Config, tokenizer and adapter config are taken from the checkpoint's folder or the one above it. A checkpoint of a PEFT model
    becomes an adapter folder; frozen weights in it are left out. One tensor is in memory at a time; DeepSpeed's reader holds the
    whole float32 weights of a ZeRO-1 or ZeRO-2 checkpoint.

    Args:
        checkpoint: a folder of Trainer or accelerate (``checkpoint-N``), or what is named above.
        dtype: float32, bfloat16 or float16; default: as the checkpoint holds them, which is float32 for ZeRO.
        max_shard_size: bytes, or a size such as "5GB".

    Raises:
        ValueError: no such checkpoint there, a file of it is missing or unreadable, no config, a config of another model, or an
            output folder that holds something.
        CheckpointError: what was written is not what was read; no folder is left.
    """
    with new_folder(output_dir, "a converted checkpoint") as written:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
        largest, chosen = size_in_bytes(max_shard_size), None if dtype is None else getattr(torch, dtype)
        folder, read = _find(checkpoint)
        places = [place for place in dict.fromkeys([folder, folder.absolute().parent]) if place.is_dir()]
        tensors = {_WRAPPERS.sub("", name).lstrip("."): tensor for name, tensor in read().items()}
        if any(name.startswith("base_model.model.") for name in tensors):
            _write_adapter(written, tensors, places, chosen)
        else:
            _write_model(written, tensors, places, chosen, largest, trust_remote_code)
        for pattern in _TEXTS:  # from the checkpoint, or else from above it
            found = next((paths for place in places if (paths := sorted(place.glob(pattern)))), [])
            for path in filter(Path.is_file, found):
                shutil.copy(path, written / path.name)
    logger.info("Converted %s: %s", checkpoint, output_dir)
    return str(Path(output_dir))


# ---- reading ----


def _find(checkpoint: str) -> tuple[Path, Callable[[], Tensors]]:
    """The checkpoint's folder, and how its tensors are read."""
    path = Path(checkpoint)
    if not path.exists():
        raise ValueError(f"{checkpoint!r} does not exist.")
    if path.name == _FSDP_FILE:
        return path.parent, lambda: _read_fsdp_file(path)
    if (path / ".metadata").is_file():
        return path.parent, lambda: _read_fsdp_folder(path)
    if path.name.startswith("global_step") and path.is_dir():
        return path.parent, lambda: _read_zero(path)
    if (path / _FSDP_FOLDER).is_dir():
        return path, lambda: _read_fsdp_folder(path / _FSDP_FOLDER)
    if (path / _FSDP_FILE).is_file():
        return path, lambda: _read_fsdp_file(path / _FSDP_FILE)
    if (path / "latest").is_file():
        tag = path / (path / "latest").read_text(encoding="utf-8").strip()
        if not tag.is_dir():
            raise ValueError(f"{path / 'latest'} names {tag.name!r}, and there is no such folder beside it.")
        return path, lambda: _read_zero(tag)
    if next(path.glob("*model*.safetensors"), None) is not None:
        averaged = (
            " What loads are the raw weights: the average beside them is taken by hf-sft merge and by --format wedlm, and a "
            "finished run's output folder holds it as its result."
        )
        raise ValueError(
            f"{checkpoint!r} is a plain model or adapter folder already: it loads as it is, nothing is to convert."
            f"{averaged if has_average(checkpoint) else ''}"
        )
    steps = sorted(step.name for step in path.glob("global_step*"))
    where = f" It holds {', '.join(steps)} and no file 'latest': name one of them." if steps else ""
    raise ValueError(
        f"{checkpoint!r} holds no sharded checkpoint: neither global_step* with latest (DeepSpeed), nor {_FSDP_FOLDER} or "
        f"{_FSDP_FILE} (FSDP).{where}"
    )


def _read_zero(folder: Path) -> Tensors:
    """DeepSpeed's float32 masters and frozen parameters; of ZeRO-3 each is put together when it is asked for."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("A DeepSpeed checkpoint needs deepspeed, which is not installed: pip install deepspeed")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    ranks = len(list(folder.glob("*_optim_states.pt")))
    states = len(list(folder.glob("zero_pp_rank_*_model_states.pt")))  # of ZeRO-3 one per rank
    if states not in (0, ranks):
        raise ValueError(
            f"{folder} has {states} files of model states and {ranks} of optimizer states: some are missing."
        )
    with _unreadable(folder), contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name, lazy_mode=True)
    return _lazy({name: (tuple(t.shape), t.dtype) for name, t in state.items()}, lambda name: state[name].contiguous())


def _read_fsdp_folder(folder: Path) -> Tensors:
    """A folder of torch.distributed.checkpoint, one tensor at a time."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with _unreadable(folder):
        metadata = dcp.FileSystemReader(folder).read_metadata()
    files = {entry.relative_path for entry in (metadata.storage_data or {}).values()}
    if missing := sorted(file for file in files if not (folder / file).is_file()):
        raise ValueError(f"{folder} lacks {', '.join(missing)}: the file of a rank is missing.")
    # accelerate saves {"model": state}; the planner knows the path to each tensor.
    paths: dict[str, Any] = metadata.planner_data or {}
    keys = {str(paths.get(key, (key,))[-1]): key for key in metadata.state_dict_metadata}
    facts = {}
    for name, key in keys.items():
        entry = metadata.state_dict_metadata[key]
        if isinstance(entry, TensorStorageMetadata):
            facts[name] = (tuple(entry.size), entry.properties.dtype)

    def load(name: str) -> Tensor:
        shape, dtype = facts[name]
        wanted = {keys[name]: torch.empty(shape, dtype=dtype)}
        with _unreadable(folder), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(wanted, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        return wanted[keys[name]]

    return _lazy(facts, load)


def _read_fsdp_file(path: Path) -> Tensors:
    """One file of all tensors, which are mapped and not read."""
    with _unreadable(path):
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {name: held(tensor) for name, tensor in state.items()}


def _lazy(facts: dict[str, tuple[tuple[int, ...], torch.dtype]], load: Callable[[str], Tensor]) -> Tensors:
    """Tensors that are made when they are asked for; the last one is kept."""
    last = lru_cache(maxsize=1)(load)

    def rows(name: str) -> Callable[[int, int], Tensor]:
        return lambda a, b: last(name)[a:b] if facts[name][0] else last(name).reshape(1)

    return {name: StreamedTensor(shape, dtype, rows(name)) for name, (shape, dtype) in facts.items()}


@contextlib.contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

    try:
        yield
    except (*_ERRORS, CheckpointException) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"The checkpoint {path} cannot be read: {text[:300]}") from error


# ---- writing ----


def _write_model(
    written: Path,
    tensors: Tensors,
    places: list[Path],
    dtype: torch.dtype | None,
    largest: int,
    trust_remote_code: bool,
) -> None:
    """A whole model: of tied tensors one, stored as transformers stores its family."""
    place = _place_of("config.json", places)
    named = ModelArguments(model_name_or_path=str(place), trust_remote_code=trust_remote_code)
    config = load_config(str(place), named)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    state = model.state_dict(keep_vars=True)
    chosen = _matched(tensors, state, place)
    if any(value is not state.get(name) for name, value in revert_weight_conversion(model, dict(state)).items()):
        logger.warning("%s is converted in memory: its family stores weights in another form.", config.model_type)
        whole = {name: tensor.whole() for name, tensor in chosen.items()}
        chosen = {name: held(tensor.contiguous()) for name, tensor in revert_weight_conversion(model, whole).items()}
    buffers = {name for name, _ in model.named_buffers()}
    write_shards(written, split_by_size(_typed(chosen, dtype, buffers), largest))
    write_configs(written, model, dtype or _common_type(chosen))
    verify_weights(written, model)


def _matched(tensors: Tensors, state: dict[str, Tensor], place: Path) -> Tensors:
    """The tensors that the model stores.

    Raises:
        ValueError: the config is another model's.
    """
    what = f"The checkpoint does not fit {place / 'config.json'}"
    if extra := sorted(set(tensors) - set(state)):
        raise ValueError(f"{what}: {len(extra)} of its tensors are not the model's, for example {extra[0]}.")
    chosen: Tensors = {}
    taken: set[int] = set()
    for name, parameter in state.items():
        if name not in tensors or id(parameter) in taken:
            continue
        if tensors[name].shape != tuple(parameter.shape):
            raise ValueError(f"{what}: {name} has shape {tensors[name].shape} and must have {tuple(parameter.shape)}.")
        chosen[name] = tensors[name]
        taken.add(id(parameter))
    if missing := [name for name, parameter in state.items() if id(parameter) not in taken]:
        raise ValueError(
            f"{what}: it lacks {len(missing)} tensors, for example {missing[0]}. (If frozen weights were left out of it and an "
            "adapter was trained, its adapter_config.json would be needed.)"
        )
    return chosen


def _write_adapter(written: Path, tensors: Tensors, places: list[Path], dtype: torch.dtype | None) -> None:
    """What PEFT writes for the adapter: its tensors, without the adapter's name in theirs."""
    place = _place_of("adapter_config.json", places)
    config = read_adapter_config(str(place))
    saved = {_saved_name(name): tensor for name, tensor in tensors.items() if _is_adapters(name, config, tensors)}
    if not any(".lora_" in name for name in saved):
        raise ValueError(
            f"The checkpoint holds none of the adapter of {place / 'adapter_config.json'}: no lora_A, no lora_B."
        )
    saved = _typed(saved, dtype, set())
    write_shards(written, [saved], stem="adapter_model")
    config.save_pretrained(str(written))
    if weight_shapes(written, "adapter_model") != {name: tensor.shape for name, tensor in saved.items()}:
        raise CheckpointError(f"Adapter {written}: what was written is not what was read.")


def _is_adapters(name: str, config: LoraConfig, tensors: Tensors) -> bool:
    """Whether a tensor of a PEFT model is part of the adapter rather than of its base."""
    if ".original_module." in name:
        return False
    if not any(".default." in f"{other}." for other in tensors):
        return True  # accelerate has asked PEFT for the adapter alone
    if ".token_adapter." in name:
        layer = name.split(".token_adapter.")[0]
        rows = config.trainable_token_indices
        # The tensor of a tied head is the embedding's, and saved as such.
        known = (
            any(layer.endswith(f".{key}") for key in rows) if isinstance(rows, dict) else not layer.endswith("lm_head")
        )
        return known and ".trainable_tokens_delta." in name
    if ".lora_" in name or ".modules_to_save." in name:
        return True
    if not name.endswith(".bias") or config.bias == "none":
        return False
    module = name.removesuffix("bias").removesuffix("base_layer.")
    return config.bias == "all" or any(f"{module}lora_{kind}.default" in other for kind in "AB" for other in tensors)


def _saved_name(name: str) -> str:
    """``...lora_A.default.weight`` as it stands in an adapter's file."""
    name = name.replace(".modules_to_save.default.", ".")
    name = re.sub(r"\.lora_magnitude_vector\.default\.weight$", ".lora_magnitude_vector", name)
    return re.sub(r"\.(lora_\w+|trainable_tokens_delta)\.default(?=\.|$)", r".\1", name)


def _typed(tensors: Tensors, dtype: torch.dtype | None, kept: set[str]) -> Tensors:
    """``tensors`` to be written in ``dtype``, but buffers and what is no float."""
    return {
        name: tensor
        if dtype is None or name in kept or not tensor.dtype.is_floating_point
        else replace(tensor, dtype=dtype)
        for name, tensor in tensors.items()
    }


def _common_type(tensors: Tensors) -> torch.dtype:
    """The type of most floating-point numbers."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _place_of(file: str, places: list[Path]) -> Path:
    for place in places:
        if (place / file).is_file():
            return place
    raise ValueError(f"No {file} is in {' or '.join(map(str, places))}; copy the run's there.")
