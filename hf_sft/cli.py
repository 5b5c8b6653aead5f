"""``hf-sft COMMAND ...`` and the one place where errors for the user are printed."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hf_sft import __version__
from hf_sft.help import print_help, print_requested_help
from hf_sft.imports import take_process

COMMANDS = {
    "train": "Fine-tune a model: arguments, data, training, checkpoint.",
    "prepare": "Tokenise the data of a run into a folder that train takes.",
    "generate": "Answer prompts with a trained model, in parallel if it was trained as WeDLM.",
    "evaluate": "Measure models side by side on a file: loss, scores of answers, benchmarks.",
    "chat": "Talk with a trained model in the terminal; answers appear as they are written.",
    "report": "Write a page (HTML) with what was learned in a run, or in several laid over each other.",
    "inspect": "Show what the model will see: figures, findings, rows; --masks draws WeDLM's attention.",
    "merge": "Merge an adapter into its base model and write the whole model.",
    "migrate": "Write an older script's file or flags as a file of today's arguments, with comments.",
    "export": "Write a model for another engine (--format wedlm), or a ZeRO or FSDP checkpoint as a model (safetensors).",
}
_USAGE = """\
usage: hf-sft COMMAND [arguments]
       hf-sft COMMAND --help
       hf-sft --help [all]

commands:
{commands}
"""


def usage() -> str:
    width = max(map(len, COMMANDS))
    return _USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()))


def run_command(function: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Call ``function(argv)`` and return the exit code of the process.

    A ValueError is written for the user: its text goes to stderr, without a traceback, and the code is 2.
    HF_SFT_TRACEBACK=1 lets it pass. Under a launcher, only the first process of a machine prints an ArgumentsError,
    which is the same in all of them.
    """
    try:
        return function(argv) or 0
    except ValueError as error:
        if os.environ.get("HF_SFT_TRACEBACK") == "1":
            raise
        if type(error).__name__ != "ArgumentsError" or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        _tell_torchrun(str(error))
        return 2


def _tell_torchrun(message: str) -> None:
    """torchrun ends with a report of its own, which shows what each process left in a file for it."""
    if (path := os.environ.get("TORCHELASTIC_ERROR_FILE")) is None:
        return
    record = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
    with suppress(OSError):
        Path(path).write_text(json.dumps({"message": record}), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """``hf-sft COMMAND ...``; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "--help=all", "help"):
        print(usage())
        if argv:
            print_help("hf-sft train", all=argv[0] == "--help=all" or argv[1:2] == ["all"])
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"hf-sft {__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.4)
        meant = f"did you mean {close[0]}?" if close else f"choose {' or '.join(COMMANDS)}"
        print(f"error: hf-sft has no command {command}; {meant}", file=sys.stderr)
        return 2
    script = Path(sys.argv[0]).name
    if command == "train" and print_requested_help(rest, script if script == "train.py" else "hf-sft train"):
        return 0
    return run_command(lambda words: importlib.import_module(f"hf_sft.commands.{command}").main(words), rest)


def script(prefix: Sequence[str] = ()) -> None:
    """``main`` as the process: its exit code, and no noise when a reader such as ``head`` has gone."""
    take_process()
    try:
        code = main([*prefix, *sys.argv[1:]])
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains on its way out
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    script()
