"""``hf-sft evaluate``: what trained models are worth on a file and on benchmarks, side by side."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sft.commands.benchmarks import check_tasks, run_benchmarks
from hf_sft.commands.options import (
    CommandParser,
    add_decoding_options,
    add_model_options,
    check_decoding_options,
    check_raw_weights,
    decoding_options,
    load_found,
)
from hf_sft.evaluation_checks import ANSWER_METRICS
from hf_sft.imports import importing

if TYPE_CHECKING:
    from hf_sft.commands.measuring import Column, Material, Request, Subject

logger = logging.getLogger("hf_sft")

BASE = "base"  # of --compare: the model that the training began from
_DETAILS = "masked_loss_at_", "masked_accuracy_at_"  # a line for each masking ratio, for the file alone


def main(argv: Sequence[str]) -> int:
    """Evaluate as ``argv`` says; returns 0. Raises ValueError for everything that a user can put right."""
    options, rest = _parser().options_and_rest(argv)
    _check(options, rest)
    from hf_sft.commands.measuring import materials
    from hf_sft.commands.train import log_to_terminal

    log_to_terminal()
    subjects = _subjects(options)
    columns: list[Column] = []
    with tempfile.TemporaryDirectory(prefix="hf_sft_evaluate_") as scratch:
        request = _request(options, rest)
        found = materials(subjects, request, Path(scratch)) if options.file else [None] * len(subjects)
        for number, (subject, material) in enumerate(zip(subjects, found, strict=True)):
            try:
                # A model that is compared may answer token by token alone.
                asked = request if number == 0 or subject.token is not None else replace(request, decoding={})
                _measure(subject, material, options, asked, columns)
            except (Exception, KeyboardInterrupt) as error:
                columns = [column for column in columns if column.metrics]
                if columns:
                    logger.error("%s is not measured to its end: what was measured before follows", subject.name)
                    told = {"model": subject.name, "error": f"{type(error).__name__}: {error}"}
                    _report(columns, options, rest, told)
                raise
            _free()
    _warn_of_different_tokens(columns)
    _report(columns, options, rest)
    return 0


# ---- options ----


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="hf-sft evaluate",
        description="Measure a model, an adapter or the output folder of a run on a file: loss, and answers to its prompts.",
        epilog="How the data are read is taken from the run's args.json. Every argument of hf-sft train may follow and wins, "
        "such as --max_seq_length or --task_type.",
    )
    add_model_options(parser)
    parser.add_argument("--file", nargs="+", help="the data, in any format that train reads; with the answers expected")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="MODEL",
        help="measure other models as well, side by side; base: the one that the training began from",
    )  # fmt: skip
    parser.add_argument("--output", help="new file for all figures (.json)")
    parser.add_argument("--rows", help="new file for the answers, each with its scores (.jsonl)")
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--metrics", nargs="+", default=[], help=f"of {', '.join(ANSWER_METRICS)}; default: all that are there"
    )
    answers.add_argument(
        "--samples", type=int, default=200, metavar="N", help="answer the first N prompts; default: 200"
    )
    answers.add_argument("--max_new_tokens", type=int, default=256)
    answers.add_argument("--batch_size", type=int, default=8, help="prompts, or bins of rows, at a time; default: 8")
    answers.add_argument("--no_generation", action="store_true", help="measure the loss alone")
    parallel = parser.add_argument_group("models trained as WeDLM, which answer in parallel and token by token")
    add_decoding_options(parallel)
    parallel.add_argument("--autoregressive", action="store_true", help="token by token alone")
    harness = parser.add_argument_group("benchmarks, by lm-evaluation-harness (lm-eval)")
    harness.add_argument("--tasks", help="names, separated by commas, such as gsm8k,hellaswag")
    harness.add_argument("--task_folder", help="folder with task files of your own")
    harness.add_argument("--num_fewshot", type=int, help="examples in front of each question; default: the task's own")
    harness.add_argument("--limit", type=int, metavar="N", help="the first N records of each task, to try it out")
    harness.add_argument("--apply_chat_template", action="store_true", help="ask in the model's chat template")
    return parser


def _check(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """What can be seen to be wrong before anything is loaded."""
    from hf_sft.answer_metrics import available

    if not options.file and not options.tasks:
        raise ValueError("name the data with --file, or benchmarks with --tasks")
    if rest and not rest[0].startswith("-"):
        raise ValueError(f"hf-sft evaluate takes one model, and {rest[0]!r} is one more: compare them with --compare")
    _check_words(rest)
    for name in ("samples", "max_new_tokens", "batch_size", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(
                f"--{name} is {value}: use at least 1" + (", or --no_generation" if name == "samples" else "")
            )
    for name, suffix in (("output", ".json"), ("rows", ".jsonl")):
        if (path := getattr(options, name)) is not None:
            _check_new(name, path, suffix)
    if options.no_generation and (options.metrics or options.rows):
        given = "--metrics" if options.metrics else "--rows"
        raise ValueError(f"--no_generation makes no answers, and {given} needs them: leave out one of them")
    check_decoding_options(options)
    if missing := available(options.metrics)[1] if options.metrics else {}:
        raise ValueError(f"metrics: {'; '.join(missing.values())}")
    for name in ("task_folder", "num_fewshot", "limit", "apply_chat_template"):
        if getattr(options, name) and not options.tasks:
            raise ValueError(f"--{name} belongs to benchmarks: name them with --tasks, or leave it out")
    for file in options.file or ():
        if Path(file).is_file() and not Path(file).stat().st_size:
            raise ValueError(f"{file} is empty: write one record per line")
    if options.tasks:
        check_tasks(options.tasks.split(","), options.task_folder)


def _check_words(rest: Sequence[str]) -> None:
    """Refuse arguments of train that would be without effect here, or beside options of this command."""
    from hf_sft.arguments import EMAArguments, EvaluationArguments, MonitoringArguments
    from hf_sft.parsing import split_words

    of_training = {
        entry.name for cls in (EvaluationArguments, EMAArguments, MonitoringArguments) for entry in fields(cls)
    }
    for key in split_words(rest)[0]:
        if key in ("train_file", "eval_file", "output_dir"):
            raise ValueError(
                f"--{key} belongs to hf-sft train: name the data with --file, and a file for the figures with --output"
            )
        if key.startswith(("generation_", "max_generation_")) and key in of_training:
            raise ValueError(
                f"--{key} is of the answers while a model trains; here they are asked for with --samples, --metrics, "
                "--max_new_tokens and --batch_size, and left out with --no_generation"
            )
        if key in of_training or key.removeprefix("no_") in of_training:
            raise ValueError(f"--{key} belongs to hf-sft train, and nothing is trained here: leave it out")


def _check_new(name: str, path: str, suffix: str) -> None:
    if Path(path).suffix != suffix:
        raise ValueError(f"--{name} is {path!r}: the name of this file ends with {suffix}")
    if Path(path).exists():
        raise ValueError(f"--{name} {path!r} exists, and nothing is overwritten: name a new file, or remove it")


# ---- models ----


def _subjects(options: argparse.Namespace) -> list[Subject]:
    """All models, before any is loaded; those compared are read as the first one's run read its data, in its template."""
    with importing():
        from hf_sft.commands.measuring import look_at, recorded
        from hf_sft.models.inference import find_model

    first = find_model(options.model, options.checkpoint)
    record = recorded(first)
    name = options.model if options.checkpoint is None else f"{options.model} ({options.checkpoint})"
    named: list[tuple[str, str, Mapping[str, Any], str | None]] = [(name, first, record, options.base)]
    for other in options.compare:
        if other == BASE:
            named.append((BASE, find_model(_base_of(first, record, options.base), None), record, None))
        else:
            path = find_model(other, None)
            named.append((other, path, record or recorded(path), None))
    check_raw_weights(options, *(path for _, path, *_ in named))
    subjects = [look_at(*each, trust_remote_code=options.trust_remote_code) for each in named]
    template = subjects[0].tokenizer.chat_template
    if template is not None:
        for subject in subjects:
            subject.tokenizer.chat_template = template  # all models are asked in the same words
    return subjects


def _base_of(path: str, record: Mapping[str, Any], given: str | None) -> str:
    """The model that a training began from."""
    from hf_sft.models.adapters import read_adapter_config

    named = given
    if named is None and Path(path, "adapter_config.json").is_file():
        named = read_adapter_config(path).base_model_name_or_path
    named = named or (record.get("model") or {}).get("model_name_or_path")
    if not named:
        raise ValueError(
            f"--compare base: neither an adapter nor an args.json in {path} names the model that the training began from; give "
            "its folder to --compare"
        )
    return str(named)


def _free() -> None:
    """Make room for the next model: a trainer and its model hold each other."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _request(options: argparse.Namespace, words: Sequence[str]) -> Request:
    from hf_sft.commands.measuring import Request

    return Request(
        files=options.file or (),
        metrics=options.metrics,
        samples=0 if options.no_generation else options.samples,
        decoding=decoding_options(options),
        words=words,
        **{key: getattr(options, key) for key in ("max_new_tokens", "batch_size", "autoregressive")},
    )


def _measure(
    subject: Subject, material: Material | None, options: argparse.Namespace, request: Request, columns: list[Column]
) -> None:
    """Add everything that is measured of one model to ``columns``, as soon as it is known."""
    from hf_sft.commands.measuring import Column, measure

    model, _ = load_found(subject.path, options, subject.base)
    if material is None:
        found = [Column(subject.name, subject.path, None, {})]
    else:
        found = measure(subject, material, model, request)
    for column in found:
        column.dtype = str(model.dtype).removeprefix("torch.")
    if material is not None:
        found[0].notes += _other_precision(subject.path, found[0].dtype, material.arguments.training)
    columns += found
    if options.tasks:
        scores = run_benchmarks(
            model,
            subject.tokenizer,
            options.tasks.split(","),
            batch_size=options.batch_size,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            folder=options.task_folder,
            chat=options.apply_chat_template,
        )
        for of_task in scores:
            found[-1].metrics.update(of_task)  # the harness decodes token by token


def _other_precision(path: str, dtype: str | None, training: Any) -> Iterator[str]:
    """A note where the run that left a model multiplied in another type than its losses are measured in."""
    from hf_sft.commands.measuring import recorded

    run = recorded(path).get("training", {})
    for key, trained in (("bf16", "bfloat16"), ("fp16", "float16")):
        if run.get(key) and dtype != trained and not (training.bf16 or training.fp16):
            yield f"losses are computed in {dtype}, and training multiplied in {trained}: --{key} computes them so"


def _warn_of_different_tokens(columns: Sequence[Column]) -> None:
    same_records = len({column.records for column in columns}) == 1  # else a note says that losses are of other records
    if same_records and len({column.metrics.get("supervised_tokens") for column in columns}) > 1:
        logger.warning(
            "the models cut the answers into different numbers of tokens: compare no values per token (loss, perplexity)"
        )


# ---- results ----


def _report(
    columns: Sequence[Column],
    options: argparse.Namespace,
    words: Sequence[str],
    failed: Mapping[str, str] | None = None,
) -> None:
    _print(columns)
    _write(columns, options, words, failed)


def _print(columns: Sequence[Column]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("metric")
    for column, name in zip(columns, _short([column.model for column in columns]), strict=True):
        title = Text(f"{name}\n{column.decoding}" if column.decoding else name)
        table.add_column(title, justify="right", overflow="fold")
    names = dict.fromkeys(name for column in columns for name in column.metrics if not name.startswith(_DETAILS))
    for name in names:
        table.add_row(Text(name), *(_told(column.metrics.get(name)) for column in columns))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack the table's lines
    console = Console(file=sys.stdout)
    console.print(table)
    for note in dict.fromkeys(note for column in columns for note in column.notes):
        of = dict.fromkeys(column.model for column in columns if note in column.notes)
        everywhere = len(of) == len({column.model for column in columns})
        console.print(Text(note if everywhere else f"{', '.join(of)}: {note}"), soft_wrap=True)


def _short(names: Sequence[str]) -> list[str]:
    """The ends of paths, where they are enough to tell the models apart."""
    short = {}
    for name in names:
        parts = Path(name).parts
        is_checkpoint = parts[-1].startswith(("checkpoint-", "best", "last"))
        short[name] = "/".join(parts[-2 if is_checkpoint else -1 :])
    return [short[name] if len(set(short.values())) == len(short) else name for name in names]


def _told(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.3e}"


def _write(
    columns: Sequence[Column], options: argparse.Namespace, words: Sequence[str], failed: Mapping[str, str] | None
) -> None:
    """The files that are asked for; ``failed``: the model at which the measuring ended, and why."""
    from hf_sft.checkpoints import versions
    from hf_sft.data.cache import write_file

    if options.rows is not None:
        _check_new("rows", options.rows, ".jsonl")
        lines = (json.dumps(row, ensure_ascii=False) for column in columns for row in column.rows)
        print(f"Rows: {write_file(options.rows, ''.join(line + chr(10) for line in lines))}")
    if options.output is not None:
        _check_new("output", options.output, ".json")
        result = {
            "file": options.file,
            "options": {key: value for key, value in vars(options).items() if key not in ("file", "output", "rows")},
            "arguments": list(words),
            "results": [
                {entry.name: getattr(column, entry.name) for entry in fields(column) if entry.name != "rows"}
                for column in columns
            ],
            **({} if failed is None else {"failed": dict(failed)}),
            "versions": {**versions(), **_scorers()},
        }
        text = json.dumps(_finite(result), indent=1, ensure_ascii=False, default=str)
        print(f"JSON: {write_file(options.output, text + chr(10))}")


def _scorers() -> dict[str, str]:
    """The installed packages that scores depend on."""
    from importlib import metadata

    found = {}
    for name in ("sacrebleu", "rouge-score", "nltk", "rapidfuzz", "lm-eval"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _finite(value: Any) -> Any:
    """With "inf" and "NaN" as texts, which any reader of JSON takes."""
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_finite(held) for held in value]
    return str(value).replace("nan", "NaN") if isinstance(value, float) and not math.isfinite(value) else value
