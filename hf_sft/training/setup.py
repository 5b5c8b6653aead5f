"""What happens to arguments, model and tokenizer before the Trainer sees them."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_sft.arguments import DataArguments, ModelArguments, WeDLMArguments
from hf_sft.checks import check_task, check_wedlm
from hf_sft.data.chat import end_of_turn_id
from hf_sft.data.templates import resolve_template
from hf_sft.models.loading import check_max_seq_length, load_model, load_tokenizer
from hf_sft.models.mask_token import record_mask_token, resolve_mask_token
from hf_sft.models.quantization import keep_trainable_on_cpu
from hf_sft.models.vocabulary import resize_embeddings, vocabulary_rows
from hf_sft.models.wrappers import base_model
from hf_sft.objectives import Objective, build_objective
from hf_sft.training_arguments import problems

logger = logging.getLogger(__name__)

_PLAIN = WeDLMArguments()
# Keywords of other libraries' trainers, and where the same thing is said here.
_ELSEWHERE = {
    "tokenizer": "processing_class",
    "max_seq_length": "data_args=DataArguments(max_seq_length=...)",
    "packing": "data_args=DataArguments(packing=...)",
    "dataset_text_field": "data_args=DataArguments(task_type='pretrain'), which reads the field text",
    "formatting_func": "conversations as train_dataset",
    "compute_loss_func": "a subclass that overrides compute_loss",
}


def check_options(options: dict[str, Any]) -> None:
    """Refuse keywords that ``Trainer`` does not take, or that would be ignored."""
    known = set(inspect.signature(Trainer.__init__).parameters) - {"compute_loss_func"}
    for name, value in options.items():
        if name not in known or (name == "compute_loss_func" and value is not None):
            instead = (
                f"use {_ELSEWHERE[name]}"
                if name in _ELSEWHERE
                else f"Trainer's are {', '.join(sorted(known - {'self'}))}"
            )
            raise ValueError(f"SFTTrainer takes no {name}: {instead}")


def check_arguments(args: Any, packing: bool | None) -> None:
    """Refuse what is not honoured, and settle what Trainer would decide wrongly for us."""
    if not isinstance(args, TrainingArguments):
        raise ValueError(f"args is a {type(args).__name__}: it must be TrainingArguments")
    if found := problems(args, packing=packing is not False):
        raise ValueError("these training arguments cannot be honoured:\n  " + "\n  ".join(found))
    if args.n_gpu > 1:
        # Trainer would wrap the model in nn.DataParallel, which cuts a packed row [1, T] along its first axis.
        logger.warning(
            "%d GPUs are visible and no launcher was used: training on one (use torchrun for all)", args.n_gpu
        )
        args._n_gpu = 1
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # compute_loss keeps every part of the forward in the graph


def prepare_model(model: Any, tokenizer: Any, peft_config: Any, args: Any) -> tuple[nn.Module, Any]:
    """The model on its device, loaded if it is a name, with a new adapter if one is asked for; and the tokenizer.

    Raises:
        ValueError: no model, or an adapter on an adapter.
    """
    if isinstance(model, str) or peft_config is not None:
        set_seed(args.seed)  # new weights are drawn here, before Trainer sets the seed
    if isinstance(model, str):
        named = ModelArguments(model_name_or_path=model)
        tokenizer = tokenizer or load_tokenizer(named)
        model = load_model(named, tokenizer=tokenizer, training=args)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {model!r}: it must be a model, or the folder or hub name of one")
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ValueError("model has an adapter already, and peft_config asks for another: leave out one of them")
        model = cast(nn.Module, get_peft_model(cast(PreTrainedModel, model), peft_config))
    base = base_model(model)
    if isinstance(embedding := base.get_input_embeddings(), nn.Embedding):
        embedding.padding_idx = (
            None  # it would keep the end of turn from learning where pad is eos; padding is never scored
        )
    if getattr(base, "quantization_method", None) is not None:
        keep_trainable_on_cpu(base)
    elif getattr(base, "hf_device_map", None) is None:
        model.to(args.device)
    low = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if low:
        warnings.warn(
            f"weights are trained in {', '.join(map(str, low))}: the optimizer's steps are smaller than the spacing of such "
            "numbers and most are rounded away, so the weights hardly move. Load the model in float32 and set bf16 to true "
            "for the speed.",
            stacklevel=3,
        )
    return model, tokenizer


def prepare_data_arguments(data: DataArguments | None, model: nn.Module) -> DataArguments:
    """The user's, checked against the model's positions; by default as long as the model allows, up to 2,048 tokens."""
    if data is None:
        limit = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
        default = DataArguments()
        data = replace(default, max_seq_length=min(default.max_seq_length, limit or default.max_seq_length))
    check_max_seq_length(base_model(model), data.max_seq_length)
    return data


def prepare_objective(
    data: DataArguments, wedlm: WeDLMArguments | None, backend: str, model: nn.Module, tokenizer: Any, seed: int
) -> Objective:
    """The objective of ``data``; for wedlm with its mask token, which has a row in the model and stands in what is saved.

    Raises:
        ValueError: settings that do not fit together, or a mask token that texts may hold.
    """
    given = set() if wedlm is None else {name for name, value in vars(wedlm).items() if value != getattr(_PLAIN, name)}
    wedlm = wedlm or WeDLMArguments()
    if found := [*check_task(data, set()), *check_wedlm(wedlm, data, backend, given)]:
        raise ValueError("; ".join(found))
    if data.objective == "causal":
        return build_objective(data, wedlm, mask_token_id=None, seed=seed)
    base = base_model(model)
    token = resolve_mask_token(tokenizer, base.config, mask_token=wedlm.mask_token, mask_token_id=wedlm.mask_token_id)
    if tokenizer is not None and token >= vocabulary_rows(base):
        if isinstance(model, PeftModel):
            raise ValueError(
                f"the mask token {wedlm.mask_token!r} is new and the model has an adapter already: call "
                "resize_token_embeddings on its base first, and name the token's id in trainable_token_indices"
            )
        resize_embeddings(base, tokenizer)
    if isinstance(model, PeftModel) and not _row_is_trained(model, token):
        logger.warning(
            "the row of the mask token %d is not trained: name it in the adapter's trainable_token_indices", token
        )
    record_mask_token(model, token)
    if wedlm.mask_sampling == "reference":
        logger.warning(
            "mask_sampling reference normalises its weights per micro-batch: the loss depends on how a batch is cut (under elbo "
            "it does not)"
        )
    return build_objective(data, wedlm, mask_token_id=token, seed=seed)


def _row_is_trained(model: PeftModel, token: int) -> bool:
    """Whether the embedding's row of ``token`` learns under the adapter: by itself, or with the whole embedding."""
    embedding: Any = base_model(model).get_input_embeddings()
    adapter = getattr(embedding, "token_adapter", None)
    if adapter is not None:
        return token in adapter.token_indices[model.active_adapter]
    return any(parameter.requires_grad for parameter in embedding.parameters())


def prepare_tokenizer(tokenizer: Any, model: nn.Module, data: DataArguments) -> Any:
    """The tokenizer with the template of the training, which is saved with it; ``generate`` will stop where the model learns to.

    Templates end turns with other tokens than the tokenizer's eos, so the end of turn joins ``generation_config.eos_token_id``.
    """
    if tokenizer is None:
        return None
    if data.chat_template is not None:
        tokenizer = copy.deepcopy(tokenizer)  # the user's own stays as it is
        tokenizer.chat_template = resolve_template(tokenizer, data.chat_template)
    token = None if getattr(tokenizer, "chat_template", None) is None else end_of_turn_id(tokenizer)
    config = base_model(model).generation_config
    if token is not None and config is not None:
        known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        config.eos_token_id = list(dict.fromkeys([token, *(eos for eos in known if eos is not None)]))
    return tokenizer
