"""Options that several commands have."""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from hf_sft.imports import importing

DECODING_OPTIONS = ("window", "entropy_threshold", "distance_penalty", "verify")  # as generate_wedlm takes them


class CommandParser(argparse.ArgumentParser):
    """The options of a command: names are written out, with underscores or hyphens, and what is wrong is a ValueError."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}{' ' if message.endswith('?') else '; '}{self.prog} --help lists the options")

    def options(self, words: Sequence[str]) -> argparse.Namespace:
        """Read a whole command line.

        Raises:
            ValueError: it holds what is no option, or a value is missing or cannot be.
        """
        options, rest = self._parsed(words, others=False)
        for word in rest:
            what = f"option {word.partition('=')[0]}" if word.startswith("-") else f"place for {word!r}"
            self.error(f"{self.prog} has no {what}")
        return options

    def options_and_rest(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Read a command line in which arguments of ``hf-sft train`` may follow: the options, and the words of all others.

        Raises:
            ValueError: a word is no argument of train and close to an option; or as :meth:`options`.
        """
        return self._parsed(words, others=True)

    def _parsed(self, words: Sequence[str], *, others: bool) -> tuple[argparse.Namespace, list[str]]:
        end = words.index("--") if "--" in words else len(words)  # behind it there are no options
        return self.parse_known_args([*(self._named(word, others) for word in words[:end]), *words[end:]])

    def _named(self, word: str, others: bool) -> str:
        """The word, an option of ours under its name here. What was meant for one is said before what is missing then."""
        name, equals, value = word.partition("=")
        if not name.startswith("--") or " " in name:  # a value, for argparse as well
            return word
        ours = "--" + name[2:].replace("-", "_")
        if ours in self._option_string_actions:
            return ours + equals + value
        if any(action.dest == ours[2:] for action in self._get_positional_actions()):
            self.error(f"{self.prog} takes {name[2:]} as a word of its own, without {name}")
        known = [own for own in self._option_string_actions if own.startswith("--")]
        begun = [own for own in known if own.startswith(ours) and ours != "--"]
        close = begun or difflib.get_close_matches(ours, known, n=1, cutoff=0.8)
        if close and not (others and _is_of_train(ours)):
            self.error(f"{self.prog} has no option {name}: did you mean {' or '.join(close)}?")
        return word


def _is_of_train(name: str) -> bool:
    """Whether train has such an argument, today or in older files."""
    from hf_sft.legacy import ENVIRONMENT, LEGACY, MODE_FLAGS
    from hf_sft.parsing import FILE_OPTIONS, field_hints

    key = name.removeprefix("--")
    known = {*field_hints()[0], *LEGACY, *MODE_FLAGS, *ENVIRONMENT, *FILE_OPTIONS}
    return key in known or key.removeprefix("no_") in known


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


def check_decoding_options(options: argparse.Namespace) -> None:
    """Raise ValueError for options of parallel decoding where ``autoregressive`` asks for none."""
    if options.autoregressive and (named := ", ".join(decoding_options(options))):
        raise ValueError(f"{named} decodes in parallel, and autoregressive does not; leave out one of them")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that name a model to decode with."""
    parser.add_argument(
        "model", help="folder (or hub name) of a model, folder of an adapter, or output folder of a run"
    )
    parser.add_argument(
        "--checkpoint", help="of an output folder: best, last, or a number of steps; default: the result"
    )
    add_raw_weights_option(parser)
    parser.add_argument("--base", help="the adapter's base; default: what the adapter names")
    parser.add_argument("--dtype", help="type of the weights: float32, bfloat16 or float16; default: the model's own")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that the model brings along")


def load_model_of(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer of :func:`add_model_options`."""
    with importing():
        from hf_sft.models.inference import find_model

    folder = find_model(options.model, options.checkpoint)
    check_raw_weights(options, folder)
    return load_found(folder, options, options.base)


def load_found(name: str, options: argparse.Namespace, base: str | None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub name, on ``base`` if it is an adapter, otherwise as the options say."""
    with importing():
        from hf_sft.models.inference import load_for_inference

    tell_of_average(options, name)
    return load_for_inference(
        name,
        base=base,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        averaged=not options.raw_weights,
    )


def add_raw_weights_option(parser: argparse.ArgumentParser) -> None:
    """The choice between the average of the weights and the weights themselves."""
    parser.add_argument("--raw_weights", action="store_true", help="not the average of the weights, where there is one")


def check_raw_weights(options: argparse.Namespace, *folders: str) -> None:
    """Raise ValueError if ``--raw_weights`` has nothing to choose from: none of ``folders`` holds an average."""
    with importing():
        from hf_sft.models.averages import AVERAGE_FILE, has_average

    if options.raw_weights and not any(map(has_average, folders)):
        raise ValueError(
            f"raw_weights is given, and there is no average ({AVERAGE_FILE}) in {' or '.join(map(repr, folders))}: the weights "
            "there are the only ones (the result of a run with ema_decay is the average itself; its checkpoints hold both). "
            "Leave --raw_weights out, or name a checkpoint of the run"
        )


def tell_of_average(options: argparse.Namespace, folder: str) -> None:
    """Say that the average of the weights in ``folder`` is taken, where it is; the log says it at its level info."""
    with importing():
        from hf_sft.models.averages import AVERAGE_FILE, has_average

    told = logging.getLogger("hf_sft").isEnabledFor(logging.INFO)
    if not options.raw_weights and not told and has_average(folder):
        print(f"the weights are the averages in {AVERAGE_FILE}; --raw_weights takes the others", file=sys.stderr)


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """The options of answers: how long they get, how they are drawn, how they are decoded."""
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, help="longest answer, its end of turn included (256)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the most probable tokens of this share")
    parser.add_argument("--top_k", type=int, default=0, help="draw from so many of the most probable tokens")
    parser.add_argument("--seed", type=int, help="of the draws at a temperature above 0")
    parallel = parser.add_argument_group("models trained as WeDLM")
    add_decoding_options(parallel)
    parallel.add_argument("--autoregressive", action="store_true", help="decode token by token")


def check_answer_options(options: argparse.Namespace) -> None:
    """Raise ValueError for values of :func:`add_answer_options` that cannot be, before a model is loaded."""
    with importing():
        from hf_sft.generation import check_sampling

    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {options.max_new_tokens}; it must be at least 1")
    check_decoding_options(options)
    check_sampling(options.temperature, options.top_p, options.top_k, options.seed)


def answer_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those of :func:`add_answer_options` as ``answering.Answerer`` takes them."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "autoregressive")
    return {**{name: getattr(options, name) for name in names}, "parallel": decoding_options(options)}


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that write a model, or an adapter merged into its base, to a new folder."""
    parser.add_argument("--output_dir", required=True, help="new folder for the model and its tokenizer")
    parser.add_argument("--base", help="folder or hub name of an adapter's base; default: what the adapter names")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that the model brings along")


def add_dtype_option(parser: argparse.ArgumentParser, default: str) -> None:
    """The type of written weights."""
    choices = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=choices, help=f"type of the written weights; default: {default}")
