"""LoRA adapters through PEFT: new ones, existing ones, their float32 weights, and what of a model is trained.

An adapter adds scale * B A to a frozen weight W [out, in], with A [r, in], B [out, r] and scale = alpha / r
(Hu et al., arXiv 2106.09685).
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from hf_sft.arguments import LoraArguments
from hf_sft.models.sharded import gathered, without_partitioning
from hf_sft.models.targets import Targets, head_name, last, linear_layers, name_of, target_modules
from hf_sft.models.vocabulary import grow_embeddings, heads_are_tied, vocabulary_rows

logger = logging.getLogger(__name__)


def add_adapter(
    base: PreTrainedModel,
    lora: LoraArguments,
    *,
    new_token_ids: Sequence[int] = (),
    input_token_ids: Sequence[int] = (),
    training: Any = None,
    revision: str | None = None,
) -> PeftModel:
    """Freeze ``base`` and put an adapter with float32 weights on it: a new one, or ``adapter_name_or_path`` to go on with.

    Args:
        new_token_ids: rows of the vocabulary that begin untrained and are trained along.
        input_token_ids: tokens that are read and never written: their rows of the embedding are trained, those of an untied
            head are not.

    Raises:
        ValueError: names that match no layer, or an adapter that does not fit the base.
    """
    base.requires_grad_(False)
    if lora.adapter_name_or_path is None:
        config = lora_config(base, lora, new_token_ids, input_token_ids)
        config.revision = revision
        model = _wrap(base, config)
    else:
        model = load_adapter(base, lora.adapter_name_or_path, is_trainable=True)
        _warn_of_other_shape(model, lora)
        _require_trained_rows(model, [*new_token_ids, *input_token_ids])
    _require_whole_experts(model, training)
    # Reentrant checkpointing cuts the graph where no input requires a gradient, as behind a frozen embedding.
    if reentrant_checkpointing(training):
        base.enable_input_require_grads()
    return model


def lora_config(
    base: PreTrainedModel, lora: LoraArguments, new_token_ids: Sequence[int] = (), input_token_ids: Sequence[int] = ()
) -> LoraConfig:
    """The PEFT configuration of a new adapter on ``base``."""
    targets = target_modules(base, lora.lora_target_modules)
    saved, tie = _saved_modules(base, lora.modules_to_save)
    _require_room_for_adapter(base, targets, saved)
    _check_experts(targets, lora)
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=lora.lora_dropout,
        target_modules=targets.modules,
        exclude_modules=targets.excluded or None,
        target_parameters=targets.parameters or None,
        fan_in_fan_out=_all_transposed(base, targets),
        bias=lora.lora_bias,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        modules_to_save=saved or None,
        ensure_weight_tying=tie,
        trainable_token_indices=_token_rows(base, new_token_ids, input_token_ids, [*saved, *targets.modules]) or None,
    )


def with_input_row(base: PreTrainedModel, config: PeftConfig, token: int) -> PeftConfig:
    """A copy of ``config`` whose adapter trains the embedding's row of ``token``, where it does not train the embedding anyway.

    Adapters that are not LoRA's have no such rows: they are returned as they are.
    """
    name = last(name_of(base, base.get_input_embeddings()))
    if not isinstance(config, LoraConfig) or name in {last(saved) for saved in config.modules_to_save or []}:
        return config
    rows: Any = config.trainable_token_indices or {}
    rows = dict(rows) if isinstance(rows, dict) else {name: list(rows)}
    key = next((known for known in rows if last(known) == name), name)
    rows[key] = sorted({*rows.get(key, []), token})
    changed = copy.deepcopy(config)
    changed.trainable_token_indices = rows
    return changed


def load_adapter(base: PreTrainedModel, folder: str, *, is_trainable: bool = False) -> PeftModel:
    """Put the LoRA adapter at ``folder`` (or a hub name) on ``base``; the vocabulary grows if the adapter trained more rows.

    Unlike ``PeftModel.from_pretrained`` it refuses an adapter that misses a tensor, and keeps saved modules in float32.

    Raises:
        ValueError: no LoRA adapter there, unreadable weights, or an adapter of another base.
    """
    config = read_adapter_config(folder)
    try:
        weights = load_peft_weights(folder, device="cpu")
    except Exception as error:  # safetensors, hub and pickle errors have no common base
        raise ValueError(f"The weights of adapter {folder!r} could not be read: {error}") from error
    unfit = f"Adapter {folder!r} (trained on {config.base_model_name_or_path!r}) does not fit the base {base.name_or_path!r}"
    config.inference_mode = not is_trainable
    config.base_model_name_or_path = base.name_or_path
    grow_to_adapter(base, config, weights)
    try:
        model = _wrap(base, config)
        if (
            base.device.type == "meta"
        ):  # a copy into nothing is nothing: the adapter's tensors take the places of meta ones
            model.load_state_dict = partial(model.load_state_dict, assign=True)  # type: ignore[method-assign]
        result: Any = set_peft_model_state_dict(model, weights)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{unfit}: {str(error).strip()[:300]}") from error
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad or ".lora_" in name}
    if missing := sorted(expected & set(result.missing_keys)):
        raise ValueError(f"{unfit}: it lacks {len(missing)} tensors, for example {missing[0]}.")
    if extra := result.unexpected_keys:
        raise ValueError(f"{unfit}: the base has no place for {len(extra)} of its tensors, for example {extra[0]}.")
    return model


def _wrap(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """``base`` with the adapter's modules in place, everything trained in float32."""
    with warnings.catch_warnings():
        # peft 0.21 asks by the name that transformers 5.23 renamed; to be removed with the next peft.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        with _whole_vocabulary(base, config):
            model = get_peft_model(base, config, autocast_adapter_dtype=True)
    _hold_saved_modules_in_float32(model)
    return model


@contextmanager
def _whole_vocabulary(base: PreTrainedModel, config: LoraConfig) -> Iterator[None]:
    """Where rows of a partitioned vocabulary are trained, PEFT (0.21) collects them on CUDA only: it finds them whole instead."""
    matrices = [
        matrix.weight for matrix in (base.get_input_embeddings(), base.get_output_embeddings()) if matrix is not None
    ]
    if not config.trainable_token_indices:
        yield
        return
    with gathered(matrices), without_partitioning():
        yield


def read_adapter_config(folder: str) -> LoraConfig:
    """The adapter_config.json at ``folder`` or hub name; ValueError if there is none or it is no LoRA adapter's."""
    path = Path(folder)
    if path.exists() and not (path / "adapter_config.json").is_file():
        raise ValueError(f"{folder!r} holds no adapter_config.json, so it is no adapter.")
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"No adapter could be read from {folder!r}: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"{folder!r} is a {config.peft_type} adapter; only LoRA adapters (with DoRA, rsLoRA) are supported."
        )
    return config


def grow_to_adapter(base: PreTrainedModel, config: LoraConfig, weights: dict[str, torch.Tensor]) -> None:
    """Grow the vocabulary of ``base`` to the rows that the adapter trained or saved."""
    rows = vocabulary_rows(base)
    indices = config.trainable_token_indices or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    needed = max((1 + max(ids) for ids in lists if ids), default=0)
    names = [
        name_of(base, module)
        for module in (base.get_input_embeddings(), base.get_output_embeddings())
        if module is not None
    ]
    for key, tensor in weights.items():
        saved_whole = any(
            f".{name}.weight" in key or f".{name}.token_adapter.base_layer.weight" in key for name in names
        )
        needed = max(needed, tensor.shape[0] if saved_whole else 0)
    if needed > rows:
        grow_embeddings(base, needed)


def save_adapter(
    model: PeftModel, folder: str, state_dict: dict[str, torch.Tensor] | None = None, **keywords: Any
) -> None:
    """Write the adapter alone.

    Args:
        state_dict: whole tensors of what is trained, where the model's own are sharded.
    """
    embeddings = "auto" if needs_vocabulary(model) else False
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=embeddings, **keywords)


def needs_vocabulary(model: PeftModel) -> bool:
    """Whether the whole vocabulary matrices go with the adapter if the vocabulary has grown.

    PEFT would always add them; where all new rows are adapter weights already, they stay out.
    """
    config: Any = model.peft_config[str(model.active_adapter)]
    base: Any = model.get_base_model()
    indices = config.trainable_token_indices or {}
    rows = {last(name): set(ids) for name, ids in indices.items()} if isinstance(indices, dict) else {}
    held = {*rows, *(last(name) for name in config.modules_to_save or [])}
    embedding = last(name_of(base, base.get_input_embeddings()))
    needed = {embedding}
    if (head := head_name(base)) is not None and not base.config.get_text_config().tie_word_embeddings:
        # A mask token is never written: the head's row of a new one stays the mean that loading makes it again.
        only_read = {getattr(base.config, "mask_token_id", None)}
        needed |= set() if rows.get(embedding, set()) <= only_read else {last(head)}
    return not needed <= held and _has_grown(base)


def _has_grown(base: PreTrainedModel) -> bool:
    """Whether there are more rows than where the base came from; True where that is not known."""
    try:
        stored, _ = PretrainedConfig.get_config_dict(str(base.name_or_path))
    except (OSError, ValueError):
        return True
    return vocabulary_rows(base) != stored.get("text_config", stored).get("vocab_size")


def _token_rows(
    base: PreTrainedModel, ids: Sequence[int], input_ids: Sequence[int], trained_otherwise: Sequence[str]
) -> dict[str, list[int]]:
    """Which rows of which layers are trained; an untied head has rows of its own, for tokens that are written."""
    if not ids and not input_ids:
        return {}
    rows = {name_of(base, base.get_input_embeddings()): sorted({*ids, *input_ids})}
    head, tied = base.get_output_embeddings(), heads_are_tied(base)
    biased = head is not None and getattr(head, "bias", None) is not None
    if biased and (ids or tied):  # PEFT's wrapper computes x W^T and drops it
        if tied:
            raise ValueError(
                "New tokens under an adapter need a head without a bias when it is tied; use train_mode full."
            )
        warnings.warn(
            f"{name_of(base, head)} has a bias, so its rows of new tokens are not trained under an adapter: the model reads the "
            "new tokens but learns little about writing them. Add it to modules_to_save, or use train_mode full.",
            stacklevel=4,
        )
    elif head is not None and not tied:
        rows[name_of(base, head)] = list(ids)
    taken = {last(name) for name in trained_otherwise}
    return {name: own for name, own in rows.items() if own and last(name) not in taken}


def _saved_modules(base: PreTrainedModel, names: Sequence[str]) -> tuple[list[str], bool]:
    """(modules trained in full, whether a tied pair is among them, which is then trained as one)."""
    for name in names:
        if not any(full == name or full.endswith(f".{name}") for full, _ in base.named_modules()):
            raise ValueError(
                f"modules_to_save: {name!r} matches no module. Candidates: "
                f"{', '.join(sorted({last(full) for full, _ in base.named_modules() if full and not last(full).isdigit()}))}."
            )
    embedding, head = last(name_of(base, base.get_input_embeddings())), last(head_name(base) or "")
    if not heads_are_tied(base) or not {embedding, head} & {last(name) for name in names}:
        return list(names), False
    if embedding != "embed_tokens":
        raise ValueError(
            f"modules_to_save {list(names)}: {embedding} and {head} share one weight, which PEFT can train as one only where the "
            "embedding is called embed_tokens. Use train_mode full."
        )
    return [name for name in names if last(name) not in (embedding, head)] + [embedding], True


def _require_room_for_adapter(base: PreTrainedModel, targets: Targets, saved: Sequence[str]) -> None:
    """Modules trained in full take no adapter inside them: some target must lie outside."""
    whole = [full for full, _ in base.named_modules() if any(full == s or full.endswith(f".{s}") for s in saved)]
    if lists := [full for full in whole if isinstance(base.get_submodule(full), (nn.ModuleList, nn.ModuleDict))]:
        raise ValueError(
            f"modules_to_save {list(saved)}: {lists[0]} is a list of layers, which cannot be saved as one. Name modules "
            "inside it, such as embed_tokens or a single layer, or use train_mode full."
        )
    names, excluded = targets.modules, targets.excluded
    adapted = [full for full, _ in base.named_modules() if last(full) in names and full not in excluded]
    adapted += [
        full for full, _ in base.named_parameters() if any(f".{full}".endswith(f".{own}") for own in targets.parameters)
    ]
    if all(any(full == one or full.startswith(f"{one}.") for one in whole) for full in adapted):
        raise ValueError(
            f"modules_to_save {list(saved)} holds every layer of lora_target_modules, so nothing is left for the adapter. Name "
            "fewer modules, or use train_mode full."
        )


def _all_transposed(base: PreTrainedModel, targets: Targets) -> bool:
    """Whether every layer with an adapter holds its weight as [in, out], as GPT-2's do."""
    adapted = [module for full, module in linear_layers(base) if last(full) in targets.modules]
    return bool(adapted) and all(isinstance(module, Conv1D) for module in adapted)


def _check_experts(targets: Targets, lora: LoraArguments) -> None:
    """What PEFT has not for updates of parameters."""
    for name, value in (("lora_dropout", lora.lora_dropout), ("use_dora", lora.use_dora)):
        if targets.parameters and value:
            raise ValueError(
                f"lora_target_modules names {', '.join(targets.parameters)}, and {name} is {value}, which adapters on "
                "experts have not: leave out one of the two"
            )


def _require_whole_experts(model: PeftModel, training: Any) -> None:
    """The update of a 3-D parameter is added to the whole of it, outside of what an engine gathers for the layers."""
    config: Any = model.peft_config[str(model.active_adapter)]
    sharded = is_deepspeed_zero3_enabled() or bool(getattr(training, "fsdp", None))
    if config.target_parameters and sharded:
        raise ValueError(
            f"the adapter is on experts ({', '.join(sorted(config.target_parameters))}), which ZeRO-3 and FSDP cut into pieces: "
            "leave experts out of lora_target_modules, or use ZeRO-2"
        )


def _hold_saved_modules_in_float32(model: PeftModel) -> None:
    """Trained copies of modules get float32 weights like the rest of the adapter (PEFT leaves them in the base's type).

    Their inputs and outputs keep the base's type, with and without autocast.
    """

    def inward(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(arg.float() if torch.is_tensor(arg) and arg.is_floating_point() else arg for arg in args)

    def outward(dtype: torch.dtype) -> Any:
        return lambda module, args, output: output.to(dtype) if torch.is_tensor(output) else output

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for copy in wrapper.modules_to_save.values():
                low = {p.dtype for p in copy.parameters() if p.is_floating_point() and p.dtype != torch.float32}
                original = {p.dtype for p in wrapper.original_module.parameters()} - {torch.float32}
                if low or original:  # a tied partner may have been cast through the shared parameter already
                    copy.float()
                    copy.register_forward_pre_hook(inward)
                    copy.register_forward_hook(outward((original or low).pop()))


def _warn_of_other_shape(model: PeftModel, lora: LoraArguments) -> None:
    """The shape of an existing adapter stands; arguments that were set to something else are named."""
    config: Any = model.peft_config[str(model.active_adapter)]
    names = {
        "lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_bias": "bias",
        "use_dora": "use_dora", "use_rslora": "use_rslora",
    }  # fmt: skip
    defaults = {item.name: item.default for item in fields(LoraArguments)}
    ignored = [
        f"{name} {getattr(lora, name)} (the adapter has {getattr(config, theirs)})"
        for name, theirs in names.items()
        if getattr(lora, name) not in (defaults[name], getattr(config, theirs))
    ]
    if ignored:
        warnings.warn(f"adapter_name_or_path keeps its own shape; not used: {', '.join(ignored)}.", stacklevel=4)


def _require_trained_rows(model: PeftModel, new_token_ids: Sequence[int]) -> None:
    """New tokens need rows that the existing adapter trains."""
    base: Any = model.get_base_model()
    config: Any = model.peft_config[str(model.active_adapter)]
    indices = config.trainable_token_indices or []
    trained = set().union(*indices.values()) if isinstance(indices, dict) else set(indices)
    saved = {last(name) for name in config.modules_to_save or []}
    embedding = last(name_of(base, base.get_input_embeddings()))
    if (lost := sorted(set(new_token_ids) - trained)) and embedding not in saved:
        raise ValueError(
            f"The adapter trains no rows for the tokens with ids {lost[:5]}; rows cannot be added to an existing adapter. "
            "Merge it first (hf-sft merge) and start from the merged model."
        )


def reentrant_checkpointing(training: Any) -> bool:
    on = getattr(training, "activation_checkpointing", False) or getattr(training, "gradient_checkpointing", False)
    settings = getattr(training, "activation_checkpointing_kwargs", None) or getattr(
        training, "gradient_checkpointing_kwargs", None
    )
    return bool(on) and bool((settings or {}).get("use_reentrant", False))
