"""Loading what a training has left behind to decode with it: a whole model, or an adapter on its base."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from hf_sft.arguments import ModelArguments
from hf_sft.models.adapters import load_adapter, read_adapter_config
from hf_sft.models.loading import load_config, load_model, load_tokenizer
from hf_sft.models.mask_token import adapter_mask_token, record_mask_token
from hf_sft.models.vocabulary import grow_embeddings, vocabulary_rows

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def load_for_inference(
    name: str, *, base: str | None = None, dtype: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, PreTrainedTokenizerFast]:
    """A trained model in evaluation mode and its tokenizer, on the GPU if there is one.

    Args:
        name: folder or hub name of a whole model, or folder of an adapter (one with an adapter_config.json). The adapter's own
            tokenizer and generation config (ends of turn, mask token) count, where it has them.
        base: the adapter's base, where it is not what the adapter names; with it, ``name`` may be the hub name of an adapter.
        dtype: type of the weights (float32, bfloat16, float16); default: the one that the model's config states.

    Raises:
        ValueError: nothing to load there, incomplete weights, an adapter of another base, ``base`` for a whole model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    is_adapter = Path(name, "adapter_config.json").is_file()
    if base is not None and not is_adapter and Path(name).exists():
        raise ValueError(f"{name!r} holds no adapter, and base is {base!r}; leave out the base of a whole model")
    if is_adapter or base is not None:
        arguments = base_arguments(name, base, trust_remote_code=trust_remote_code)
    else:
        arguments = ModelArguments(model_name_or_path=name, trust_remote_code=trust_remote_code)
    arguments.dtype = dtype or own_dtype(arguments)  # type: ignore[assignment]
    model: Any = cast(PreTrainedModel, load_model(arguments))
    if is_adapter or base is not None:
        tokenizer = adapter_tokenizer(name, arguments)
        model = put_adapter(model, name, len(tokenizer))
    else:
        tokenizer = load_tokenizer(arguments)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


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


def put_adapter(model: PreTrainedModel, adapter: str, tokens: int) -> Any:
    """``model`` with the adapter on it, a row for each of ``tokens``, and the adapter's generation config."""
    if tokens > vocabulary_rows(model):
        grow_embeddings(model, tokens)
    adapted = load_adapter(model, adapter)
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
