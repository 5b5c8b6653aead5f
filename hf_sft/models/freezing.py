"""Which weights are not trained: patterns for names of parameters."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from hf_sft.models.wrappers import base_model

logger = logging.getLogger(__name__)

# Where PEFT puts what it trains: beside a layer's weight, around it, or instead of it.
_OF_ADAPTER = re.compile(
    r"(?P<module>.+?)\.(?:token_adapter\.)?"
    r"(?:(?:modules_to_save\.[^.]+|original_module|base_layer)\.(?P<rest>.+)|(?:lora|trainable_tokens)_\w+\.[^.]+(?:\.weight)?)"
)
_SHOWN = 4  # names in a message


def freeze(model: Any, patterns: Sequence[str]) -> list[str]:
    """Take the gradient from the parameters that ``patterns`` name; they are left as they are.

    Args:
        model: as for :func:`frozen_parameters`.
        patterns: as for :func:`frozen_parameters`.

    Returns:
        Their names in the transformers model.

    Raises:
        ValueError: as :func:`frozen_parameters`.
    """
    frozen = frozen_parameters(model, patterns)
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    return list(frozen)


def frozen_parameters(model: Any, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that ``patterns`` name, by their names in the transformers model.

    Patterns are shell wildcards (``*`` also matches dots), taken in their order: one with a leading ``!`` takes parameters out
    again. Only what is trained can be frozen. Of a weight that is tied to another both names count. Under an adapter a pattern
    names what the adapter trains, by the weight that it changes (``model.layers.0.self_attn.q_proj.weight`` stands for both
    matrices of its update) or by its own name (``*.lora_A.*``).

    Args:
        model: a transformers model, bare or with PEFT.
        patterns: at least one.

    Raises:
        ValueError: a pattern that matches nothing, nothing is frozen, or everything is.
    """
    names = _trained_names(model)
    chosen: set[int] = set()
    for pattern in patterns:
        wildcard, takes_out = pattern.removeprefix("!"), pattern.startswith("!")
        found = {key for key, known in names.items() if any(fnmatchcase(name, wildcard) for name in known)}
        if not found:
            raise ValueError(_no_match(pattern, names, model))
        chosen = chosen - found if takes_out else chosen | found
    if not chosen:
        raise ValueError(f"freeze is {list(patterns)}, which takes out all that it names: nothing is frozen")
    if len(chosen) == len(names):
        raise ValueError(
            f"freeze is {list(patterns)}, which leaves nothing to train: name less, or take names out with a leading !"
        )
    parameters = dict(base_model(model).named_parameters())
    return {name: parameter for name, parameter in parameters.items() if id(parameter) in chosen}


def _trained_names(model: Any) -> dict[int, list[str]]:
    """The names by which a pattern may call each trained parameter, by the parameter's id."""
    names: dict[int, list[str]] = {}
    for name, parameter in base_model(model).named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
            if match := _OF_ADAPTER.fullmatch(name):
                names[id(parameter)].append(f"{match['module']}.{match['rest'] or 'weight'}")
    return names


def _no_match(pattern: str, names: dict[int, list[str]], model: Any) -> str:
    known = [each[0] for each in names.values()]
    shown = ", ".join(known[:_SHOWN] + (["...", known[-1]] if len(known) > _SHOWN + 1 else known[_SHOWN:]))
    why = "matches no weight of the model"
    if any(fnmatchcase(name, pattern.removeprefix("!")) for name, _ in base_model(model).named_parameters()):
        why = "matches no weight that is trained (under an adapter the rest of the model is frozen as it is)"
    return f"freeze has {pattern!r}, which {why}; those that are trained are {shown}"
