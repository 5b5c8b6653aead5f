"""Tokenizers and models as the arguments ask for them: from a folder, from the hub, or from a config alone."""

from __future__ import annotations

import difflib
import json
import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_sft.arguments import LoraArguments, ModelArguments
from hf_sft.checks import check_lora, check_model
from hf_sft.data.templates import resolve_template
from hf_sft.locks import one_of
from hf_sft.models.families import ensure_pad_token
from hf_sft.models.quantization import (
    keep_trainable_on_cpu,
    quantization_config,
    quantized_device,
    tell_unquantized,
)
from hf_sft.models.sharded import without_partitioning
from hf_sft.models.vocabulary import add_special_tokens, resize_embeddings
from hf_sft.models.wedlm import MODEL_TYPE

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

_TOKENIZER_PATTERNS = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


def load_tokenizer(model: ModelArguments, *, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """The model's tokenizer, or the one named by ``tokenizer_name_or_path``, with the new special tokens and a pad token.

    Args:
        chat_template: name, file or text of a Jinja template; it replaces the tokenizer's own and is saved with it.

    Raises:
        ValueError: no tokenizer there, or one that is not fast (spans are found by its offsets).
    """
    name = model.tokenizer_name_or_path or model.model_name_or_path or _folder_of(model.config_name_or_path)
    if name is None:
        raise ValueError(
            "No tokenizer is named; set model_name_or_path, or tokenizer_name_or_path to train from scratch."
        )
    _require_place(name, "tokenizer")
    if os.path.isdir(name) and not any(path for pattern in _TOKENIZER_PATTERNS for path in Path(name).glob(pattern)):
        raise ValueError(
            f"No tokenizer is in {name!r}: it holds no tokenizer.json. Set tokenizer_name_or_path to a folder or hub name that "
            "holds one."
        )
    revision = model.model_revision if name == model.model_name_or_path else None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=model.trust_remote_code, use_fast=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"No tokenizer could be loaded from {name!r}{_not_local(name)}: {_one_line(error)} "
            "Set tokenizer_name_or_path to a folder or hub name that holds a tokenizer.json."
        ) from error
    if not tokenizer.is_fast or len(tokenizer) == 0:
        raise ValueError(f"{name!r} gives no fast tokenizer with a vocabulary; a tokenizer.json is needed.")
    add_special_tokens(tokenizer, model.new_special_tokens)
    ensure_pad_token(tokenizer, name)
    tokenizer.padding_side = "right"
    if chat_template is not None:
        tokenizer.chat_template = resolve_template(tokenizer, chat_template)
    return tokenizer


def load_model(
    model: ModelArguments,
    lora: LoraArguments | None = None,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    training: Any = None,
    input_rows: Sequence[int] = (),
) -> PreTrainedModel | PeftModel:
    """The model to train: full weights, or a frozen base with an adapter.

    Args:
        tokenizer: gives new tokens their rows; from scratch, it sets the size of the vocabulary and the special ids.
        training: training arguments, for the device, the engine and activation checkpointing.
        input_rows: tokens that are read and never written (a mask token): a new adapter trains their rows of the embedding.

    Raises:
        ValueError: the arguments contradict each other, or the weights are missing, incomplete, unreadable or quantised already.
    """
    lora = lora or LoraArguments()
    _check_request(model, lora)
    dtype = resolve_dtype(model, lora)
    if model.config_name_or_path is not None:
        config = scratch_config(model, tokenizer)
        loaded = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code)
    else:
        with _turn_to_load(model):
            loaded = _load_weights(model, dtype, training)
    _tell_dtype(model, dtype, loaded.dtype)
    new_ids = resize_embeddings(loaded, tokenizer, input_rows) if tokenizer is not None else []
    if model.train_mode == "full":
        return loaded
    from hf_sft.models.adapters import add_adapter

    if training is not None:
        set_seed(training.seed)  # loading draws random numbers, and not the same ones under every engine
    return add_adapter(
        loaded,
        lora,
        new_token_ids=[token for token in new_ids if token not in input_rows],
        input_token_ids=input_rows,
        training=training,
        revision=model.model_revision,
    )


def _tell_dtype(model: ModelArguments, wanted: torch.dtype, found: torch.dtype) -> None:
    """ZeRO-3 loads weights in the type of its arithmetic.

    Raises:
        ValueError: another type was asked for by name.
    """
    if found == wanted or not is_deepspeed_zero3_enabled():
        return
    why = f"under ZeRO-3 weights are held in {str(found).removeprefix('torch.')} (float32 unless bf16 or fp16 is true)"
    if model.dtype is not None:
        raise ValueError(f"dtype is {model.dtype}, and {why}: leave dtype out, and choose by bf16.")
    if model.train_mode == "full":
        logger.info("%s; the masters that are trained are float32", why)
    else:
        logger.warning("%s: for a base in bfloat16 set bf16 to true", why)


def resolve_dtype(model: ModelArguments, lora: LoraArguments) -> torch.dtype:
    """Type of the loaded weights: float32 for full training, bfloat16 for a frozen base, unless ``dtype`` says otherwise.

    Trained biases are the base's own parameters; where there are some, a frozen base is float32 as well.
    """
    if model.dtype is None:
        in_float32 = model.train_mode == "full" or lora.lora_bias != "none"
        return torch.float32 if in_float32 else torch.bfloat16
    return getattr(torch, model.dtype)


def quantization_kind(model: ModelArguments) -> str | None:
    """How the base is held under qlora; None in the other modes."""
    return (model.quantization or "nf4") if model.train_mode == "qlora" else None


def check_max_seq_length(model: PreTrainedModel | PretrainedConfig, max_seq_length: int) -> None:
    """Raise ValueError if ``max_seq_length`` (tokens) is beyond the positions the model knows; models without positions pass."""
    known = known_positions(getattr(model, "config", model))
    if known is not None and max_seq_length > known:
        raise ValueError(
            f"max_seq_length {max_seq_length} is beyond the model's {known} positions. Set max_seq_length to at most {known}, "
            "or take a model with a longer context (from scratch: config_overrides max_position_embeddings)."
        )


def known_positions(config: Any) -> int | None:
    """Positions that a model of ``config`` was made for, stretched ones included; None where it names none."""
    config = config.get_text_config()
    known = getattr(config, "max_position_embeddings", None)
    if not isinstance(known, int) or known <= 0:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    return max(known, int(original * factor)) if original and factor else known


def scratch_config(model: ModelArguments, tokenizer: PreTrainedTokenizerFast | None = None) -> PretrainedConfig:
    """The config of a model from scratch: the named one, changed by ``config_overrides``, with the tokenizer's ids.

    Raises:
        ValueError: a field that the config does not have (with the nearest), or values that do not fit together.
    """
    name = str(model.config_name_or_path)
    overrides = overrides_of(model.config_overrides)
    config = load_config(name, model)
    known = {*config.to_dict(), *config.attribute_map} - {"quantization_config"}
    if unknown := [key for key in overrides if key not in known]:
        hints = [f"{key} (nearest: {', '.join(difflib.get_close_matches(key, known, 1)) or 'none'})" for key in unknown]
        raise ValueError(f"config_overrides: a {config.model_type} config has no field {'; '.join(hints)}.")
    fields, _ = PretrainedConfig.get_config_dict(name, revision=model.model_revision)
    fields.pop("quantization_config", None)
    layers = overrides.get("num_hidden_layers")
    if isinstance(layers, int) and "layer_types" in fields and "layer_types" not in overrides:
        kept = fields.pop("layer_types")  # one entry per layer; shorter is a prefix, longer is the class's own default
        if layers <= len(kept):
            fields["layer_types"] = kept[:layers]
    try:
        config = type(config).from_dict({**fields, **overrides})
    except Exception as error:  # config classes validate by exceptions of many types
        raise ValueError(f"config_overrides {overrides} do not fit {name!r}: {error}") from error
    if tokenizer is not None:
        _fit_to_tokenizer(config.get_text_config(), tokenizer, asked="vocab_size" in overrides)
    return config


def _fit_to_tokenizer(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, *, asked: bool) -> None:
    """Vocabulary at least the tokenizer's, and its special ids."""
    if config.vocab_size < len(tokenizer):
        message = f"vocab_size {config.vocab_size} raised to the tokenizer's {len(tokenizer)} tokens."
        warnings.warn(message, stacklevel=4) if asked else logger.info(message)
        config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    # An embedding zeroes the row of its padding index: eos must not be that.
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None


def _turn_to_load(model: ModelArguments) -> AbstractContextManager[None]:
    """Wait until fewer than ``max_loading_processes`` of this launch and machine load weights: their peaks do not add up.

    Raises:
        ValueError: the processes load together.
    """
    processes = model.max_loading_processes
    if processes is None:
        return nullcontext()
    if is_deepspeed_zero3_enabled() and model.train_mode != "qlora":  # quantised weights are partitioned later
        raise ValueError(
            f"max_loading_processes is {processes}, and under ZeRO-3 all processes load together, each its part of every tensor: "
            "none can wait for another. Leave max_loading_processes out."
        )
    return one_of(processes)


def _load_weights(model: ModelArguments, dtype: torch.dtype, training: Any) -> PreTrainedModel:
    """A pretrained causal LM, checked to be complete; quantised on the way in under qlora."""
    name = str(model.model_name_or_path)
    _require_place(name, "model")
    _require_weights(name)
    config = load_config(name, model)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{name!r} is quantised already; training starts from the original weights (train_mode qlora quantises them itself)."
        )
    extra: dict[str, Any] = {}
    partitioning: AbstractContextManager[None] = nullcontext()
    if model.train_mode == "qlora":
        partitioning = without_partitioning()  # of quantised weights it is the engine's, later
        kind = str(quantization_kind(model))
        extra["quantization_config"] = quantization_config(kind, dtype, config, double=model.double_quantization)
        extra["device_map"] = {"": quantized_device(training)}
    try:
        with partitioning:
            outcome: Any = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                revision=model.model_revision,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **extra,
            )  # fmt: skip  (mismatched sizes are refused below, by name)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"The weights of {name!r} could not be loaded: {_one_line(error)}") from error
    loaded, info = outcome
    _check_complete(name, info)
    loaded.train()  # as from_config; Trainer sets it for each phase
    if model.train_mode == "qlora":
        tell_unquantized(loaded, str(quantization_kind(model)))
        if quantization_kind(model) == "nf4":
            keep_trainable_on_cpu(loaded)
        loaded.requires_grad_(False)
    return loaded


def _check_complete(name: str, info: dict[str, Any]) -> None:
    """Weights that had to be made up are refused; weights that the model has no place for are named."""
    if missing := sorted(info.get("missing_keys", ())):
        raise ValueError(
            f"The weights of {name!r} lack {len(missing)} of the model's tensors, which would be random: "
            f"{_sample(missing)}. Take a complete checkpoint of a causal LM, or train from scratch with config_name_or_path."
        )
    if mismatched := info.get("mismatched_keys"):
        found = [f"{key} is {tuple(stored)} and must be {tuple(wanted)}" for key, stored, wanted in sorted(mismatched)]
        raise ValueError(f"The weights of {name!r} do not fit its config.json: {_sample(found)}.")
    if unexpected := sorted(info.get("unexpected_keys", ())):
        warnings.warn(
            f"{len(unexpected)} tensors of {name!r} have no place in the model and are not used: {_sample(unexpected)}.",
            stacklevel=5,
        )


def load_config(name: str, model: ModelArguments) -> PretrainedConfig:
    """The config at ``name``; it must be one of a causal LM."""
    _require_place(name, "config")
    _refuse_adapter(name)
    _refuse_official_code(name, model)
    try:
        config = AutoConfig.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"No model config could be read from {name!r}{_not_local(name)}: {_one_line(error)}"
        ) from error
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not remote and type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{name!r} is a {config.model_type!r} model, which transformers has no causal language model for."
        )
    if config.model_type == MODEL_TYPE:
        vars(config).pop("auto_map", None)  # it names files that are not saved with what is trained here
    return config


def _refuse_official_code(name: str, model: ModelArguments) -> None:
    """The code that the official WeDLM checkpoints bring along is for older versions of transformers."""
    if not model.trust_remote_code:
        return
    try:
        fields, _ = PretrainedConfig.get_config_dict(name, revision=model.model_revision)
    except (OSError, ValueError):
        return  # said by who reads the config next
    if fields.get("model_type") == MODEL_TYPE and "auto_map" in fields:
        raise ValueError(
            f"trust_remote_code is true, and {name!r} is a WeDLM checkpoint, whose own code fails on this version of "
            "transformers. hf_sft knows the architecture: set trust_remote_code to false."
        )


def _check_request(model: ModelArguments, lora: LoraArguments) -> None:
    """Refuse arguments that contradict each other, all of them at once."""
    problems = [*check_model(model, set()), *check_lora(lora, model.train_mode, set())]
    if model.config_name_or_path is not None and model.train_mode == "lora":
        problems.append(
            "train_mode lora needs a trained base, and config_name_or_path has none; use full, or model_name_or_path"
        )
    if lora.adapter_name_or_path and model.train_mode == "full":
        problems.append(
            "adapter_name_or_path with train_mode full: set train_mode lora or qlora, or merge the adapter first"
        )
    if problems:
        raise ValueError("; ".join(problems) + ".")


def _require_place(name: str, what: str) -> None:
    """A name that reads like a path must exist; any other may be a hub name."""
    looks_local = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith(".json") or "\\" in name
    if looks_local and not os.path.exists(name):
        raise ValueError(f"{what}: {name!r} does not exist. Check the path (relative ones start at {os.getcwd()}).")


def _refuse_adapter(name: str) -> None:
    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
        raise ValueError(
            f"{name!r} holds an adapter, not a model. Set adapter_name_or_path to it and model_name_or_path to its base, "
            "or merge it first: hf-sft merge."
        )


def _require_weights(name: str) -> None:
    """A local folder must hold a config and weights of a whole model."""
    if not os.path.exists(name):
        return
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(
            f"model_name_or_path {name!r} is a file; give the folder that holds config.json and the weights."
        )
    if not (folder / "config.json").is_file():
        _refuse_adapter(name)
        raise ValueError(f"{name!r} holds no config.json, so it is no model folder.")
    if not any(path.name != "training_args.bin" for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern)):
        raise ValueError(
            f"{name!r} holds a config.json but no weights; to train from scratch, set config_name_or_path to it."
        )


def overrides_of(value: dict | str | None) -> dict[str, Any]:
    """``config_overrides`` as a dict."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"config_overrides {value!r} is no JSON object: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"config_overrides {value!r} must be an object of field names and values.")
    return dict(value or {})


def _folder_of(name: str | None) -> str | None:
    """Where the tokenizer of a config would be: beside it."""
    return os.path.dirname(name) or "." if name and os.path.isfile(name) else name


def _not_local(name: str) -> str:
    return "" if os.path.exists(name) else f" (no such folder in {os.getcwd()}, so taken for a hub name)"


def _one_line(error: BaseException, length: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."


def _sample(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
