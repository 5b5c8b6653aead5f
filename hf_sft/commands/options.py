"""Options that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

DECODING_OPTIONS = ("window", "entropy_threshold", "distance_penalty", "verify")  # as generate_wedlm takes them


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that name a run's data: a file of arguments, or model and files."""
    parser.add_argument("--train_args_file", "--config", help="JSON or YAML file of a run")
    parser.add_argument("--model", help="folder or hub name of a model, or of a tokenizer alone")
    parser.add_argument("--file", nargs="+", help="training data")


def parse_data_run(options: argparse.Namespace, rest: Sequence[str], *words: str) -> Any:
    """The arguments of a run of which only the data are wanted.

    Args:
        options: those of :func:`add_run_options`.
        rest: further arguments of train.
        words: more of them, set by the command.
    """
    from hf_sft.parsing import parse_args

    words = ("--use_cpu", *words)  # the run's own settings may need a GPU, and its data do not
    if options.train_args_file is not None:
        words += ("--train_args_file", options.train_args_file)
    if options.model is not None:
        words += ("--model_name_or_path", options.model)
    if options.file is not None:
        words += ("--train_file", *options.file)
    return parse_args([*words, *rest])


def add_decoding_options(parser: Any) -> None:
    """The options of parallel decoding; None where they are not given."""
    parser.add_argument("--window", type=int, help="positions decoded together (16)")
    parser.add_argument("--entropy_threshold", type=float, help="nats below which a slot is filled (0.4)")
    parser.add_argument("--distance_penalty", type=float, help="nats per position from the first slot (0.02)")
    parser.add_argument("--verify", action="store_true", default=None, help="exactly the greedy autoregressive answer")


def decoding_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those of :func:`add_decoding_options` that were given."""
    return {name: getattr(options, name) for name in DECODING_OPTIONS if getattr(options, name) is not None}


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that write a model, or an adapter merged into its base, to a new folder."""
    parser.add_argument("--output_dir", required=True, help="new folder for the model and its tokenizer")
    parser.add_argument("--base", help="folder or hub name of an adapter's base; default: what the adapter names")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that the model brings along")


def add_dtype_option(parser: argparse.ArgumentParser, default: str) -> None:
    """The type of written weights."""
    choices = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=choices, help=f"type of the written weights; default: {default}")
