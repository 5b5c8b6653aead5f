"""From a file and the command line to the argument objects, with every problem reported at once.

    train.py --train_args_file run.json --learning_rate 1e-4

Words become (key, value) pairs, old keys are translated (``legacy``), values take their types (``conversion``), checks
run across them (``checks``), and HfArgumentParser fills the dataclasses. transformers is imported only when a file
could be read.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_type_hints

from hf_sft import checks, evaluation_checks
from hf_sft.arguments import (
    GROUPS,
    DataArguments,
    DPOArguments,
    EMAArguments,
    EngineArguments,
    EvaluationArguments,
    LoraArguments,
    ModelArguments,
    MonitoringArguments,
    WeDLMArguments,
)
from hf_sft.conversion import convert, show, takes
from hf_sft.engines import engine_settings
from hf_sft.imports import importing
from hf_sft.launchers import from_launcher
from hf_sft.legacy import ENVIRONMENT, LEGACY, MODE_FLAGS, take_environment, translate

if TYPE_CHECKING:
    from hf_sft.training_arguments import TrainingArguments

FILE_OPTIONS = ("train_args_file", "config")
HINT_OVERRIDES = {  # what users write and the annotations of transformers do not say
    "fsdp": bool | str | None,
    "resume_from_checkpoint": bool | str | None,
}


class ArgumentsError(ValueError):
    """Everything that is wrong with a configuration; the text is a list with one line per problem."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = "the arguments have a problem:" if count == 1 else f"the arguments have {count} problems:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


@dataclass
class Arguments:
    """What ``parse_args`` returns.

    ``given`` holds the (new) names of the keys that the user wrote, ``notes`` the lines to log: translations, ``environment``
    the variables that the process is to have, secrets among them.
    """

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    wedlm: WeDLMArguments
    dpo: DPOArguments
    evaluation: EvaluationArguments
    ema: EMAArguments
    monitoring: MonitoringArguments
    engine: EngineArguments
    training: TrainingArguments
    given: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict, repr=False)


# --- files ------------------------------------------------------------------------------------------------------------


def read_config(path: str | Path) -> dict[str, Any]:
    """The keys and values of a JSON or YAML file (by its ending; anything but .yaml and .yml is JSON).

    Raises:
        ArgumentsError: no such file, empty, not UTF-8, not valid, a key twice, or not one object.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ArgumentsError([f"there is no file {path}: check the path"]) from None
    except IsADirectoryError:
        raise ArgumentsError([f"{path} is a folder: name a JSON or YAML file"]) from None
    except OSError as error:
        raise ArgumentsError([f"{path} cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ArgumentsError([f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8"]) from None
    if path.suffix in (".sh", ".bash"):
        raise ArgumentsError([f"{path}: this is a shell script: hf-sft migrate turns it into a run file"])
    if not text.strip():
        raise ArgumentsError([f"{path} is empty: write an object of arguments, such as {{}}"])
    twice: list[str] = []
    values = _read_yaml(path, text, twice) if path.suffix in (".yaml", ".yml") else _read_json(path, text, twice)
    if twice:
        raise ArgumentsError([f"{path} has the key {key} twice: keep one of them" for key in twice])
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ArgumentsError([f"{path} holds no object: write one mapping of argument names to values"])
    return values


def _read_json(path: Path, text: str, twice: list[str]) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        twice.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(items)

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ArgumentsError(
            [f"{path}, line {error.lineno}, column {error.colno}: no valid JSON ({error.msg})"]
        ) from None


def _read_yaml(path: Path, text: str, twice: list[str]) -> Any:
    """YAML 1.2's numbers and booleans: 1e-5 is a number; ``no`` is text, which ``eval_strategy: no`` means."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            twice.extend(sorted({str(key) for key in keys if keys.count(key) > 1}))
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag.rsplit(":", 1)[1] not in ("bool", "float")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    number = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$")
    truth = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", truth, list("tTfF"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # not the error's text, which quotes the line: it may hold a secret
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ArgumentsError(
            [f"{path}{where}: no valid YAML ({getattr(error, 'problem', None) or 'unreadable'})"]
        ) from None


# --- the command line -------------------------------------------------------------------------------------------------


def split_words(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Command line words as key -> words after it, and the words before any key (or after ``--key=value``)."""
    options: dict[str, list[str]] = {}
    loose: list[str] = []
    target = loose
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            options[key] = [value] if equals else []
            target = loose if equals else options[key]
        else:
            target.append(word)
    return options, loose


def _take_file(options: dict[str, list[str]], loose: list[str]) -> str | None:
    """The configuration file among the words, taken out of them."""
    found = [word for name in FILE_OPTIONS if name in options for word in options.pop(name) or [""]]
    loose += options.pop("local_rank", [])[1:]  # launchers pass it; the environment says it too
    found += loose
    if "" in found:
        raise ArgumentsError(["--train_args_file needs the name of a JSON or YAML file"])
    if len(found) > 1:
        raise ArgumentsError([f"one configuration file is read, and these were given: {', '.join(found)}"])
    return found[0] if found else None


def _command_line_values(
    options: Mapping[str, list[str]], hints: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    """key -> one word, a list of words, or True for a bare flag; ``--no_packing`` is packing false."""
    values: dict[str, Any] = {}
    for key, words in options.items():
        positive = key.removeprefix("no_")
        if key not in hints and key not in LEGACY and positive != key and takes(hints.get(positive), bool):
            if words:
                problems.append(f"--{key} takes no value, and {' '.join(words)} follows it")
            values[positive] = False
        elif not words:
            values[key] = True
            if key in hints and not takes(hints[key], bool):
                problems.append(f"--{key} needs a value after it")
                del values[key]
        elif len(words) > 1 and key in hints and not takes(hints[key], list):
            problems.append(f"--{key} takes one value, and {len(words)} follow it: {' '.join(words)}")
        else:
            values[key] = words[0] if len(words) == 1 else words
    return values


# --- from values to objects -------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    """Read the configuration file and the command line (default: ``sys.argv[1:]``).

    ``--help`` prints the arguments and leaves with SystemExit(0); ``--help all`` adds Hugging Face's.

    Raises:
        ArgumentsError: with every problem found.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    from hf_sft.help import print_requested_help

    if print_requested_help(argv):
        raise SystemExit(0)
    problems: list[str] = []
    from_file, from_line = read_words(argv, problems)
    values, notes = _merge(from_file, from_line, problems)
    return build_arguments(values, *field_hints(), notes, problems)


def read_words(argv: Sequence[str], problems: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the configuration file and the command line say, each under the names that they use.

    Raises:
        ArgumentsError: several files, or one that cannot be read.
    """
    options, loose = split_words(argv)
    file = _take_file(options, loose)
    from_file = read_config(file) if file is not None else {}
    return from_file, _command_line_values(options, field_hints()[0], problems)


def parse_values(values: Mapping[str, Any]) -> Arguments:
    """``parse_args`` for a mapping, such as a notebook's; the same translation, types and checks."""
    problems: list[str] = []
    merged, notes = _merge(values, {}, problems)
    return build_arguments(merged, *field_hints(), notes, problems)


def _merge(
    from_file: Mapping[str, Any], from_line: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Today's values, and a line for each old key; the command line wins."""
    values, notes, found = translate(from_file, from_line)
    problems += found
    values.pop("local_rank", None)  # the environment's LOCAL_RANK is what counts
    return values, notes


def build_arguments(
    values: dict[str, Any],
    hints: Mapping[str, Any],
    limits: Mapping[str, Sequence[Any]],
    notes: list[str],
    problems: list[str],
) -> Arguments:
    """Typed values, cross checks, objects; raises one ArgumentsError if any step had something to say."""
    from hf_sft.training_arguments import TrainingArguments, refusals

    environment = take_environment(values, problems)
    typed, failed = typed_values(values, hints, limits)
    launched, launch_notes, launch_problems = from_launcher(typed)
    typed |= launched
    notes += launch_notes
    problems += launch_problems
    packing = typed.get("packing") is not False  # unset: packed if the model allows it
    refused = refusals({**typed, **{key: values[key] for key in failed}}, packing)
    problems += [refused.get(key, sentence) for key, sentence in failed.items()]
    problems += [sentence for key, sentence in refused.items() if key not in failed]
    names = [entry.name for entry in fields(Arguments)]  # the groups come first
    groups: dict[str, Any] = {
        name: _fill(cls, {e.name: typed[e.name] for e in fields(cls) if e.name in typed})
        for name, cls in zip(names, GROUPS, strict=False)
    }
    training_names = {entry.name for entry in fields(TrainingArguments)}
    wanted = {key: value for key, value in typed.items() if key in training_names and key not in refused}
    draft: Any = SimpleNamespace(**{entry.name: _default(entry) for entry in fields(TrainingArguments)} | wanted)
    given = set(typed) | set(failed)
    arguments = Arguments(**groups, training=draft, given=given, notes=notes, environment=environment)
    problems += check_arguments(arguments, given)
    try:
        wanted |= engine_settings(arguments.engine, draft, notes)
    except ValueError as error:
        problems.append(str(error))
        wanted = {key: value for key, value in wanted.items() if key not in ("deepspeed", "fsdp", "fsdp_config")}
    if draft.fp16 and draft.bf16:
        wanted.pop("fp16")  # said above; what else TrainingArguments objects to is still to be heard
    try:
        arguments.training = _fill(TrainingArguments, wanted)
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        problems.append(" ".join(str(error).split()))
    if problems:
        raise ArgumentsError(dict.fromkeys(problems))
    return arguments


def check_arguments(arguments: Arguments, given: set[str]) -> list[str]:
    """Everything that contradicts something else.

    Args:
        arguments: the typed values; ``training`` may be any object that has the fields of TrainingArguments.
        given: the keys that the user wrote, so that a default is never blamed.
    """
    model, data, lora, training = arguments.model, arguments.data, arguments.lora, arguments.training
    problems = [
        *checks.check_model(model, given),
        *checks.check_lora(lora, model.train_mode, given),
        *checks.check_data(data, training),
        *checks.check_task(data, given),
        *checks.check_wedlm(arguments.wedlm, data, model.attention_backend, given),
        *checks.check_dpo(arguments.dpo, data, given, model.train_mode),
        *checks.check_engine(arguments.engine, training, given),
        *checks.check_training(training, data, given),
        *checks.checkpointing_problems(model.activation_checkpointing_policy, training),
        *evaluation_checks.check_metric(training, data, arguments.evaluation),
        *evaluation_checks.check_evaluation(
            arguments.evaluation, data, training, given, evaluated=checks.has_evaluation(data)
        ),
        *evaluation_checks.check_ema(arguments.ema, _sharding(arguments), given),
        *evaluation_checks.check_monitoring(arguments.monitoring),
        *checks.check_report_to(training),
        *checks.check_scheduler(training),
    ]
    for name, value in (
        ("config_overrides", model.config_overrides),
        ("chat_template_kwargs", data.chat_template_kwargs),
    ):
        if isinstance(value, str):
            problems.append(f'{name} is {value!r}: it must be an object, such as {{"key": "value"}}')
    return problems


def _sharding(arguments: Arguments) -> str | None:
    """The engine that keeps weights or optimizer states in parts, in words."""
    if arguments.engine.zero_stage is not None or arguments.training.deepspeed:
        return "DeepSpeed"
    return "FSDP" if arguments.training.fsdp else None


def field_hints() -> tuple[dict[str, Any], dict[str, Sequence[Any]]]:
    """For every field: its type, and the values it is limited to where its metadata says so."""
    with importing():
        from hf_sft.training_arguments import TrainingArguments

    hints: dict[str, Any] = {}
    limits: dict[str, Sequence[Any]] = {}
    for cls in (*GROUPS, TrainingArguments):
        known = get_type_hints(cls)  # not field.type: HfArgumentParser rewrites that
        for entry in fields(cls):
            hints[entry.name] = known[entry.name]
            if "choices" in entry.metadata:
                limits[entry.name] = entry.metadata["choices"]
    return hints | HINT_OVERRIDES, limits


def typed_values(
    values: Mapping[str, Any], hints: Mapping[str, Any], limits: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of the right type, and key -> sentence for those that cannot be."""
    typed: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for key, value in values.items():
        if key not in hints:
            failed[key] = f"{key} is no argument; {nearest(key, hints)}"
            continue
        try:
            typed[key] = convert(value, hints[key])
        except ValueError as wanted:
            failed[key] = f"{key} is {show(key, value)}: it must be {wanted}"
            continue
        if typed[key] is not None and typed[key] not in limits.get(key, [typed[key]]):
            del typed[key]
            failed[key] = f"{key} is {show(key, value)}: it must be one of {', '.join(map(repr, limits[key]))}"
    return typed, failed


def type_problems(
    values: Mapping[str, Any], hints: Mapping[str, Any], limits: Mapping[str, Sequence[Any]]
) -> list[str]:
    """A sentence for each value that is no argument, or has not its type."""
    return list(typed_values(values, hints, limits)[1].values())


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint at the argument that was probably meant."""
    names = {name: name for name in (*known, *ENVIRONMENT)}
    old = {name: rule.new for name, rule in LEGACY.items() if rule.new} | dict.fromkeys(MODE_FLAGS, "train_mode")
    for candidates in (names, old):
        for close in difflib.get_close_matches(key, candidates, n=1, cutoff=0.7):
            return f"did you mean {candidates[close]}?"
    inside = [name for name in names if key.lower() in name or name in key.lower()]
    return f"did you mean {inside[0]}?" if inside else "--help all lists them"


def _fill(cls: Any, values: dict[str, Any]) -> Any:
    from transformers import HfArgumentParser

    return HfArgumentParser(cls).parse_dict(values)[0]


def _default(entry: Any) -> Any:
    return entry.default if entry.default is not MISSING else entry.default_factory()
