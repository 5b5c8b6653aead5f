"""``hf-sft inspect``: look at what a training does. Without the name of a mode, at its data: what the model will see."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_sft.commands.options import CommandParser, add_run_options, parse_data_run

if TYPE_CHECKING:
    from hf_sft.inspection import Inspection

# Mode -> (the module of commands that has it, what it shows); each has its own --help.
MODES = {
    "masks": ("masks", "who sees whom in a WeDLM batch, or the order in which an answer is decoded"),
    "memory": ("memory", "what a training needs of a device's memory, and what to change so that it fits"),
}
_STREAMED = 10_000  # records of a stream that are looked at


def main(argv: Sequence[str]) -> int:
    """Show what ``argv`` asks for; returns 0, or 1 where ``--strict`` finds an error in the data.

    Raises ValueError for everything that a user can put right.
    """
    words = list(argv)
    chosen = [mode for mode in MODES if f"--{mode}" in words]
    if len(chosen) > 1:
        raise ValueError(f"hf-sft inspect was given {' and '.join(f'--{mode}' for mode in chosen)}: give one of them")
    if chosen:
        words.remove(f"--{chosen[0]}")
        return importlib.import_module(f"hf_sft.commands.{MODES[chosen[0]][0]}").main(words)
    if not words:
        print(_parser().format_help())
        raise ValueError("hf-sft inspect was told no data: name a run with --train_args_file, or --model and --file")
    return data(words)


def data(words: Sequence[str]) -> int:
    """Show the data of a run as its model will see them; no GPU and no weights are needed."""
    from hf_sft.commands.train import log_to_terminal

    options, rest = _parser().options_and_rest(words)
    if rest and not rest[0].startswith("-") and options.train_args_file is None:
        options.train_args_file = rest.pop(0)  # as train takes it
    _check(options, rest)
    arguments = parse_data_run(options, rest)
    log_to_terminal(arguments.training.local_process_index)
    inspection = _inspect(arguments, options)
    _print(inspection, options)
    if options.json is not None:
        _write_json(options.json, inspection)
    if options.html is not None:
        from hf_sft.data.cache import write_file
        from hf_sft.inspection.page import inspection_page

        print(f"Page: {write_file(options.html, inspection_page(inspection))}")
    return int(options.strict and any(finding.severity == "error" for finding in inspection.findings))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="hf-sft inspect",
        description="Show what the model will see: figures, findings with what to do, and rows with what is learned of them.",
        epilog="Every argument of hf-sft train may follow, such as --eval_file or --max_seq_length.",
    )
    add_run_options(parser)
    parser.add_argument("--samples", type=int, default=5, metavar="N", help="rows drawn at random; default: 5")
    parser.add_argument("--split", choices=("train", "eval"), help="show one of the two")
    parser.add_argument("--row", type=int, nargs="+", metavar="N", help="show these rows, from 0, and no others")
    parser.add_argument("--tokens", action="store_true", help="a line for each token, with its id and label")
    parser.add_argument("--full", action="store_true", help="long rows to their end")
    parser.add_argument("--html", help="write a page to this file (.html)")
    parser.add_argument("--json", help="write everything as JSON to this file (.json)")
    parser.add_argument("--overwrite", action="store_true", help="write over these files")
    parser.add_argument("--strict", action="store_true", help="end with status 1 if a finding is an error")
    modes = parser.add_argument_group("other modes, each with its own --help")
    for mode, (_, text) in MODES.items():
        modes.add_argument(f"--{mode}", action="store_true", help=text)
    return parser


def _check(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """What can be seen to be wrong before anything is loaded."""
    from hf_sft.drawing import check_new_file

    if options.train_args_file is None and (options.model is None or options.file is None) and not rest:
        raise ValueError("name a run with --train_args_file, or a model and its data with --model and --file")
    if options.samples < 0:
        raise ValueError(f"--samples is {options.samples}: it must be 0 or more")
    for name, suffixes in (("html", (".html", ".htm")), ("json", (".json",))):
        if (path := getattr(options, name)) is not None:
            check_new_file(name, path, suffixes, overwrite=options.overwrite)


def _inspect(arguments: Any, options: argparse.Namespace) -> Inspection:
    from hf_sft.inspection import inspect_data
    from hf_sft.tasks import read_data_side

    notes = _settle(arguments.data)
    asked = replace(arguments.data)
    tokenizer, objective = read_data_side(arguments)
    prepared = _prepare(arguments, tokenizer, objective)
    if options.split is not None and options.split not in prepared:
        raise ValueError(f"there are no {options.split} data: name {options.split}_file")
    split = options.split or ("train" if options.row else None)
    rows = {split: options.row} if split is not None and options.row else None
    inspection = inspect_data(
        prepared,
        tokenizer,
        capacity=asked.bin_capacity,
        samples=options.samples,
        seed=arguments.training.seed,
        packing=asked.packing is not False,
        data=asked,
        rows=rows,
        most_tokens=None if options.full else 400,
    )
    shown = inspection if split is None else inspection.only(split)
    return replace(shown, facts={**_settings(arguments), **notes, **shown.facts})


def _settle(data: Any) -> dict[str, str]:
    """Have the data prepared before they are shown; returns what that changes."""
    notes = {}
    if data.streaming and data.max_train_samples is None:
        data.max_train_samples = _STREAMED
        notes["looked at"] = f"the first {_STREAMED:,} records of the stream (max_train_samples)"
    data.streaming = data.lazy_preprocess = False
    return notes


def _prepare(arguments: Any, tokenizer: Any, objective: Any) -> Mapping[str, Any]:
    """Token rows as training makes them; where training would stop at a record, those without it."""
    from hf_sft.tasks import prepare_data

    try:
        return prepare_data(arguments, tokenizer, objective)
    except ValueError:
        data = arguments.data
        if data.bad_records != "error" and data.overlength_rule != "error":
            raise
        data.bad_records = "skip"
        if data.overlength_rule == "error":
            data.overlength = "drop"
        return prepare_data(arguments, tokenizer, objective)


def _settings(arguments: Any) -> dict[str, str]:
    model, data = arguments.model, arguments.data
    facts = {
        "model": model.tokenizer_name_or_path or model.model_name_or_path or model.config_name_or_path,
        "task_type": data.task_type,
        "objective": data.objective,
        "train_on": data.train_on if data.task_type != "pretrain" else None,
        "chat_template": str(data.chat_template) if data.chat_template and data.task_type != "pretrain" else None,
    }
    return {name: value for name, value in facts.items() if value}


def _print(inspection: Inspection, options: argparse.Namespace) -> None:
    from rich.console import Console

    from hf_sft.terminal import show

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters that data have
    show(inspection, Console(file=sys.stdout), tokens=options.tokens)


def _write_json(path: str, inspection: Inspection) -> None:
    from hf_sft.data.cache import write_file

    text = json.dumps(inspection.to_dict(), ensure_ascii=False, indent=1)
    print(f"JSON: {write_file(path, text)}")
