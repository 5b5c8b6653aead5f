"""Where data come from: one path or several, each with settings of its own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from hf_sft.arguments import DataArguments
from hf_sft.conversion import convert

_FORMATS = get_args(get_type_hints(DataArguments)["data_format"])

# Fields of records that a format or the pipeline reads.
FIELDS = (
    "messages", "prompt", "completion", "generation", "question", "answer", "instruction", "input", "output", "system",
    "history", "conversations", "conversation", "chosen", "rejected", "text", "tools", "chat_template_kwargs", "input_ids",
    "labels",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One file, folder or data set of the hub.

    Args:
        path: a file, a folder, or the name of a data set on the hub.
        format: shape of its records; see ``DataArguments.data_format``.
        weight: how often an epoch sees each document; a fraction is a seeded sample.
        limit: use the first so many records.
        chat_template, system_prompt: in place of those of the run.
        columns: our name of a field -> the name that the records have for it.
        config, split, revision: of a data set on the hub.
    """

    path: str
    format: str | None = None
    weight: float = 1.0
    limit: int | None = None
    chat_template: list[str] | str | None = None
    system_prompt: str | None = None
    columns: dict | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @property
    def place(self) -> dict[str, Any]:
        """What names a part of a data set beside its path."""
        return {"config": self.config, "split": self.split, "revision": self.revision}


def read_sources(value: Any) -> list[Source]:
    """The sources that ``train_file`` or ``eval_file`` names: a path, an object, or a list of them.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range.
    """
    items = value if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise ValueError("no data file is named: the list is empty")
    found, problems = [], []
    for number, item in enumerate(items, 1):
        try:
            found.append(_source(item))
        except ValueError as error:
            problems.append(f"item {number}: {error}" if len(items) > 1 else str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return found


def _source(item: Any) -> Source:
    if not isinstance(item, Mapping):
        return Source(str(item))
    hints = get_type_hints(Source)
    known = ", ".join(hints)
    for key in item:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {known}"
            raise ValueError(f"a data source has no key {key!r}; {hint}")
    if "path" not in item:
        raise ValueError(f"a data source has no path: {dict(item)}; its keys are {known}")
    values = {}
    for key, value in item.items():
        try:
            values[key] = convert(value, hints[key])
        except ValueError as wanted:
            raise ValueError(f"{key} of the data source {item['path']} is {value!r}: it must be {wanted}") from None
    source = Source(**values)
    _check(source)
    return source


def _check(source: Source) -> None:
    where = f"of the data source {source.path} is"
    if source.format is not None and source.format not in _FORMATS:
        raise ValueError(f"format {where} {source.format!r}; choose one of {', '.join(_FORMATS)}")
    if not 0 < source.weight < float("inf"):
        raise ValueError(f"weight {where} {source.weight:g}: use a positive number, or leave the file out")
    if source.limit is not None and source.limit < 1:
        raise ValueError(f"limit {where} {source.limit}: use at least 1, or leave it out for all records")
    if source.columns and not all(isinstance(name, str) for name in source.columns.values()):
        raise ValueError(f"columns {where} {source.columns}: it maps names of fields to names in the records")
    for name in source.columns or {}:
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"ours are {', '.join(FIELDS)}"
            raise ValueError(
                f"columns of the data source {source.path} names a field {name!r} that no format has; {hint}"
            )
