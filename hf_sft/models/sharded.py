"""Whole tensors of a model whose weights are sharded: by ZeRO-3 (an empty tensor that knows its shape), by FSDP2 (a DTensor), or
whose float32 masters are, by ZeRO-1 and 2.

Reading and setting a tensor is collective: every rank calls in the same order, and holds one whole tensor at a time. On a model
that is not sharded the same functions do the obvious.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import deepspeed as integration


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 holds ``parameter``: between uses it is empty, and ``ds_shape`` is its shape."""
    return hasattr(parameter, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Whether a plain forward of ``model`` would meet empty or partial weights."""
    return any(is_partitioned(parameter) or isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_shape(tensor: Any) -> tuple[int, ...]:
    """The shape of the whole tensor."""
    return tuple(tensor.ds_shape if is_partitioned(tensor) else tensor.shape)


def whole_numel(parameter: Any) -> int:
    """How many numbers the whole tensor has; a 4-bit weight counts its true size."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(whole_shape(parameter) if state is None else state.shape).numel())


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) numbers in ``model``."""
    trained = total = 0
    for parameter in model.parameters():
        count = whole_numel(parameter)
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def summary(model: nn.Module) -> str:
    """One line about what is trained."""
    trained, total = trainable_parameters(model)
    return f"Trainable parameters: {trained:,} of {total:,} ({100 * trained / max(1, total):.3g} %)"


@contextmanager
def gathered(parameters: Iterable[Any], *, written: bool = False) -> Iterator[None]:
    """Within this context parameters that ZeRO-3 has partitioned are whole, on every rank.

    Args:
        written: what rank 0 writes into them is kept, on all ranks.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if written else None):
        yield


@contextmanager
def without_partitioning() -> Iterator[None]:
    """transformers and PEFT partition what is built while a ZeRO-3 configuration is alive; here they do not see it."""
    held = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = held


@torch.no_grad()
def whole(tensor: Any) -> Tensor:
    """The whole of a parameter or buffer, of a trained one in the engine's own precision (float32 masters); collective.

    It may share memory with the model's own.
    """
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if (master := _master(tensor)) is not None:
        return master
    with gathered([tensor]):
        return tensor.detach().clone() if is_partitioned(tensor) else tensor.detach()


@torch.no_grad()
def set_whole(parameter: Any, value: Tensor) -> None:
    """Set a parameter, and the engine's master of it, to ``value``, which all ranks have; collective."""
    if isinstance(parameter, DTensor):
        parameter.copy_(sharded_like(parameter, value.to(parameter.dtype)))
        return
    with gathered([parameter], written=True):
        parameter.copy_(value)
    _set_fragment(parameter, value, None)


@torch.no_grad()
def whole_state(parameter: Any, local: Any, key: str) -> Tensor:
    """The whole of an optimizer state that has the shape of ``parameter``; collective.

    Args:
        local: the state as the optimizer holds it, where it holds one per parameter (not under ZeRO).
        key: its name.
    """
    if isinstance(local, DTensor):
        return local.full_tensor()
    if _under_zero(parameter):
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)
    return local


@torch.no_grad()
def sharded_like(parameter: Any, value: Tensor) -> Tensor:
    """``value``, a whole tensor, laid out as ``parameter`` is (FSDP2)."""
    value = value.to(parameter.device)
    return (
        distribute_tensor(value, parameter.device_mesh, parameter.placements)
        if isinstance(parameter, DTensor)
        else value
    )


def set_zero_state(parameter: Any, value: Tensor, key: str) -> None:
    """Set this rank's part of an optimizer state under ZeRO; ``value`` is the whole."""
    _set_fragment(parameter, value, key)


def gather_state(model: nn.Module, wanted: Callable[[str], bool], keep: bool) -> dict[str, Tensor]:
    """Whole tensors of ``model.state_dict()`` by name, gathered one at a time; collective.

    Args:
        wanted: which names.
        keep: whether this rank keeps them, on the CPU. Elsewhere the result is empty.
    """
    found: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}  # tied tensors stay tied
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not torch.is_tensor(tensor) or not wanted(name):
            continue
        if id(tensor) not in copies:
            complete = whole(tensor)
            copies[id(tensor)] = complete.to("cpu") if keep else torch.empty(0)
            del complete
        if keep:
            found[name] = copies[id(tensor)]
    return found


def _under_zero(parameter: Any) -> bool:
    """Whether a DeepSpeed optimizer holds the master of ``parameter``."""
    return hasattr(parameter, "_z3_optimizer") if is_partitioned(parameter) else hasattr(parameter, "_hp_mapping")


def _master(tensor: Any) -> Tensor | None:
    if not getattr(tensor, "requires_grad", False) or not _under_zero(tensor):
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(tensor)


def _set_fragment(parameter: Any, value: Tensor, key: str | None) -> None:
    """This rank's part of the float32 master (``key`` None) or of an optimizer state."""
    if not parameter.requires_grad or not _under_zero(parameter):
        return
    value = value.to(parameter.device, torch.float32).flatten()
    if not is_partitioned(parameter):
        parameter.set_full_hp_param(value, key)
        return
    from deepspeed import comm
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param, safe_set_local_optimizer_state

    # Partitions are equal, so the last may reach beyond the tensor.
    size = safe_get_local_fp32_param(parameter).numel()
    rank = comm.get_rank(group=parameter.ds_process_group)
    part = value.new_zeros(size)
    own = value[rank * size : (rank + 1) * size]
    part[: len(own)] = own
    if key is None:
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, key)
