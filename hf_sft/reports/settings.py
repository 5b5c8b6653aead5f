"""The arguments of runs: what differs from the defaults, everything, and what differs between runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from typing import Any

from hf_sft.checkpoints.record import DEFAULTS, INCIDENTAL, RESOLVED, argument_defaults
from hf_sft.pages import Details, Facts, Table, Text
from hf_sft.reports.runs import Run, flat_arguments

_VERSIONS = "versions"
_NO_ARGUMENTS = (RESOLVED, _VERSIONS, "run")  # groups
_MISSING = "\u2013"  # in place of a value that a run does not have
_DERIVED = frozenset(
    {"accelerator_config", "do_eval", "dataloader_pin_memory"}
)  # Trainer's arguments set these themselves
_SETTLED = frozenset(
    {"activation_checkpointing", "gradient_checkpointing"}
)  # and these to false, where they are not set
_MOST_LETTERS = 200  # of a value


def _defaults(run: Run) -> dict[str, Any]:
    """Name -> default of the run's arguments as its args.json says; where it does not, today's of all."""
    recorded = run.arguments.get(DEFAULTS)
    if not isinstance(recorded, Mapping):
        return argument_defaults()
    return {name: value for group, name, value in flat_arguments(run) if group not in _NO_ARGUMENTS} | dict(recorded)


def settings_blocks(run: Run) -> Iterator[Any]:
    """Of one run: values that are no defaults, then all, and the versions."""
    known = [each for each in flat_arguments(run) if each[0] not in (RESOLVED, _VERSIONS)]
    if not known:
        yield Text("The folder has no args.json: this run was not started by train.py.")
        return
    defaults = _defaults(run)
    rows = [
        [name, shown(value), shown(defaults[name]), group]
        for group, name, value in known
        if name in defaults and name not in INCIDENTAL | _DERIVED and not _same(name, value, defaults[name])
    ]
    if rows:
        yield Table(["argument", "value", "default", "group"], rows)
    if isinstance(resolved := run.arguments.get(RESOLVED), Mapping):
        yield Details("What came of them on this machine", [Facts(_facts(resolved))], open=True)
    yield Details(f"All {len(known):,} arguments", list(_all(run)), printed=False)
    if isinstance(versions := run.arguments.get(_VERSIONS), Mapping):
        yield Details("Versions", [Facts(_facts(versions))], open=True)


def _same(name: str, value: Any, default: Any) -> bool:
    """Whether both are the same, or leave the argument out, each in its way."""
    nothing: list[Any] = [None, "", "none", [], {}]
    left_out = value in nothing or (value is False and name in _SETTLED)
    return value == default or (left_out and default in nothing)


def _all(run: Run) -> Iterator[Any]:
    for group, values in run.arguments.items():
        if isinstance(values, Mapping) and group not in (RESOLVED, DEFAULTS, _VERSIONS):
            yield Table([group, "value"], [[name, shown(value)] for name, value in values.items()])


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), shown(value)) for name, value in values.items()]


def differences(runs: Sequence[Run]) -> Table | Text:
    """A row for each argument, resolved value or version in which the runs differ."""
    if not all(run.arguments for run in runs):
        without = ", ".join(run.name for run in runs if not run.arguments)
        return Text(f"What differed is not known: there is no args.json of {without}.")
    values = [{(group, name): value for group, name, value in flat_arguments(run)} for run in runs]
    keys = list(dict.fromkeys(key for each in values for key in each if key[1] not in INCIDENTAL))
    rows = [_row(key, values, runs) for key in keys]
    if not (different := [row for row in rows if row is not None]):
        return Text("The runs have the same arguments and versions.")
    return Table(["argument", *(run.name for run in runs)], different)


def _row(
    key: tuple[str, str], values: Sequence[Mapping[tuple[str, str], Any]], runs: Sequence[Run]
) -> list[str] | None:
    group, name = key
    held = [each[key] for each in values if key in each]
    if len(held) == len(runs) and all(value == held[0] for value in held):
        return None
    # A run without the group does not use it; of the others' values the defaults say nothing.
    lacking = any(group not in run.arguments for run in runs)
    defaults = [_defaults(run).get(name, MISSING) for run, each in zip(runs, values, strict=True) if key in each]
    if lacking and held == defaults:
        return None
    label = f"{name} (resolved)" if group == RESOLVED else f"version of {name}" if group == _VERSIONS else name
    return [label, *(shown(each[key]) if key in each else _MISSING for each in values)]


def shown(value: Any) -> str:
    """A value as one would write it: text as it is, everything else as JSON."""
    if value is None:
        return "not set"
    if isinstance(value, str) and value:
        text = f"{value[:12]}..." if len(value) == 64 and value.isalnum() else value  # a hash
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}... ({len(text):,} characters)"
