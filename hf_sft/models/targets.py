"""Which layers of a model an adapter goes on: names, ``all-linear``, and the experts of a mixture, which are no layers.

``all-linear`` is every linear layer but the head, as far as PEFT adapts it; what it leaves out is said. Routed experts are 3-D
parameters [E, ., .] of one module: PEFT adapts them by name (``target_parameters``), each expert with matrices of its own, and
adds the update to the whole parameter in every forward, which takes as much memory again as a layer's experts. So they are
adapted where they are named (``experts``), and not by ``all-linear``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_sft.models.families import STATE_SPACE_BARE_LAYERS, STATE_SPACE_TYPES
from hf_sft.models.sharded import whole_shape
from hf_sft.models.vocabulary import heads_are_tied

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
EXPERTS = "experts"
_ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d)


class Targets(NamedTuple):
    """What PEFT is told.

    Attributes:
        modules: names, which PEFT matches against the ends of full names.
        excluded: full names of modules that match and are left out.
        parameters: names of 3-D parameters, matched against the ends of full names.
    """

    modules: list[str]
    excluded: list[str]
    parameters: list[str]


def target_modules(base: PreTrainedModel, names: Sequence[str]) -> Targets:
    """What ``names`` of layers or experts, or ``all-linear``, mean in ``base``.

    Raises:
        ValueError: a name that matches nothing, or what takes no adapter.
    """
    wanted: list[str] = []
    parameters: list[str] = []
    for name in names:
        if name == ALL_LINEAR:
            wanted += _all_linear(base, with_experts=any(_experts_named(base, other) for other in names))
        elif experts := _experts_named(base, name):
            parameters += experts
        else:
            wanted += _layers_named(base, name)
    suffixes = sorted({last(full) for full in wanted})
    chosen = set(wanted)
    excluded = [full for full, _ in base.named_modules() if last(full) in suffixes and full not in chosen and full]
    return Targets(suffixes, sorted(excluded), sorted(set(parameters)))


def linear_layers(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Full names and modules of all layers that multiply by a matrix."""
    return ((name, module) for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D)))


def expert_parameters(base: nn.Module) -> list[str]:
    """Full names of the 3-D parameters that hold routed experts."""
    return [
        name
        for name, parameter in base.named_parameters()
        if EXPERTS in name.split(".") and len(whole_shape(parameter)) == 3
    ]


def head_name(base: Any) -> str | None:
    """Full name of the output head."""
    head = base.get_output_embeddings()
    return None if head is None else name_of(base, head)


def name_of(base: nn.Module, wanted: nn.Module) -> str:
    """Full name of a module of ``base``."""
    return next(name for name, module in base.named_modules() if module is wanted)


def last(name: str) -> str:
    """The last part of a full name."""
    return name.rsplit(".", 1)[-1]


def _all_linear(base: PreTrainedModel, *, with_experts: bool) -> list[str]:
    """Every linear layer but the head and those that take no adapter, which are named in a line of the log."""
    linear = [full for full, _ in linear_layers(base) if full != head_name(base)]
    bare, taken = _bare_layers(base), _taken_for_experts(base, {last(full) for full in linear})
    left_out = []
    if bare:
        present = sorted({last(full) for full, _ in base.named_modules()} & bare)
        left_out.append(f"{', '.join(present)} (the kernels of state-space layers read these weights directly)")
    if taken:
        left_out.append(
            f"{', '.join(sorted(taken))} of dense layers and shared experts (under these names PEFT adapts the routed experts "
            f"of a {base.config.model_type} model instead)"
        )
    if (experts := expert_parameters(base)) and not with_experts:
        left_out.append(
            f"{', '.join(sorted({'.'.join(full.split('.')[-2:]) for full in experts}))} (3-D parameters and no layers; add "
            f"{EXPERTS} to lora_target_modules to adapt them as well, which takes more memory)"
        )
    if left_out:
        logger.warning("all-linear leaves out %s.", "; ".join(left_out))
    return [full for full in linear if last(full) not in bare | taken]


def _bare_layers(base: PreTrainedModel) -> frozenset[str]:
    return STATE_SPACE_BARE_LAYERS if base.config.model_type in STATE_SPACE_TYPES else frozenset()


def _experts_named(base: PreTrainedModel, name: str) -> list[str]:
    """The parameters, by the ends of their names, that ``name`` means: one, or those of the module ``experts``."""
    if EXPERTS not in name.split("."):
        return []
    found = expert_parameters(base)
    if any(f".{full}".endswith(f".{name}") for full in found):
        return [name]
    owners = [full.rpartition(".") for full in found]
    return sorted({f"{name}.{leaf}" for owner, _, leaf in owners if f".{owner}".endswith(f".{name}")})


def _layers_named(base: PreTrainedModel, name: str) -> list[str]:
    """Full names of the layers that ``name`` means."""
    head = head_name(base)
    hits = {full: module for full, module in base.named_modules() if full == name or full.endswith(f".{name}")}
    if not hits or not all(isinstance(module, _ADAPTABLE) for module in hits.values()):
        why = (
            "matches no layer"
            if not hits
            else f"is a {type(next(iter(hits.values()))).__name__}, which takes no adapter"
        )
        candidates = sorted({last(full) for full, _ in linear_layers(base) if full != head})
        candidates += [EXPERTS] if expert_parameters(base) else []
        raise ValueError(f"lora_target_modules: {name!r} {why}. Candidates: {ALL_LINEAR}, {', '.join(candidates)}.")
    if last(name) in _bare_layers(base):
        raise ValueError(
            f"lora_target_modules: {name!r} of a {base.config.model_type} model takes no adapter; leave it out."
        )
    if _taken_for_experts(base, {last(name)}):
        raise ValueError(
            f"lora_target_modules: under the name {name!r} PEFT adapts the routed experts of a {base.config.model_type} model; "
            f"name {EXPERTS} for these, or leave it out."
        )
    if heads_are_tied(base) and any(
        module is base.get_input_embeddings() or full == head for full, module in hits.items()
    ):
        raise ValueError(
            f"lora_target_modules: {name!r} is tied, embedding and head share one weight, and an adapter would change one "
            "of the two. Train it in full by modules_to_save."
        )
    return list(hits)


def _taken_for_experts(base: PreTrainedModel, names: set[str]) -> set[str]:
    """Names that PEFT reads as those of routed experts in older checkpoints, whichever layers they name in ``base``.

    PEFT (0.21) rewrites the configuration of an adapter, a new one as well as a loaded one, where the experts of a family were
    layers once: ``gate_proj`` becomes ``experts.gate_up_proj``, and the dense layers of that name get no adapter.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a PEFT that rewrites nothing
        return set()
    taken = set()
    for name in names:
        trial = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(trial, base, conversions=None)
        except ValueError:  # it misses the other half of a fused pair
            taken.add(name)
            continue
        if name not in (trial.target_modules or ()):
            taken.add(name)
    return taken
