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
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_sft.arguments import DataArguments, ModelArguments, WeDLMArguments
from hf_sft.attention.backends import backend_named
from hf_sft.attention.selfcheck import Choice, choose_layout, install_layout
from hf_sft.checks import check_task, check_values, check_wedlm
from hf_sft.data.chat import end_of_turn_id
from hf_sft.data.templates import resolve_template
from hf_sft.models.adapters import with_input_row
from hf_sft.models.compiling import compile_regions
from hf_sft.models.families import end_tokens
from hf_sft.models.head import HeadScorer
from hf_sft.models.liger import apply_liger
from hf_sft.models.loading import check_max_seq_length, load_model, load_tokenizer
from hf_sft.models.mask_token import record_mask_token, resolve_mask_token
from hf_sft.models.quantization import keep_trainable_on_cpu
from hf_sft.models.twin import random_twin
from hf_sft.models.vocabulary import resize_embeddings, vocabulary_rows
from hf_sft.models.wrappers import base_model
from hf_sft.objectives import Objective, build_objective
from hf_sft.training_arguments import problems, smaller_is_better

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
    "beta": "DPOTrainer with dpo_args=DPOArguments(dpo_beta=...)",
    "ref_model": "DPOTrainer, which takes one",
}


# What classes between Trainer and SFTTrainer take.
_OWN = {"activation_checkpointing_policy", "freeze", "thaw_at_step", "evaluation_args", "ema_args"}


def check_options(options: dict[str, Any]) -> None:
    """Refuse keywords that ``Trainer`` does not take, or that would be ignored."""
    known = set(inspect.signature(Trainer.__init__).parameters) - {"compute_loss_func"} | _OWN
    for name, value in options.items():
        if name not in known or (name == "compute_loss_func" and value is not None):
            instead = (
                f"use {_ELSEWHERE[name]}"
                if name in _ELSEWHERE
                else f"Trainer's are {', '.join(sorted(known - {'self'}))}"
            )
            raise ValueError(f"the trainer takes no {name}: {instead}")


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
    if args.greater_is_better and smaller_is_better(args.metric_for_best_model):  # transformers knows the loss alone
        logger.warning("greater_is_better is true for %s: the smallest value counts", args.metric_for_best_model)
        args.greater_is_better = False
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # compute_loss keeps every part of the forward in the graph


def load_named_model(model: Any, tokenizer: Any, args: Any) -> tuple[nn.Module, Any]:
    """The model, loaded if it is a name, and the tokenizer; ValueError for anything else."""
    if isinstance(model, str):
        set_seed(args.seed)  # new weights are drawn here, before Trainer sets the seed
        named = ModelArguments(model_name_or_path=model)
        tokenizer = tokenizer or load_tokenizer(named)
        model = load_model(named, tokenizer=tokenizer, training=args)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {model!r}: it must be a model, or the folder or hub name of one")
    return model, tokenizer


def prepare_model(model: nn.Module, peft_config: Any, args: Any, mask_token_id: int | None) -> nn.Module:
    """The model on its device, with a new adapter if one is asked for, which trains the row of a mask token.

    Raises:
        ValueError: an adapter on an adapter; as ``apply_liger``.
    """
    if peft_config is not None:
        if getattr(peft_config, "is_prompt_learning", False):
            raise ValueError(
                f"peft_config is a {type(peft_config).__name__}, which puts tokens of its own before each row: other rows than "
                "those of the answers would be scored; use LoRA or another adapter of weights"
            )
        if isinstance(model, PeftModel):
            raise ValueError("model has an adapter already, and peft_config asks for another: leave out one of them")
        set_seed(args.seed)
        if mask_token_id is not None:
            peft_config = with_input_row(cast(PreTrainedModel, model), peft_config, mask_token_id)
        model = cast(nn.Module, get_peft_model(cast(PreTrainedModel, model), peft_config))
    trained = any(parameter.requires_grad for parameter in model.parameters())
    if (
        trained
        and isinstance(model, PeftModel)
        and mask_token_id is not None
        and not _row_is_trained(model, mask_token_id)
    ):
        logger.warning("the adapter does not train the row of the mask token %d", mask_token_id)
    base = base_model(model)
    if isinstance(embedding := base.get_input_embeddings(), nn.Embedding):
        embedding.padding_idx = (
            None  # it would keep the end of turn from learning where pad is eos; padding is never scored
        )
    place_model(model, args)
    if args.use_liger_kernel:
        args.liger_kernel_config = apply_liger(model, args.liger_kernel_config)
    low = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if low:
        warnings.warn(
            f"weights are trained in {', '.join(map(str, low))}: the optimizer's steps are smaller than the spacing of such "
            "numbers and most are rounded away, so the weights hardly move. Load the model in float32 and set bf16 to true "
            "for the speed.",
            stacklevel=3,
        )
    return model


def place_model(model: nn.Module, args: Any) -> None:
    """Bring the model to its device, if it is not there and no engine does it."""
    base = base_model(model)
    if getattr(base, "quantization_method", None) is not None:
        keep_trainable_on_cpu(base)
    elif getattr(base, "hf_device_map", None) is None and not _placed_by_engine(base, args):
        model.to(args.device)


def _placed_by_engine(base: PreTrainedModel, args: Any) -> bool:
    """Whether weights reach the device in shards only: whole ones may be too large for it. Quantised ones are there already."""
    sharded = bool(args.fsdp) or is_deepspeed_zero3_enabled()
    return sharded and getattr(base, "quantization_method", None) is None


def measure_layout(
    model: nn.Module, scorer: HeadScorer, args: Any, backend: str, packing: bool | None, mask_token_id: int | None
) -> Choice:
    """How documents are laid out, and whether the head can be scored in chunks (``scorer`` remembers): measured on ``model``, or
    on a random twin in the first process where the engine is yet to put its weights together. What is to be compiled is, after
    that.

    Raises:
        ValueError: as ``choose_layout``, in all processes, and as ``compile_regions``.
    """
    probe = torch.arange(16, device=args.device)[None]
    if not _placed_by_engine(base_model(model), args):
        choice = choose_layout(model, backend, packing, mask_token_id, autocast=_autocasts(args))
        scorer.verify(model, probe)
    else:
        choice = _measure_twin(model, scorer, args, (backend, packing, mask_token_id), probe)
    if args.torch_compile:
        compile_regions(model, args.torch_compile_backend, args.torch_compile_mode)
    return choice


def _autocasts(args: Any) -> bool:
    return bool(args.bf16 or args.fp16)


def _measure_twin(
    model: nn.Module, scorer: HeadScorer, args: Any, asked: tuple[Any, ...], probe: torch.Tensor
) -> Choice:
    base = base_model(model)
    outcome: list[Any] = [None]
    if args.process_index == 0:
        twin = random_twin(base, args.device)
        backend, packing, mask_token_id = asked
        mask_token_id = None if mask_token_id is None else min(mask_token_id, vocabulary_rows(twin) - 1)
        twin_scorer = HeadScorer(twin)
        try:
            choice = choose_layout(twin, backend, packing, mask_token_id, autocast=_autocasts(args))
            twin_scorer.verify(twin, probe)
            outcome = [(choice.backend and choice.name, choice.reason, twin_scorer.why_whole)]
        except ValueError as error:
            outcome = [error]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], ValueError):
        raise outcome[0]
    name, reason, why_whole = outcome[0]
    scorer.chunked, scorer.why_whole = not why_whole, why_whole
    chosen = backend_named(name, wedlm=asked[2] is not None) if name else None
    install_layout(model, chosen)
    return Choice(chosen, f"{reason}, on a random twin")


def prepare_data_arguments(data: DataArguments | None, model: nn.Module, tasks: tuple[str, ...]) -> DataArguments:
    """The user's, checked against the model's positions; by default as long as the model allows, up to 2,048 tokens.

    Args:
        tasks: values of ``task_type`` that the trainer is for, its default first.
    """
    if data is None:
        limit = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
        default = DataArguments(task_type=cast(Any, tasks[0]))
        data = replace(default, max_seq_length=min(default.max_seq_length, limit or default.max_seq_length))
    if found := [*check_values(data)]:
        raise ValueError("; ".join(found))
    if data.task_type not in tasks:
        raise ValueError(
            f"data_args.task_type is {data.task_type!r}, and this trainer is for {' and '.join(tasks)}: DPOTrainer learns from "
            "preferences (dpo), SFTTrainer from conversations and texts"
        )
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
    if found := [*check_values(wedlm)] or [*check_task(data, set()), *check_wedlm(wedlm, data, backend, given)]:
        raise ValueError("; ".join(found))
    if data.objective == "causal":
        return build_objective(data, wedlm, mask_token_id=None, seed=seed)
    base = base_model(model)
    token = resolve_mask_token(tokenizer, base.config, mask_token=wedlm.mask_token, mask_token_id=wedlm.mask_token_id)
    if tokenizer is not None and token >= vocabulary_rows(base):
        if isinstance(model, PeftModel):
            raise ValueError(
                f"the mask token {wedlm.mask_token!r} is new and the model has an adapter already: pass the base and a "
                "peft_config, or call resize_token_embeddings before the adapter is put on"
            )
        resize_embeddings(base, tokenizer)
    if token >= vocabulary_rows(base):
        raise ValueError(f"the mask token id {token} is beyond the model's {vocabulary_rows(base)} embedding rows")
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
    if data.chat_template is not None or data.system_prompt is not None:
        tokenizer = copy.deepcopy(tokenizer)  # the user's own stays as it is
        tokenizer.chat_template = resolve_template(tokenizer, data.first_template, data.system_prompt)
    token = None if getattr(tokenizer, "chat_template", None) is None else end_of_turn_id(tokenizer)
    config = base_model(model).generation_config
    if token is not None and config is not None:
        config.eos_token_id = end_tokens(config, token)
    return tokenizer
