"""What a merged model consists of: each of its tensors as a stored tensor of the base and what the adapter does to it.

The base is built without any numbers (device meta), and the adapter is put on it: PEFT says which layer has which update, and
what is no longer on meta is the adapter's own (biases, saved modules).
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.hub import cached_file

from hf_sft.arguments import ModelArguments
from hf_sft.merging.quantised import RoundTrip
from hf_sft.merging.updates import grown, with_bias, with_lora, with_rows
from hf_sft.models.averages import has_average
from hf_sft.models.inference import put_adapter, take_average
from hf_sft.models.loading import load_config
from hf_sft.tensor_files import StreamedTensor, held, read_tensors

logger = logging.getLogger(__name__)

Shards = list[dict[str, StreamedTensor]]
_VARIANTS = {"DoraLinearVariant", "DoraEmbeddingVariant"}


class Unsuited(Exception):
    """Why a base and its adapter cannot be merged tensor by tensor."""


@dataclass(frozen=True)
class Plan:
    """A merged model that is not written yet.

    Attributes:
        model: without numbers; its config and generation config are the merged model's.
        shards: as the base has them, by the merged model's names.
    """

    model: PreTrainedModel
    shards: Shards


def plan_merge(
    adapter: str,
    base: ModelArguments,
    tokens: int,
    *,
    dtype: torch.dtype | None = None,
    round_trip: RoundTrip | None = None,
    averaged: bool = True,
) -> Plan:
    """How to merge ``adapter`` into ``base`` with no tensors in memory but the adapter's.

    Args:
        tokens: the vocabulary has a row for each of so many.
        dtype: type of all parameters; default: the one in which each is stored.
        round_trip: what the base's weights went through before training.
        averaged: take the average of the adapter's weights where one lies beside them.

    Raises:
        Unsuited: the base is stored in another form than it is used in, or the adapter changes it in a way not known here.
        ValueError: an adapter of another base, or weights that cannot be read.
    """
    model = _empty_model(base)
    state = model.state_dict(keep_vars=True)
    buffers = {name for name, _ in model.named_buffers()}
    stored = _stored_by_name(base, model, state)
    adapted = put_adapter(model, adapter, tokens, averaged=False)
    _refuse_unknown_layers(adapted)
    through = _cached(round_trip, {name: tensor for part in stored for name, tensor in part.items()})
    apart = heads_trained_apart(adapted)
    if not apart:
        _tie_saved_heads(adapted)
    if averaged and has_average(adapter):
        take_average(adapted, adapter)
    if apart:
        logger.warning("%s trains embedding and head apart: in the merged model they are no longer tied.", adapter)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False

    def merged(name: str, tensor: StreamedTensor) -> StreamedTensor:
        written = tensor.dtype if name in buffers or dtype is None or not tensor.dtype.is_floating_point else dtype
        return replace(_updated(adapted, name, through(name, tensor)), dtype=written)

    shards: Shards = []
    for part in stored:
        shards.append({})
        for name, tensor in part.items():
            partners = [other for other in state if other != name and state[other] is state[name] and apart]
            shards[-1] |= {own: merged(own, tensor) for own in (name, *partners)}
    return Plan(model, shards)


def heads_trained_apart(adapted: PeftModel) -> bool:
    """Whether the base ties embedding and head and the adapter changes one of them, or each in its own way."""
    base: Any = adapted.get_base_model()
    if not base.config.get_text_config().tie_word_embeddings or base.get_output_embeddings() is None:
        return False
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(embedding, ModulesToSaveWrapper) and isinstance(head, ModulesToSaveWrapper):
        first, second = _saved_copy(embedding).weight, _saved_copy(head).weight
        return second is not first and not second.is_meta and not torch.equal(first, second)
    if isinstance(embedding, TrainableTokensWrapper) and isinstance(head, TrainableTokensWrapper):
        return head.token_adapter.tied_adapter is not embedding.token_adapter
    wrappers = (LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper)
    return isinstance(embedding, wrappers) or isinstance(head, wrappers)


def _tie_saved_heads(adapted: PeftModel) -> None:
    """Make one parameter again of a tied embedding and head that are saved: loaded onto meta they are two of the same numbers."""
    base: Any = adapted.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if base.config.get_text_config().tie_word_embeddings and isinstance(head, ModulesToSaveWrapper):
        _saved_copy(head).weight = _saved_copy(embedding).weight


# ---- the base ----


def _empty_model(base: ModelArguments) -> PreTrainedModel:
    """The base on meta, with the generation config that is stored with it."""
    name = str(base.model_name_or_path)
    config = load_config(name, base)
    if getattr(config, "quantization_config", None):
        raise Unsuited("the base is quantised already")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=base.trust_remote_code)
    with suppress(OSError):  # none is stored: the one that the config gives
        model.generation_config = GenerationConfig.from_pretrained(name, revision=base.model_revision or "main")
    return model


def _stored_by_name(base: ModelArguments, model: Any, state: dict[str, Tensor]) -> Shards:
    """The base's shards by the model's names, complete, of the right shapes, of tied tensors one."""
    if any(value is not state.get(name) for name, value in revert_weight_conversion(model, dict(state)).items()):
        raise Unsuited(f"a {model.config.model_type} model stores its weights in another form than it uses them in")
    shards: Shards = []
    found: dict[str, StreamedTensor] = {}
    unused: list[str] = []
    for path in _stored_files(base):
        shards.append({})
        for stored, tensor in _read(path).items():
            name = _own_name(stored, model.base_model_prefix, state)
            if name is None:
                unused.append(stored)
                continue
            if tensor.shape != tuple(state[name].shape) or name in found:
                raise Unsuited(f"{stored} does not fit the model")
            first = next((other for other in found if state[other] is state[name]), None)
            found[name] = tensor
            if first is None:
                shards[-1][name] = tensor
            elif not _equal(found[first], tensor):
                raise Unsuited(f"{first} and {name} are tied, but are stored with different numbers")
    held_ids = {id(state[name]) for name in found}
    if missing := [name for name in state if id(state[name]) not in held_ids]:
        raise Unsuited(f"the base does not store {missing[0]}")
    if unused:
        logger.warning("%d stored tensors have no place in the model and are left out: %s", len(unused), unused[:3])
    return shards


def _stored_files(base: ModelArguments) -> list[Path]:
    """The base's safetensors files, from a folder or from the hub's cache."""
    name = str(base.model_name_or_path)

    def find(file: str) -> str | None:
        return cached_file(name, file, revision=base.model_revision, _raise_exceptions_for_missing_entries=False)

    index = find("model.safetensors.index.json")
    single = find("model.safetensors") if index is None else None
    if single is not None:
        return [Path(single)]
    if index is None:
        raise Unsuited("the base has no safetensors files")
    weight_map: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    paths = {file: find(file) for file in sorted(set(weight_map.values()))}
    if absent := [file for file, path in paths.items() if path is None]:
        raise Unsuited(f"the base lacks {absent[0]}")
    return [Path(str(path)) for path in paths.values()]


def _read(path: Path) -> dict[str, StreamedTensor]:
    try:
        with safe_open(path, framework="pt"):
            pass  # refuses a file that is cut off
        return read_tensors(path)
    except (SafetensorError, ValueError) as error:
        raise Unsuited(f"{path.name} cannot be read in pieces ({error})") from error


def _own_name(stored: str, prefix: str, state: dict[str, Tensor]) -> str | None:
    """The model's name of a stored tensor, which may stand there with or without the prefix of the bare model."""
    candidates = (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}."))
    return next((name for name in candidates if name in state), None)


def _equal(one: StreamedTensor, other: StreamedTensor) -> bool:
    return all(torch.equal(one.rows(a, b), other.rows(a, b)) for a, b in one.pieces())


def _cached(round_trip: RoundTrip | None, stored: dict[str, StreamedTensor]) -> Any:
    """A function of (name, tensor) that gives the tensor after the round trip; the last quantised one is kept whole."""

    @lru_cache(maxsize=1)
    def whole(name: str) -> Tensor:
        assert round_trip is not None
        return round_trip(name, stored[name].whole())

    def through(name: str, tensor: StreamedTensor) -> StreamedTensor:
        if round_trip is None:
            return tensor
        if name in round_trip.names:
            return replace(tensor, rows=lambda a, b: whole(name)[a:b].clone())
        return replace(tensor, rows=lambda a, b: round_trip(name, tensor.rows(a, b)))

    return through


# ---- the adapter ----


def _refuse_unknown_layers(adapted: PeftModel) -> None:
    """Layers of PEFT beyond LoRA and DoRA on linear layers and embeddings are merged by PEFT itself."""
    config: Any = adapted.peft_config[str(adapted.active_adapter)]
    if config.layer_replication:
        raise Unsuited("the adapter replicates layers")
    for name, module in adapted.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        variants = {type(variant).__name__ for variant in module.lora_variant.values()}
        if type(module) not in (Linear, Embedding) or not variants <= _VARIANTS:
            kind = ", ".join([type(module).__name__, *sorted(variants)])
            raise Unsuited(f"{name} has an update of its own kind ({kind})")


def _updated(adapted: PeftModel, name: str, tensor: StreamedTensor) -> StreamedTensor:
    """The base's tensor ``name`` after the adapter, with the rows that the vocabulary has by now."""
    adapter = str(adapted.active_adapter)
    owner, leaf = _owner(adapted.get_base_model(), name)
    layer = owner.token_adapter if isinstance(owner, TrainableTokensWrapper) else owner
    inner = layer.get_base_layer() if layer is not owner or isinstance(owner, LoraLayer) else owner
    if isinstance(inner, LoraLayer):
        raise Unsuited(f"{name} has two updates")
    own = getattr(inner, leaf)
    if not own.is_meta:  # the adapter has brought it
        tensor = held(own)
    elif tuple(own.shape) != tensor.shape:
        tensor = grown(tensor, own.shape[0])
    if layer is not owner and leaf == "weight":
        return with_rows(tensor, layer.token_indices[adapter], layer.trainable_tokens_delta[adapter])
    if isinstance(owner, LoraLayer) and leaf == "weight":
        return with_lora(tensor, owner, adapter)
    if isinstance(owner, LoraLayer) and leaf == "bias" and owner.lora_bias.get(adapter):
        return with_bias(tensor, owner, adapter)
    return tensor


def _owner(model: nn.Module, name: str) -> tuple[Any, str]:
    """The module that holds the tensor ``name`` of the base: PEFT's, where there is one, and the trained copy of a saved one."""
    *path, leaf = name.split(".")
    module: Any = model
    for part in path:
        module = getattr(module, part)
        if isinstance(module, ModulesToSaveWrapper):
            module = _saved_copy(module)
    return module, leaf


def _saved_copy(wrapper: ModulesToSaveWrapper) -> Any:
    return wrapper.modules_to_save[wrapper.active_adapters[0]]
