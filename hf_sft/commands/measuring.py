"""What a trained model is worth on a file: the loss as its training measured it, and answers to its prompts."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sft.arguments import DataArguments, DPOArguments, WeDLMArguments

if TYPE_CHECKING:
    from hf_sft.evaluation import Prompt
    from hf_sft.parsing import Arguments

logger = logging.getLogger("hf_sft")

_GROUPS = {"data": DataArguments, "wedlm": WeDLMArguments, "preferences": DPOArguments}  # of an args.json
# Of a run's data: which they were, and how they were read while it trained. Its template is the one saved with the tokenizer.
_NOT_TAKEN = frozenset({
    "train_file", "eval_file", "eval_split", "max_train_samples", "max_eval_samples", "lazy_preprocess", "streaming",
    "shuffle_buffer", "data_cache_dir", "rebuild_cache", "preprocessing_num_workers", "chat_template", "system_prompt",
    "mask_token", "mask_token_id", "dpo_reference", "reference_model_name_or_path",
})  # fmt: skip
_OF_WEDLM = {"objective", *(entry.name for entry in fields(WeDLMArguments))}
_UNTOLD = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")


@dataclass(frozen=True)
class Request:
    """What is measured; see the options of ``hf-sft evaluate``.

    Attributes:
        files: the data; none: benchmarks alone.
        metrics: of answers; none: all that can be computed.
        asked: whether the user named them, so that none is left out in silence.
        samples: prompts that are answered; 0: none.
        decoding: options of ``Answerer``.
        words: further arguments of train, which win over those of the run.
    """

    files: Sequence[str]
    metrics: Sequence[str] = ()
    samples: int = 200
    max_new_tokens: int = 256
    batch_size: int = 8
    autoregressive: bool = False
    decoding: Mapping[str, Any] = field(default_factory=dict)
    words: Sequence[str] = ()

    @property
    def asked(self) -> bool:
        return bool(self.metrics)


@dataclass
class Column:
    """The figures of one model under one way of decoding.

    Attributes:
        decoding: ``parallel`` or ``autoregressive`` for models trained as WeDLM, else None.
        rows: a record for each answer.
    """

    model: str
    path: str
    decoding: str | None
    metrics: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def recorded(path: str) -> dict[str, Any]:
    """The args.json of the run that left a model, beside it or one folder up; empty where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    from hf_sft.checkpoints import ARGUMENTS_FILE

    folder = Path(path)
    file = next((at / ARGUMENTS_FILE for at in (folder, folder.parent) if (at / ARGUMENTS_FILE).is_file()), None)
    if file is None or not folder.is_dir():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): mend it, or move it away to evaluate without it") from error


def measure(
    name: str, path: str, model: Any, tokenizer: Any, record: Mapping[str, Any], request: Request
) -> list[Column]:
    """The columns of one model, loaded for inference.

    Args:
        name, path: as the user named it, and where it lies.
        record: of the run, as :func:`recorded` gives it.

    Raises:
        ValueError: data that cannot be read, no references, no prompts, metrics that cannot be computed.
    """
    from hf_sft.evaluation import prompts_of
    from hf_sft.models.mask_token import recorded_mask_token
    from hf_sft.models.wrappers import base_model
    from hf_sft.objectives import build_objective
    from hf_sft.training_arguments import TrainingArguments

    token = recorded_mask_token(base_model(model))
    with tempfile.TemporaryDirectory(prefix="hf_sft_evaluate_") as scratch:
        arguments = _arguments(model, record, request, Path(scratch), token)
        assert isinstance(arguments.training, TrainingArguments)
        token = token if arguments.data.objective == "wedlm" else None
        objective = build_objective(
            arguments.data, arguments.wedlm, mask_token_id=token, seed=arguments.training.seed, dpo=arguments.dpo
        )
        prepared = _prepared(arguments, tokenizer, objective, request)
        values = _losses(arguments, model, tokenizer, prepared.rows, token)
    notes = _lost(prepared.report)
    if token is None and (record.get("data") or {}).get("objective") == "wedlm":
        notes.append("no mask token is named: the loss is that of next tokens alone, as perplexity is for all models")
    rows = prepared.rows.with_format(None)
    prompts = prompts_of(rows, tokenizer, request.samples) if request.samples else []
    if request.samples and not prompts:
        notes.append(_no_prompts(arguments, request))
    if not prompts:
        return [Column(name, path, None, values, notes=notes)]
    return _answered((name, path), model, tokenizer, (values, notes), prompts, request)


# ---- the run's arguments ----


def _arguments(model: Any, record: Mapping[str, Any], request: Request, scratch: Path, token: int | None) -> Arguments:
    """How the run read its data and measured its loss; without its record, defaults that suit the model."""
    import torch

    from hf_sft.models.loading import known_positions
    from hf_sft.models.wrappers import base_model
    from hf_sft.parsing import parse_args

    config = base_model(model).config
    values: dict[str, Any] = {"max_seq_length": min(2048, known_positions(config) or 2048)}
    if token is not None and "data" not in record:
        values["objective"] = "wedlm"
    # The base of a run that made a WeDLM model of it knows next tokens alone.
    values |= {key: held for key, held in taken(record).items() if token is not None or key not in _OF_WEDLM}
    if values.get("task_type") == "dpo":
        values |= _reference(model, record, values)
    values |= {
        "model_name_or_path": config._name_or_path or "model",
        "seed": record.get("training", {}).get("seed", 42),
    }
    values |= {"train_file": list(request.files), "eval_file": list(request.files), "output_dir": str(scratch / "out")}
    values |= {"per_device_eval_batch_size": request.batch_size, "disable_tqdm": True}
    if not torch.cuda.is_available():
        values["use_cpu"] = True
    file = scratch / "arguments.json"
    file.write_text(json.dumps(values, default=str), encoding="utf-8")
    arguments = parse_args(["--train_args_file", str(file), *request.words])
    if token is None and arguments.data.objective == "wedlm":
        raise ValueError(
            f"objective is wedlm, and {config._name_or_path} names no mask token: it was not trained as WeDLM"
        )
    return arguments


def taken(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's arguments says how rows are made and scored; only what is not the default."""
    found = {}
    for group, cls in _GROUPS.items():
        held = record.get(group) or {}
        for entry in fields(cls):
            plain = entry.default_factory() if callable(entry.default_factory) else entry.default  # type: ignore[misc]
            if entry.name in held and entry.name not in _NOT_TAKEN and held[entry.name] != plain:
                found[entry.name] = held[entry.name]
    return found


def _reference(model: Any, record: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What preferences are measured against: the base of an adapter, else the model that the training began from."""
    from peft import PeftModel

    from hf_sft.models.wrappers import base_model
    from hf_sft.preference_losses import REFERENCE_FREE
    from hf_sft.training.reference import adapter_off_problem

    if values.get("dpo_loss_type") in REFERENCE_FREE:
        return {}
    if isinstance(model, PeftModel):
        if adapter_off_problem(model) is None:
            return {"train_mode": "lora", "dpo_reference": "adapter_off"}
        return {"reference_model_name_or_path": base_model(model).config._name_or_path}
    named = (record.get("preferences") or {}).get("reference_model_name_or_path")
    started = (record.get("model") or {}).get("model_name_or_path")
    if not (named or started):
        raise ValueError(
            "task_type is dpo, and no args.json says what the training began from, which rewards are measured against: give it "
            "with --reference_model_name_or_path"
        )
    return {"reference_model_name_or_path": named or started}


# ---- rows and losses ----


def _prepared(arguments: Arguments, tokenizer: Any, objective: Any, request: Request) -> Any:
    from hf_sft.data.pipeline import prepare_dataset

    rules = objective.row_rules(evaluation=True)
    try:
        return prepare_dataset(
            arguments.data.eval_file,
            tokenizer,
            data=arguments.data,
            split="eval",
            rules=rules,
            seed=arguments.training.seed,
        )
    except ValueError as error:
        if arguments.data.task_type == "sft" and _prompts_alone(request.files):
            what = ", ".join(request.metrics) or "the loss and the metrics of answers"
            raise ValueError(
                f"{', '.join(request.files)} holds prompts without answers, and {what} compare with references: give each "
                "record the answer that is expected, or write answers with hf-sft generate"
            ) from error
        raise


def _prompts_alone(files: Sequence[str]) -> bool:
    """Whether the files are read as prompts of which none has an answer."""
    from hf_sft.prompts import read_requests

    try:
        return all(request.reference is None for file in files for request in read_requests(file))
    except (ValueError, OSError):
        return False


def _lost(report: Mapping[str, Any]) -> list[str]:
    lost = {reason: count for reason, count in report.get("dropped", {}).items() if count}
    if bad := report.get("bad", {}).get("count"):
        lost["bad"] = bad
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in lost.items())
    return [f"{sum(lost.values()):,} of {report['records']:,} records are left out ({reasons})"] if lost else []


def _losses(arguments: Arguments, model: Any, tokenizer: Any, rows: Any, token: int | None) -> dict[str, float]:
    """What the training's own evaluation measures."""
    from transformers.trainer_callback import PrinterCallback

    from hf_sft.tasks import build_trainer

    trainer = build_trainer(arguments, model, tokenizer, None, rows, token)
    trainer.remove_callback(PrinterCallback)
    found = trainer.evaluate()
    named = {key.removeprefix("eval_"): value for key, value in found.items()}
    return {key: value for key, value in named.items() if key not in _UNTOLD}


def _no_prompts(arguments: Arguments, request: Request) -> str:
    """Why nothing is answered; an error where the user named metrics."""
    if arguments.data.task_type == "pretrain":
        why = "raw texts (task_type pretrain) have no prompts"
    else:
        why = f"no row has a prompt before what is learned (train_on {arguments.data.train_on})"
    if request.asked:
        raise ValueError(f"{', '.join(request.metrics)} compare answers with references, and {why}: leave metrics out")
    return f"{why}: nothing is generated"


# ---- answers ----


def _answered(
    named: tuple[str, str],
    model: Any,
    tokenizer: Any,
    measured: tuple[dict[str, float], list[str]],
    prompts: list[Prompt],
    request: Request,
) -> list[Column]:
    """A column for each way of decoding."""
    from hf_sft.answer_metrics import available
    from hf_sft.answering import Answerer
    from hf_sft.evaluation import answer_prompts, score_predictions

    names, missing = available(request.metrics, [prompt.reference for prompt in prompts])
    if missing and request.asked:
        raise ValueError("; ".join(f"metrics has {name}: {why}" for name, why in missing.items()))
    values, notes = measured
    notes = [*notes, *(why if why.startswith(name) else f"{name}: {why}" for name, why in missing.items())]
    options: dict[str, Any] = {"max_new_tokens": request.max_new_tokens, "parallel": request.decoding}
    answerers = [Answerer(model, tokenizer, autoregressive=request.autoregressive, **options)]
    is_wedlm = answerers[0].mask is not None
    if answerers[0].is_parallel:
        answerers.append(Answerer(model, tokenizer, autoregressive=True, max_new_tokens=request.max_new_tokens))
    columns = []
    for answerer in answerers:
        decoding = None if not is_wedlm else "parallel" if answerer.is_parallel else "autoregressive"
        logger.info("%s: %d prompts are answered%s", named[0], len(prompts), f" ({decoding})" if decoding else "")
        found = answer_prompts(prompts, answerer, tokenizer, batch_size=request.batch_size)
        found, scores = score_predictions(found, names)
        more = {"model": named[0], **({} if decoding is None else {"decoding": decoding})}
        records = [prediction.record(**more) for prediction in found]
        columns.append(Column(*named, decoding, {**values, "prompts": len(found), **scores}, records, notes))
    return columns
