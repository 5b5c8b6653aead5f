"""What a trained model is worth on a file: the loss as its training measured it, and answers to its prompts."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
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
        dtype: of the weights.
        data: how the data were read; what is not said is the default.
        records: how many the losses are of.
        rows: a record for each answer.
    """

    model: str
    path: str
    decoding: str | None
    metrics: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dtype: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    records: int | None = None


@dataclass(frozen=True)
class Subject:
    """A model that is measured, as far as it is known before its weights are loaded.

    Attributes:
        name: as the user named it.
        path: where it lies.
        record: of the run, as :func:`recorded` gives it.
        base: of an adapter, where the user named it.
        config: of the model, or of the adapter's base.
        token: the mask token of models trained as WeDLM.
    """

    name: str
    path: str
    record: Mapping[str, Any]
    base: str | None
    config: Any
    tokenizer: Any
    is_adapter: bool
    token: int | None


@dataclass
class Material:
    """What one model is measured on: prepared rows, and those of them that are answered."""

    arguments: Arguments
    rows: Any
    sources: list[str]
    keys: list[tuple[int, int]]
    notes: list[str]
    prompts: list[Prompt] = field(default_factory=list)

    def place(self, row: int) -> dict[str, Any]:
        """Where a row comes from: its source, and the line or position of its record, from 1."""
        source, record = self.keys[row]
        return {"source": self.sources[source] if source < len(self.sources) else str(source), "record": record}


def look_at(
    name: str, path: str, record: Mapping[str, Any], base: str | None = None, *, trust_remote_code: bool = False
) -> Subject:
    """Config and tokenizer of a model that is measured later.

    Raises:
        ValueError: they are not there, or the base of an adapter is not.
    """
    from hf_sft.arguments import ModelArguments
    from hf_sft.models.inference import adapter_tokenizer, base_arguments, is_adapter
    from hf_sft.models.loading import load_config, load_tokenizer
    from hf_sft.models.mask_token import adapter_mask_token

    adapted = is_adapter(path) or (base is not None and not Path(path).exists())
    if adapted:
        arguments = base_arguments(path, base, trust_remote_code=trust_remote_code)
    else:
        arguments = ModelArguments(model_name_or_path=path, trust_remote_code=trust_remote_code)
    config = load_config(str(arguments.model_name_or_path), arguments)
    tokenizer = adapter_tokenizer(path, arguments) if adapted else load_tokenizer(arguments)
    places = (adapter_mask_token(path) if adapted else None), getattr(config, "mask_token_id", None)
    token = next((int(place) for place in places if place is not None), None)
    return Subject(name, path, record, base, config, tokenizer, adapted, token)


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


def materials(subjects: Sequence[Subject], request: Request, scratch: Path) -> list[Material]:
    """What each model is measured on: rows of its own for the losses, the same records for the answers of all.

    Raises:
        ValueError: data that cannot be read, no references, no prompts where metrics are asked for.
    """
    found = [_material(subject, request, scratch / str(number)) for number, subject in enumerate(subjects)]
    if different := _different_records(subjects, found, request):
        for each in found:
            each.notes.append(different)
    if request.samples:
        _choose_prompts(subjects, found, request)
    return found


def _material(subject: Subject, request: Request, scratch: Path) -> Material:
    from hf_sft.objectives import build_objective

    arguments = _arguments(subject, request, scratch)
    is_wedlm, seed = arguments.data.objective == "wedlm", arguments.training.seed
    token = subject.token if is_wedlm else None
    objective = build_objective(arguments.data, arguments.wedlm, mask_token_id=token, seed=seed, dpo=arguments.dpo)
    prepared = _prepared(arguments, subject.tokenizer, objective, request)
    rows = prepared.rows.with_format(None)
    notes = _lost(prepared.report)
    if token is None and (subject.record.get("data") or {}).get("objective") == "wedlm":
        notes.append("no mask token is named: the loss is that of next tokens alone, as perplexity is for all models")
    sources = [str(each["source"]) for each in prepared.report.get("sources", [])]
    keys = list(zip(rows["source"][:], rows["record"][:], strict=True))
    return Material(arguments, prepared.rows, sources, keys, notes)


def measure(subject: Subject, material: Material, model: Any, request: Request) -> list[Column]:
    """The columns of one model, loaded for inference.

    Raises:
        ValueError: metrics that cannot be computed.
    """
    arguments = material.arguments
    token = subject.token if arguments.data.objective == "wedlm" else None
    values = _losses(arguments, model, subject.tokenizer, material.rows, token)
    columns = [Column(subject.name, subject.path, None, values, notes=material.notes)]
    if material.prompts:
        columns = _answered(subject, material, model, values, request)
    told = _settings(arguments)
    return [replace(column, data=told, records=len(set(material.keys))) for column in columns]


# ---- the run's arguments ----


def _arguments(subject: Subject, request: Request, scratch: Path) -> Arguments:
    """How the run read its data and measured its loss; without its record, defaults that suit the model."""
    import torch

    from hf_sft.models.loading import known_positions
    from hf_sft.parsing import parse_args

    config, record, token = subject.config, subject.record, subject.token
    values: dict[str, Any] = {"max_seq_length": min(2048, known_positions(config) or 2048)}
    if token is not None and "data" not in record:
        values["objective"] = "wedlm"
    # The base of a run that made a WeDLM model of it knows next tokens alone.
    values |= {key: held for key, held in taken(record).items() if token is not None or key not in _OF_WEDLM}
    if values.get("task_type") == "dpo":
        values |= _reference(subject, values)
    values |= {
        "model_name_or_path": config._name_or_path or "model",
        "seed": record.get("training", {}).get("seed", 42),
    }
    values |= {"train_file": list(request.files), "eval_file": list(request.files), "output_dir": str(scratch / "out")}
    values |= {"per_device_eval_batch_size": request.batch_size, "disable_tqdm": True}
    if not torch.cuda.is_available():
        values["use_cpu"] = True
    scratch.mkdir(parents=True)
    file = scratch / "arguments.json"
    file.write_text(json.dumps(values, default=str), encoding="utf-8")
    arguments = parse_args(["--train_args_file", str(file), *request.words])
    if token is None and arguments.data.objective == "wedlm":
        raise ValueError(
            f"objective is wedlm, and {config._name_or_path} names no mask token: it was not trained as WeDLM"
        )
    return arguments


def _settings(arguments: Arguments) -> dict[str, Any]:
    """How the data were read and scored, in full where it is not the default; the lengths and the seed always."""
    groups = {"data": arguments.data, "wedlm": arguments.wedlm, "preferences": arguments.dpo}
    named = {"max_seq_length": arguments.data.max_seq_length, "seed": arguments.training.seed}
    return {**named, **taken({key: vars(group) for key, group in groups.items()})}


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


def _reference(subject: Subject, values: Mapping[str, Any]) -> dict[str, Any]:
    """What preferences are measured against: the base of an adapter, else the model that the training began from."""
    from hf_sft.models.adapters import read_adapter_config
    from hf_sft.preference_losses import REFERENCE_FREE

    if values.get("dpo_loss_type") in REFERENCE_FREE:
        return {}
    if subject.is_adapter:
        adapter: Any = read_adapter_config(subject.path)
        if getattr(adapter, "bias", "none") == "none" and not getattr(adapter, "modules_to_save", None):
            return {"train_mode": "lora", "dpo_reference": "adapter_off"}  # else more than the adapter is trained
        return {"reference_model_name_or_path": subject.config._name_or_path}
    named = (subject.record.get("preferences") or {}).get("reference_model_name_or_path")
    started = (subject.record.get("model") or {}).get("model_name_or_path")
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

    model.requires_grad_(False)  # nothing is trained, and there is nothing to warn of in how it would be
    trainer = build_trainer(arguments, model, tokenizer, None, rows, token)
    trainer.remove_callback(PrinterCallback)
    found = trainer.evaluate()
    named = {key.removeprefix("eval_"): value for key, value in found.items()}
    return {key: value for key, value in named.items() if key not in _UNTOLD}


# ---- answers ----


def _different_records(subjects: Sequence[Subject], found: Sequence[Material], request: Request) -> str | None:
    """A sentence if the models do not keep the same records; rows of joined texts hold all of them."""
    kept = [set(each.keys) for each in found]
    if all(one == kept[0] for one in kept) or any(each.arguments.data.joins_texts for each in found):
        return None
    counts = ", ".join(f"{subject.name} {len(one):,}" for subject, one in zip(subjects, kept, strict=True))
    answered = ", and the answers are to records that all keep" if request.samples else ""
    return (
        f"the models keep different records ({counts}; all of them {len(set.intersection(*kept)):,}): each loss is of the "
        f"model's own{answered}"
    )


def _choose_prompts(subjects: Sequence[Subject], found: Sequence[Material], request: Request) -> None:
    """The first ``samples`` records that are questions for every model."""
    from hf_sft.evaluation import prompt_of

    numbered = [_numbered(each.keys) for each in found]
    rows = [each.rows.with_format(None) for each in found]
    tokenizers = [subject.tokenizer for subject in subjects]
    shared = [key for key in numbered[0] if all(key in others for others in numbered[1:])]
    for key in shared:
        places = [rows_of[key] for rows_of in numbered]
        prompts = [prompt_of(at, held[at], each) for at, held, each in zip(places, rows, tokenizers, strict=True)]
        if any(prompt is None for prompt in prompts):
            continue
        for each, prompt in zip(found, prompts, strict=True):
            assert prompt is not None
            each.prompts.append(prompt)
        if len(found[0].prompts) == request.samples:
            break
    for each in found:
        if not each.prompts:
            each.notes.append(_no_prompts(each.arguments, request, is_shared=bool(shared)))
    references = zip(*([prompt.reference.strip() for prompt in each.prompts] for each in found), strict=True)
    if cut := sum(len(set(texts)) > 1 for texts in references):
        for each in found:
            each.notes.append(
                f"{cut:,} of the records answered have references that the models cut in different places"
            )


def _numbered(keys: Iterable[tuple[int, int]]) -> dict[tuple[int, int, int], int]:
    """Source, record, and which of the record's rows it is -> row."""
    seen: Counter[tuple[int, int]] = Counter()
    found = {}
    for row, key in enumerate(keys):
        found[(*key, seen[key])] = row
        seen[key] += 1
    return found


def _no_prompts(arguments: Arguments, request: Request, *, is_shared: bool) -> str:
    """Why nothing is answered; an error where the user named metrics."""
    if arguments.data.task_type == "pretrain":
        why = "raw texts (task_type pretrain) have no prompts"
    elif not is_shared:
        why = "no record is kept by all models"
    else:
        why = f"no row has a prompt before what is learned (train_on {arguments.data.train_on})"
    if request.asked:
        raise ValueError(f"{', '.join(request.metrics)} compare answers with references, and {why}: leave metrics out")
    return f"{why}: nothing is generated"


def _answered(
    subject: Subject, material: Material, model: Any, values: Mapping[str, float], request: Request
) -> list[Column]:
    """A column for each way of decoding."""
    from hf_sft.answer_metrics import available
    from hf_sft.answering import Answerer
    from hf_sft.evaluation import answer_prompts, score_predictions

    prompts, tokenizer = material.prompts, subject.tokenizer
    names, missing = available(request.metrics, [prompt.reference for prompt in prompts])
    if missing and request.asked:
        raise ValueError("; ".join(f"metrics has {name}: {why}" for name, why in missing.items()))
    notes = [*material.notes, *(why if why.startswith(name) else f"{name}: {why}" for name, why in missing.items())]
    options: dict[str, Any] = {"max_new_tokens": request.max_new_tokens, "parallel": request.decoding}
    answerers = [Answerer(model, tokenizer, autoregressive=request.autoregressive, **options)]
    is_wedlm = answerers[0].mask is not None
    if answerers[0].is_parallel:
        answerers.append(Answerer(model, tokenizer, autoregressive=True, max_new_tokens=request.max_new_tokens))
    columns = []
    for answerer in answerers:
        decoding = None if not is_wedlm else "parallel" if answerer.is_parallel else "autoregressive"
        logger.info("%s: %d prompts are answered%s", subject.name, len(prompts), f" ({decoding})" if decoding else "")
        found = answer_prompts(prompts, answerer, batch_size=request.batch_size)
        found, scores = score_predictions(found, names)
        more = {"model": subject.name, **({} if decoding is None else {"decoding": decoding})}
        records = [prediction.record(**more, **material.place(prediction.row)) for prediction in found]
        metrics = {**values, "prompts": len(found), **scores}
        columns.append(Column(subject.name, subject.path, decoding, metrics, records, list(notes)))
    return columns
