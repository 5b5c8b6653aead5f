"""Weights & Biases: its keys are not arguments, they become environment variables, which wandb reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hf_sft.conversion import convert, has_password, show
from hf_sft.legacy.rules import Old, Several, Values, flag, is_none, unless_none

# Keys that a file may have beside the arguments. They are no part of args.json.
ENVIRONMENT = {
    "wandb_project": "WANDB_PROJECT",
    "wandb_entity": "WANDB_ENTITY",
    "wandb_group": "WANDB_RUN_GROUP",
    "wandb_base_url": "WANDB_BASE_URL",
    "wandb_api_key": "WANDB_API_KEY",
}
_KEY = "it stays out of every file and log; better, run wandb login or set the environment variable WANDB_API_KEY"


def _use(value: Any, values: Values) -> Any:
    said = str(values.get("report_to", "none"))
    return Several({"report_to": ["wandb"]} if flag(value) and not ("wandb" in said or said == "all") else {})


TRACKING: dict[str, Old] = {
    "use_wandb": Old("report_to", seeing=_use, note="report_to says it"),
    **dict.fromkeys(("wandb_team", "wandb_username"), Old("wandb_entity", unless_none)),
    "wandb_run_group": Old("wandb_group", unless_none),
    "wandb_host": Old("wandb_base_url", unless_none),
    "wandb_key": Old("wandb_api_key", unless_none, _KEY),
    **dict.fromkeys(("wandb_name", "wandb_run_name"), Old("run_name", unless_none)),
}


def take_environment(values: dict[str, Any], problems: list[str]) -> dict[str, str]:
    """The environment variables that the keys of wandb ask for, taken out of ``values``."""
    found = {}
    for key, variable in ENVIRONMENT.items():
        value = values.pop(key, None)
        if is_none(value):
            continue
        if has_password(value):
            problems.append(
                f"{key} is {show(key, value)}: set {variable} in the environment, so that no file holds a password"
            )
            continue
        try:
            found[variable] = convert(value, str)
        except ValueError as wanted:
            problems.append(f"{key} is {show(key, value)}: it must be {wanted}")
    return found


def enter_environment(environment: Mapping[str, str], report_to: Any) -> None:
    """Set the variables for this process, if it reports to wandb. What the run says wins over what the shell says."""
    asked = report_to if isinstance(report_to, (list, tuple)) else [report_to]
    if {"wandb", "all"} & set(asked):
        os.environ.update(environment)
