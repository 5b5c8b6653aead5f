"""Public benchmarks by lm-evaluation-harness, on a model that is loaded already."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def check_tasks(tasks: Sequence[str], folder: str | None = None) -> None:
    """Raise ValueError if lm-evaluation-harness is absent (with the command that installs it) or knows not all of the tasks."""
    if find_spec("lm_eval") is None:
        raise ValueError("tasks are run by lm-evaluation-harness, which is not installed: pip install lm-eval")
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"task_folder {folder!r} is no folder: name the one that holds your task files (YAML)")
    manager = _manager(folder)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        where = "" if folder is None else f", and {folder} holds none of that name"
        raise ValueError(
            f"lm-evaluation-harness knows no task {', '.join(unknown)}{where}; lm-eval ls tasks lists the names"
        )


def _manager(folder: str | None) -> Any:
    return importlib.import_module("lm_eval.tasks").TaskManager(include_path=folder)


def run_benchmarks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int,
    limit: int | None = None,
    num_fewshot: int | None = None,
    folder: str | None = None,
    chat: bool = False,
) -> Iterator[dict[str, float]]:
    """The metrics of one benchmark after the other, under ``task/metric`` or ``task/metric (filter)``, with standard errors.

    Args:
        model: a model or a PEFT model; one trained as WeDLM is decoded token by token.
        tasks: names or patterns, checked by :func:`check_tasks`.
        limit: the first N records of each task; the figures are then no benchmark's.
        folder: with task files of one's own (YAML).
        chat: put the records into the tokenizer's chat template.

    Raises:
        ValueError: data that the harness cannot load.
    """
    harness = importlib.import_module("lm_eval")
    language_model = importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size
    )
    manager = _manager(folder)
    for task in tasks:
        try:
            found = harness.simple_evaluate(
                model=language_model,
                tasks=[task],
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat,
                log_samples=False,
            )
        except (OSError, ConnectionError) as error:
            raise ValueError(f"lm-evaluation-harness cannot load the data of {task}: {error}") from error
        yield _flat(found["results"])


def _flat(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """``{"gsm8k": {"exact_match,strict-match": 0.5}}`` as ``{"gsm8k/exact_match (strict-match)": 0.5}``."""
    flat = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in key:
                flat[f"{task}/{metric}" + (f" ({filtered})" if filtered != "none" else "")] = float(value)
    return flat
