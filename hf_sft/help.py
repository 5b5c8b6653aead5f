"""The list of arguments for the terminal. Our own come without importing transformers, in a few milliseconds."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from hf_sft.arguments import GROUPS
from hf_sft.conversion import choices, members, takes
from hf_sft.imports import importing

_USAGE = """\
usage: {prog} [FILE | --train_args_file FILE] [--key value ...]

FILE is JSON or YAML: one object of the arguments below. Values on the command line win over it.
"""
_MORE = "All of Hugging Face's TrainingArguments are accepted too (learning_rate, output_dir ...): see --help all"


def requested_help(argv: Sequence[str]) -> str | None:
    """None, "own" or "all", by what the command line asks for."""
    for index, word in enumerate(argv):
        if word in ("-h", "--help"):
            return "all" if list(argv[index + 1 : index + 2]) == ["all"] else "own"
        if word.startswith("--help="):
            return "all" if word == "--help=all" else "own"
    return None


def print_requested_help(argv: Sequence[str], prog: str | None = None) -> bool:
    """Print the help if the command line asks for it, and say whether it did."""
    wanted = requested_help(argv)
    if wanted is not None:
        print_help(prog or Path(sys.argv[0]).name, all=wanted == "all")
    return wanted is not None


def print_help(prog: str, all: bool = False) -> None:
    """Print every argument with its type, default and meaning; ``all`` adds Hugging Face's."""
    width = min(shutil.get_terminal_size().columns, 120)
    print(_USAGE.format(prog=prog))
    for cls in GROUPS:
        print(f"{cls._argument_group_name}: {(cls.__doc__ or '').strip()}")
        print("\n".join(_describe(cls, width)), end="\n\n")
    if not all:
        print(_MORE)
        return
    with importing():
        from hf_sft.training_arguments import FIELD_RULES, TrainingArguments

    refused = {name: rule.why for name, rule in FIELD_RULES.items() if rule is not None}
    print("Hugging Face: every field of transformers.TrainingArguments, honoured or refused.")
    print("\n".join(_describe(TrainingArguments, width, refused)))


def _describe(cls: type, width: int, refused: dict[str, str] | None = None) -> Iterator[str]:
    hints = get_type_hints(cls)
    for entry in fields(cls):
        default = entry.default if entry.default is not MISSING else entry.default_factory()  # type: ignore[operator]
        shown = "" if default in (None, [], "") else f" (default: {_word(default)})"
        yield f"  --{entry.name} {_kind(hints[entry.name])}{shown}"
        text = " ".join(str(entry.metadata.get("help", "")).split())
        if refused and entry.name in refused:
            text = f"Other values are refused: {refused[entry.name]}."
        yield from textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _kind(hint: Any) -> str:
    allowed = choices(hint)
    if allowed:
        return "|".join(map(str, allowed)) if len(allowed) <= 12 else "NAME"
    if takes(hint, list):
        return "TEXT [TEXT ...]"
    if takes(hint, dict):
        return "JSON"
    names = {bool: "true|false", int: "N", float: "NUMBER", str: "TEXT"}
    return next((names[member] for member in members(hint) if member in names), "VALUE")


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(getattr(value, "value", value))
