"""Task -> trainer, the one table; and from arguments to what the trainers take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_sft.arguments import ModelArguments
from hf_sft.checks import evaluation_wanted
from hf_sft.data.bins import Bins
from hf_sft.data.live import LiveRecords
from hf_sft.data.pipeline import evaluation_files, prepare_dataset
from hf_sft.data.prepared import PreparedData, packing_report
from hf_sft.data.templates import has_template, resolve_template
from hf_sft.models.loading import check_max_seq_length, load_config, load_tokenizer
from hf_sft.models.mask_token import adapter_mask_token, resolve_mask_token
from hf_sft.objectives import Objective, build_objective
from hf_sft.parsing import Arguments
from hf_sft.training.dpo import DPOTrainer
from hf_sft.training.trainer import SFTTrainer

TRAINERS: dict[str, type[SFTTrainer]] = {"sft": SFTTrainer, "pretrain": SFTTrainer, "dpo": DPOTrainer}


def read_data_side(arguments: Arguments, *, whole_rows: bool = True) -> tuple[Any, Objective]:
    """The tokenizer, with the template of the training, and the objective: all that data are prepared with.

    Args:
        whole_rows: rows of up to ``max_seq_length`` tokens are to be made, which the model must have positions for.

    Raises:
        ValueError: too long rows, no template, or a mask token that texts may hold.
    """
    if whole_rows:
        _check_positions(arguments)
    tokenizer = load_tokenizer(arguments.model)
    data = arguments.data
    if data.task_type != "pretrain" and (has_template(tokenizer, data.first_template) or data.system_prompt):
        tokenizer.chat_template = resolve_template(tokenizer, data.first_template, data.system_prompt)
    return tokenizer, objective_of(arguments, tokenizer)


def _check_positions(arguments: Arguments) -> None:
    """Before anything is tokenised, where there is a config: data can be looked at with a tokenizer alone.

    Raises:
        ValueError: ``max_seq_length`` is beyond the model's positions.
    """
    model = arguments.model
    try:
        config = load_config(str(model.model_name_or_path or model.config_name_or_path), model)
    except ValueError:
        return  # said when the model is loaded
    if model.config_name_or_path is None:  # config_overrides may raise the number of positions
        check_max_seq_length(config, arguments.data.max_seq_length)


def prepare_data(
    arguments: Arguments, tokenizer: Any, objective: Objective, splits: tuple[str, ...] = ("train", "eval")
) -> dict[str, PreparedData]:
    """Token rows for ``train``, and for ``eval`` if there is anything to evaluate on.

    Raises:
        ValueError: as ``prepare_dataset``; or evaluation is asked for and the training data bring none.
    """
    data, seed = arguments.data, arguments.training.seed
    files = {"train": data.train_file, "eval": evaluation_files(data)}
    if files["eval"] is None and (wanted := evaluation_wanted(arguments.training, arguments.given)):
        raise ValueError(f"{' and '.join(wanted)}, and the training data bring no evaluation records: name eval_file")
    return {
        split: prepare_dataset(
            files[split],
            tokenizer,
            data=data,
            split=split,
            rules=objective.row_rules(evaluation=split == "eval"),
            seed=seed,
        )
        for split in splits
        if files[split] is not None
    }


def training_data(
    arguments: Arguments, tokenizer: Any, objective: Objective
) -> Mapping[str, PreparedData | LiveRecords]:
    """As :func:`prepare_data`, but for training data that are tokenised while the model trains, if that is asked for."""
    data = arguments.data
    if not data.is_live:
        return prepare_data(arguments, tokenizer, objective)
    rules = objective.row_rules(evaluation=False)
    live = LiveRecords.of_files(data.train_file, tokenizer, data=data, rules=rules, seed=arguments.training.seed)
    return {"train": live, **prepare_data(arguments, tokenizer, objective, ("eval",))}


def objective_of(arguments: Arguments, tokenizer: Any) -> Objective:
    """The objective that the arguments ask for, before there is a model: its mask token joins the tokenizer if it is new.

    Raises:
        ValueError: as ``resolve_mask_token``.
    """
    token = None
    if arguments.data.objective == "wedlm":
        wedlm, model = arguments.wedlm, arguments.model
        config = load_config(str(model.model_name_or_path or model.config_name_or_path), model)
        if adapter := arguments.lora.adapter_name_or_path:
            config.mask_token_id = adapter_mask_token(adapter) or getattr(config, "mask_token_id", None)
        token = resolve_mask_token(tokenizer, config, mask_token=wedlm.mask_token, mask_token_id=wedlm.mask_token_id)
    seed = arguments.training.seed
    return build_objective(arguments.data, arguments.wedlm, mask_token_id=token, seed=seed, dpo=arguments.dpo)


def build_trainer(
    arguments: Arguments,
    model: Any,
    tokenizer: Any,
    train: Any,
    evaluation: Any | None,
    mask_token_id: int | None = None,
) -> SFTTrainer:
    """The trainer of ``arguments.data.task_type`` over token rows; ``mask_token_id`` as ``objective_of`` found it.

    Raises:
        ValueError: as ``SFTTrainer``.
    """
    own: dict[str, Any] = {"wedlm_args": replace(arguments.wedlm, mask_token_id=mask_token_id)}
    if arguments.data.task_type == "dpo":
        own = {
            "dpo_args": replace(arguments.dpo, reference_model_name_or_path=None),
            "ref_model": _reference(arguments),
        }
    return TRAINERS[arguments.data.task_type](
        model,
        arguments.training,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        data_args=arguments.data,
        attention_backend=arguments.model.attention_backend,
        router_aux_loss_coef=arguments.model.router_aux_loss_coef,
        activation_checkpointing_policy=arguments.model.activation_checkpointing_policy,
        freeze=arguments.model.freeze,
        thaw_at_step=arguments.model.thaw_at_step,
        evaluation_args=arguments.evaluation,
        ema_args=arguments.ema,
        monitoring_args=arguments.monitoring,
        **own,
    )


def _reference(arguments: Arguments) -> ModelArguments | None:
    """The second model that preferences are measured against, if one is asked for: another, or the policy's own base."""
    model, named = arguments.model, arguments.dpo.reference_model_name_or_path
    if named is not None:
        return ModelArguments(model_name_or_path=named, trust_remote_code=model.trust_remote_code)
    if arguments.dpo.dpo_reference != "model":
        return None
    return ModelArguments(
        model_name_or_path=model.model_name_or_path,
        model_revision=model.model_revision,
        trust_remote_code=model.trust_remote_code,
    )


def packing_of(dataset: Any) -> dict[str, Any] | None:
    """Bins, capacity and fill of a trainer's data set, for the data report; None where nothing is packed."""
    if not isinstance(dataset, Bins) or dataset.capacity is None:
        return None
    return packing_report(len(dataset), dataset.capacity, sum(dataset.lengths))
