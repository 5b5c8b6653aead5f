"""``hf-sft migrate``: an older script's file, shell script or flags as a file of today's arguments, with comments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sft.commands.options import CommandParser
from hf_sft.conversion import convert, is_secret, show
from hf_sft.legacy.rules import Entry
from hf_sft.parsing import ArgumentsError

_USAGE = """\
hf-sft migrate OLD NEW             OLD: .json, .yaml, or a shell script (.sh) with the training command
       hf-sft migrate NEW -- FLAGS ...    the flags, or the whole command, of a training script
       hf-sft migrate --table             print what became of every old key, as docs/migrating.md"""
# What depends on the machine that trains: it is not asked of the one that migrates.
_OF_THE_MACHINE = (
    "fp16", "bf16", "tf32", "report_to", "deepspeed", "zero_stage", "offload_optimizer", "offload_param", "nvme_path", "fsdp",
    "fsdp_config", "ddp_backend",
)  # fmt: skip
_PLAIN = re.compile(r"(\.{0,2}/)?[A-Za-z_][\w./+@-]*")
_NOT_PLAIN = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")


@dataclass(frozen=True)
class Migrated:
    """What a new file holds.

    Args:
        values: today's keys, typed; secrets are left out.
        entries: what became of each old key.
        left_out: keys of ``values`` that hold a secret.
    """

    values: dict[str, Any]
    entries: list[Entry]
    left_out: list[str]


def main(argv: Sequence[str]) -> int:
    """Migrate as ``argv`` says; returns 0. Raises ValueError for everything that a user can put right."""
    own, flags = (list(argv), None) if "--" not in argv else _split(list(argv))
    parser = CommandParser(
        prog="hf-sft migrate",
        usage=_USAGE,
        description="Write older files and flags in today's names.",
    )
    parser.add_argument(
        "files", nargs="*", metavar="OLD NEW", help="the old file, and the new one (.yaml, .yml or .json)"
    )
    parser.add_argument("--table", action="store_true", help="print what became of every old key")
    options = parser.options(own)
    if options.table:
        from hf_sft.legacy.table import page

        print(page(), end="")
        return 0
    if len(options.files) != (2 if flags is None else 1):
        raise ValueError(f"the old file and the new one are wanted, or the new one and flags after --\nusage: {_USAGE}")
    old, new = (options.files[0] if flags is None else None), Path(options.files[-1])
    _check_new(new)
    migrated = migrate(*_read_old(old, flags))
    comments = list(_comments(migrated))
    if new.suffix == ".json":
        text = json.dumps(migrated.values, indent=2, ensure_ascii=False) + "\n"
        print("\n".join(f"{old or 'the command'}: {line}" for line in comments))
    else:
        text = as_yaml(migrated, Path(old).name if old else "a command line")
    from hf_sft.data.cache import write_file

    try:
        write_file(new, text)
    except OSError as error:
        raise ValueError(f"{new} cannot be written ({error.strerror}): name another file") from None
    dropped = sum(not entry.new for entry in migrated.entries)
    print(
        f"Written to {new}: {len(migrated.values)} arguments, {len(migrated.entries) - dropped} of them under new names; "
        f"{dropped} old keys have no counterpart{'' if new.suffix == '.json' else ' (the file says why)'}."
    )
    for key in migrated.left_out:
        print(f"{key} is a secret and is not written: {_way_of_secret(key)}.")
    return 0


def migrate(from_file: Mapping[str, Any], from_line: Mapping[str, Any], problems: Sequence[str] = ()) -> Migrated:
    """Today's arguments that say what an old file and an old command line said; the command line wins.

    Raises:
        ArgumentsError: with everything that is wrong.
    """
    from hf_sft.legacy import ENVIRONMENT, translate_source
    from hf_sft.parsing import build_arguments, field_hints

    translation = translate_source(from_file, from_line)
    found, values = [*problems, *translation.problems], translation.values
    values.pop("local_rank", None)  # the environment says it
    values = {key: values[key] for key in _order([*from_file, *from_line], translation.entries, values)}
    hints, limits = field_hints()
    checked = {key: value for key, value in values.items() if key not in _OF_THE_MACHINE}
    checked["use_cpu"] = True
    try:
        build_arguments(checked, hints, limits, [], found)
    except ArgumentsError as error:
        raise ArgumentsError(dict.fromkeys([*error.problems, *_untyped(values, hints, limits)])) from None
    if wrong := _untyped(values, hints, limits):
        raise ArgumentsError(wrong)
    left_out = [key for key, value in values.items() if is_secret(key) and value is not None]
    typed = {
        key: value if key in ENVIRONMENT else _short(convert(value, hints[key]))
        for key, value in values.items()
        if key not in left_out
    }
    return Migrated(typed, translation.entries, left_out)


def _order(keys: Iterable[str], entries: Sequence[Entry], values: Mapping[str, Any]) -> list[str]:
    """The new keys in the order of the old file."""
    became = {entry.key: entry.new for entry in entries}
    order = dict.fromkeys(new for key in keys for new in (became.get(key) or (key,)) if new in values)
    return list(order | dict.fromkeys(values))


def _short(value: Any) -> Any:
    """3 for 3.0, which every number's type takes."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e9 else value


def _untyped(values: Mapping[str, Any], hints: Mapping[str, Any], limits: Mapping[str, Any]) -> list[str]:
    """Problems of the values that the check of a run was not shown."""
    from hf_sft.parsing import type_problems

    return type_problems({key: values[key] for key in _OF_THE_MACHINE if key in values}, hints, limits)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our own words, and those after ``--``: flags, or a command that has them."""
    from hf_sft.legacy.shell import flags_of_command

    at = argv.index("--")
    words = argv[at + 1 :]
    return argv[:at], flags_of_command(words) or words


def _read_old(old: str | None, flags: list[str] | None) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(what a file says, what a command line says, what is wrong with its words)."""
    from hf_sft.legacy.shell import flags_of_script
    from hf_sft.parsing import read_config, read_words

    if old is not None and Path(old).suffix not in (".sh", ".bash"):
        return read_config(old), {}, []
    if old is not None:
        try:
            flags = flags_of_script(Path(old).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ValueError(f"{old} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{old} is not UTF-8 text (byte {error.start}): name the script itself") from None
        except ValueError as error:
            raise ValueError(f"{old}: {error}") from None
    problems: list[str] = []
    from_file, from_line = read_words(flags or [], problems)
    return from_file, from_line, problems


def _check_new(new: Path) -> None:
    if new.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"{new} has no ending that says its format: name a .yaml or .json file")
    if new.exists():
        raise ValueError(f"{new} exists already, and nothing is written over: name another file, or remove it")


# ---- what is written ----


def as_yaml(migrated: Migrated, source: str) -> str:
    """The new file: each key below what it was called, and what is gone at the end, with the reason."""
    lines = [f"# Arguments of hf-sft train, from {source}."]
    told: list[Entry] = []
    for key, value in migrated.values.items():
        origins = [entry for entry in migrated.entries if key in entry.new and entry not in told]
        told += origins
        lines += [f"# {_was(entry)}" for entry in origins]
        lines.append(f"{key}: {_yaml(value)}")
    if gone := [entry for entry in migrated.entries if not entry.new]:
        lines += ["", "# No longer used:"]
        lines += [f"#   {_said(entry)}{f'  ({entry.remark})' if entry.remark else ''}" for entry in gone]
    if migrated.left_out:
        lines += ["", "# Secrets are not written:", *(f"#   {key}: {_way_of_secret(key)}" for key in migrated.left_out)]
    return "\n".join(lines) + "\n"


def _comments(migrated: Migrated) -> Iterator[str]:
    """What a file without comments cannot say."""
    for entry in migrated.entries:
        yield entry.line


def _said(entry: Entry) -> str:
    return f"{entry.key}: {show(entry.key, entry.value)}"


def _was(entry: Entry) -> str:
    if entry.value is None and entry.key in entry.new:
        return f"{entry.key}: {entry.remark}"
    return f"was {_said(entry)}{f' ({entry.remark})' if entry.remark else ''}"


def _way_of_secret(key: str) -> str:
    if key.startswith("wandb"):
        return "run wandb login, or set the environment variable WANDB_API_KEY"
    return "run hf auth login, or set the environment variable HF_TOKEN"


def _yaml(value: Any) -> str:
    """A value on one line; JSON is YAML, and a plain word needs no quotes."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NOT_PLAIN:
        return value
    return json.dumps(value, ensure_ascii=False)
