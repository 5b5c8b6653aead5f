"""Weights and adapters are read back after writing: keys, shapes, nothing empty, nothing cut off."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import torch
    from torch import nn

Shapes = dict[str, tuple[int, ...]]


class CheckpointError(RuntimeError):
    """Something written is incomplete or unreadable; the message names the file and the tensor."""


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
    found = tensor_shapes(path / "adapter_model.safetensors")
    required, allowed = _adapter_shapes(model)
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
        return tensor_shapes(folder / f"{stem}.safetensors")
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{index} cannot be read ({error}).") from error
    shapes: Shapes = {}
    for shard in sorted(set(weight_map.values())):
        shapes.update(tensor_shapes(folder / shard))
    if missing := sorted(set(weight_map) - set(shapes)):
        raise CheckpointError(f"{index} names {len(missing)} tensors that no shard holds, for example {missing[0]}.")
    return shapes


def _adapter_shapes(model: Any) -> tuple[Shapes, Shapes]:
    """Names and whole shapes of the adapter's tensors, without copying or gathering any; and with vocabulary matrices beside."""
    from peft import get_peft_model_state_dict

    blank = _blank(model.state_dict(keep_vars=True))
    adapter = model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapter[0]

    def shapes(with_embeddings: bool) -> Shapes:
        state = get_peft_model_state_dict(model, blank, adapter_name=adapter, save_embedding_layers=with_embeddings)
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    return shapes(False), shapes(True)


def _compare(what: str, found: Shapes, required: Shapes, allowed: Shapes) -> None:
    if empty := sorted(name for name, shape in found.items() if count(shape) == 0 and count(required.get(name, (1,)))):
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


def tensor_shapes(path: Path) -> Shapes:
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
    import torch

    from hf_sft.models.sharded import whole_shape

    blanks = {
        id(tensor): torch.empty(whole_shape(tensor), device="meta")
        for tensor in tensors.values()
        if torch.is_tensor(tensor)
    }
    return {name: blanks[id(tensor)] for name, tensor in tensors.items() if torch.is_tensor(tensor)}


def count(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
