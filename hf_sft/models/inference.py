"""Loading what a training has left behind to decode with it: a whole model, or an adapter on its base."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from hf_sft.arguments import ModelArguments
from hf_sft.checkpoints.folders import checkpoints_in, read_state
from hf_sft.data.cache import cache_key, hash_files
from hf_sft.models.adapters import load_adapter, read_adapter_config
from hf_sft.models.averages import AVERAGE_FILE, has_average
from hf_sft.models.loading import load_config, load_model, load_tokenizer
from hf_sft.models.mask_token import adapter_mask_token, record_mask_token
from hf_sft.models.vocabulary import grow_embeddings, vocabulary_rows

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_WEIGHTS = ("adapter_model.*", "model*.safetensors", "pytorch_model*.bin")
_SETTINGS = (
    AVERAGE_FILE,
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
)
_LARGE_BYTES = 1 << 28


def load_for_inference(
    name: str,
    *,
    base: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    checkpoint: str | None = None,
    averaged: bool = True,
) -> tuple[Any, PreTrainedTokenizerFast]:
    """A trained model in evaluation mode and its tokenizer, on the GPU if there is one.

    Args:
        name: folder or hub name of a whole model, folder of an adapter (one with an adapter_config.json), or output folder of a
            run. The adapter's own tokenizer and generation config (ends of turn, mask token) count, where it has them.
        base: the adapter's base, where it is not what the adapter names; with it, ``name`` may be the hub name of an adapter.
        dtype: type of the weights (float32, bfloat16, float16); default: the one that the model's config states.
        checkpoint: of an output folder: ``best``, ``last`` or a number of steps; default: the run's result.
        averaged: take the average of the weights where one lies beside them (ema.safetensors).

    Raises:
        ValueError: nothing to load there, incomplete weights, an adapter of another base, ``base`` for a whole model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    name = find_model(name, checkpoint)
    if base is not None and not is_adapter(name) and Path(name).exists():
        raise ValueError(f"{name!r} holds no adapter, and base is {base!r}; leave out the base of a whole model")
    if is_adapter(name) or base is not None:
        arguments = base_arguments(name, base, trust_remote_code=trust_remote_code)
    else:
        arguments = ModelArguments(model_name_or_path=name, trust_remote_code=trust_remote_code)
    arguments.dtype = dtype or own_dtype(arguments)  # type: ignore[assignment]
    model: Any = cast(PreTrainedModel, load_model(arguments))
    if is_adapter(name) or base is not None:
        _warn_of_other_base(name, base)
        tokenizer = adapter_tokenizer(name, arguments)
        model = put_adapter(model, name, len(tokenizer), averaged=averaged)
    else:
        tokenizer = load_tokenizer(arguments)
        if averaged and has_average(name):
            take_average(model, name)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _warn_of_other_base(adapter: str, base: str | None) -> None:
    """Weights of the same shapes are put together without an error, and what comes of it may be nonsense."""
    named = read_adapter_config(adapter).base_model_name_or_path
    if base is not None and named and Path(named).resolve() != Path(base).resolve():
        logger.warning(
            "The adapter in %s was trained on %s, and is put on %s: they must be the same model.", adapter, named, base
        )


def is_adapter(folder: str) -> bool:
    """Whether ``folder`` holds an adapter."""
    return Path(folder, "adapter_config.json").is_file()


def find_model(folder: str, checkpoint: str | None = None) -> str:
    """The folder that holds the model: ``folder`` itself, or a checkpoint in it; the name of a model on the hub is left as it is.

    Args:
        checkpoint: ``best``, ``last``, or a number of steps (also as checkpoint-N).

    Raises:
        ValueError: there is no such checkpoint; or no model, with the checkpoints to choose from.
    """
    path = Path(folder)
    if not path.is_dir():
        if checkpoint is not None:
            raise ValueError(
                f"checkpoint is {checkpoint!r}, and {folder!r} is not an output folder of a run; leave it out"
            )
        return folder
    held = checkpoints_in(path)
    choices = [word for word in ("best", "last") if _named_checkpoint(path, word) is not None]
    choices += [str(step) for step in held]
    if checkpoint is None:
        if _has_weights(path):
            return folder
        if choices:
            raise ValueError(
                f"{folder!r} holds no final model; choose one of its checkpoints with --checkpoint: {', '.join(choices)}"
            )
        raise ValueError(
            f"{folder!r} holds no model: neither weights of an adapter (adapter_model.safetensors) nor of a whole model "
            "(model.safetensors) lie in it"
        )
    number = checkpoint.removeprefix("checkpoint-")
    found = held.get(int(number)) if number.isdecimal() else _named_checkpoint(path, checkpoint)
    if found is None:
        there = f"choose one of {', '.join(choices)}" if choices else "it has no checkpoints"
        raise ValueError(f"{folder!r} has no checkpoint {checkpoint!r}; {there}")
    if not _has_weights(found):
        raise ValueError(f"checkpoint {str(found)!r} holds no model: no weights lie in it; choose another one")
    return str(found)


def _named_checkpoint(folder: Path, word: str) -> Path | None:
    """What ``best`` or ``last`` of an output folder is: the link of that name, else what the files say."""
    if word not in ("best", "last"):
        return None
    if (folder / word).is_dir():
        return (folder / word).resolve()
    held = checkpoints_in(folder)
    newest = next(iter(held.values()), None)
    if word == "last" or newest is None:
        return newest
    state = newest / "trainer_state.json"
    named = read_state(newest).get("best_model_checkpoint") if state.is_file() else None
    best = folder / Path(named).name if named else None
    return best if best is not None and best.is_dir() else None


def _has_weights(folder: Path) -> bool:
    """Whether an adapter or a whole model lies in ``folder``."""
    return any(any(folder.glob(pattern)) for pattern in _WEIGHTS)


def files_key(folder: str) -> str | None:
    """A hash of what decoding reads of a model's folder; None for the name of a model on the hub.

    Very large files count by their size and time.
    """
    path = Path(folder)
    if not path.is_dir():
        return None
    files = sorted({file for pattern in (*_WEIGHTS, *_SETTINGS) for file in path.glob(pattern) if file.is_file()})
    large = [file for file in files if file.stat().st_size > _LARGE_BYTES]
    small = [file for file in files if file not in large]
    parts = {"files": hash_files(small), "large": hash_files(large, contents=False)}
    return cache_key({**parts, "names": [file.name for file in [*small, *large]]})


def take_average(model: Any, folder: str) -> None:
    """Put the averaged weights of ``folder`` (ema.safetensors) in the place of the raw ones.

    Raises:
        ValueError: they cannot be read, or are not weights of this model.
    """
    path = Path(folder, AVERAGE_FILE)
    parameters = dict(model.named_parameters())
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            names = list(file.keys())
            for name in names:
                if name in parameters and parameters[name].is_meta:  # a copy into nothing is nothing
                    raise ValueError(
                        f"{str(path)!r} averages {name}, which the adapter's own files do not hold; take the raw weights with "
                        "--raw_weights"
                    )
                if name not in parameters or list(parameters[name].shape) != file.get_slice(name).get_shape():
                    raise ValueError(
                        f"{str(path)!r} is the average of another model's weights: {name} is not here, or of another shape; "
                        "take the raw weights with --raw_weights"
                    )
            for name in names:
                parameters[name].copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}; take the raw weights with --raw_weights") from error
    logger.info("%d averaged weights of %s are taken in place of the raw ones.", len(names), path)


def base_arguments(adapter: str, base: str | None, *, trust_remote_code: bool = False) -> ModelArguments:
    """How to load the base of ``adapter``: the named one, else what the adapter names.

    Raises:
        ValueError: no adapter there, or no base is named.
    """
    config = read_adapter_config(adapter)
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError(f"Adapter {adapter!r} does not name its base; give it with --base.")
    return ModelArguments(
        model_name_or_path=name,
        model_revision=config.revision if name == config.base_model_name_or_path else None,
        trust_remote_code=trust_remote_code,
    )


def own_dtype(arguments: ModelArguments) -> str:
    """The type that the model's config states; float32 if it states none."""
    stated = load_config(str(arguments.model_name_or_path), arguments).dtype
    name = str(stated).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def adapter_tokenizer(adapter: str, base: ModelArguments) -> PreTrainedTokenizerFast:
    """The adapter's tokenizer, if it has one (training may have added tokens or a template), else the base's."""
    source = adapter
    if Path(adapter).is_dir() and not any(Path(adapter, name).is_file() for name in _TOKENIZER_FILES):
        logger.warning("%s holds no tokenizer; the base's is taken.", adapter)
        source = str(base.model_name_or_path)
    return load_tokenizer(ModelArguments(model_name_or_path=source, trust_remote_code=base.trust_remote_code))


def put_adapter(model: PreTrainedModel, adapter: str, tokens: int, *, averaged: bool = True) -> Any:
    """``model`` with the adapter on it, a row for each of ``tokens``, and the adapter's generation config.

    Args:
        averaged: take the average of the adapter's weights where one lies beside them.
    """
    if tokens > vocabulary_rows(model):
        grow_embeddings(model, tokens)
    adapted = load_adapter(model, adapter)
    if averaged and has_average(adapter):
        take_average(adapted, adapter)
    adopt_generation_config(model, adapter)
    return adapted


def adopt_generation_config(model: PreTrainedModel, adapter: str) -> None:
    """Take over the adapter's generation config and mask token: an adapter has no config, and the base's may name another."""
    path = Path(adapter, "generation_config.json")
    if not path.is_file():
        return
    model.generation_config = GenerationConfig.from_pretrained(adapter)
    token = adapter_mask_token(adapter)
    if token is not None:
        record_mask_token(model, token)
