"""Old keys and values, brought up to date by the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_sft.conversion import is_secret, show
from hf_sft.legacy.hugging_face import HUGGING_FACE
from hf_sft.legacy.lr0 import LR0
from hf_sft.legacy.preferences import PREFERENCES
from hf_sft.legacy.rules import DROP, Entry, Gone, Old, Several, flag
from hf_sft.legacy.scripts import MODE_FLAGS, SCRIPTS, quantised
from hf_sft.legacy.tracking import TRACKING
from hf_sft.legacy.wedlm import WEDLM, objective

LEGACY: dict[str, Old] = {**HUGGING_FACE, **SCRIPTS, **WEDLM, **PREFERENCES, **TRACKING, **LR0}

# Values that were renamed under a key that stayed, or ask for nothing there.
LEGACY_VALUES: dict[str, dict[str, Any]] = {
    "optim": {"adamw_hf": "adamw_torch"},
    "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"},
    "eval_file": {"": DROP},
    "task_type": {"": DROP, "pt": "pretrain"},
    "deepspeed": {"": DROP},
    "resume_from_checkpoint": {"": DROP},
}

# Lists that scripts write as one word, "q_proj,v_proj".
_LISTS = ("lora_target_modules", "modules_to_save", "new_special_tokens")


@dataclass
class Translation:
    """What became of one source.

    Args:
        values: key -> value, under today's names.
        entries: what became of each old key.
        problems: old values that cannot be honoured, and old keys that contradict others.
        said_by: the key of the source that said a value.
    """

    values: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    said_by: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any, old_key: str) -> None:
        """Set the new key, unless another key already gave it another value. Objects are merged item by item."""
        known = self.values.get(key, value)
        if isinstance(known, dict) and isinstance(value, dict) and all(known.get(k, v) == v for k, v in value.items()):
            self.values[key] = {**known, **value}
        elif str(known) != str(value):
            self.problems.append(
                f"{old_key} ({show(old_key, value)}) is now {key}, and {self.said_by[key]} says {show(key, known)}: "
                f"keep one of them ({key} is the new name)"
            )
        else:
            self.values[key] = known
        self.said_by.setdefault(key, old_key)

    def became(self, key: str, value: Any, new: dict[str, Any], remark: str) -> None:
        """An old key that lives on."""
        shown = ", ".join(f"{name} ({show(_shown_as(key, name), each)})" for name, each in new.items())
        self.entries.append(Entry(key, value, new, f"{key} is now {shown}{_after(remark)}", remark))

    def gone(self, key: str, value: Any, remark: str, default: str | None = None) -> None:
        """An old key that says nothing any more."""
        nothing = f" (it asked for nothing that is not the default of {default})" if default else ""
        line = f"{key} is no longer used{nothing}{_after(remark)}"
        self.entries.append(Entry(key, value, {}, line, remark or "it asks for nothing"))


def _after(remark: str) -> str:
    return f": {remark}" if remark else ""


def _shown_as(old: str, new: str) -> str:
    """The name under which a value is shown: that of a secret, if one of them is."""
    return old if is_secret(old) else new


def translate_source(values: Mapping[str, Any]) -> Translation:
    """Bring old keys and values up to date.

    Args:
        values: key -> value as found in one source (the file, or the command line).
    """
    new = {key: value for key, value in values.items() if key not in LEGACY and key not in MODE_FLAGS}
    found = Translation(new, said_by={key: key for key in new})
    _translate_mode(values, found)
    if own := objective(values):
        found.put("objective", "wedlm", own[0])
        remark = f"a file with {own[0]} beside older names is one of WeDLM"
        found.entries.append(
            Entry("objective", None, {"objective": "wedlm"}, f"objective is now 'wedlm': {remark}", remark)
        )
    for key, rule in LEGACY.items():
        if key in values:
            _translate_key(key, rule, values, found)
    _translate_values(found)
    return found


def _translate_values(found: Translation) -> None:
    """Values that are written otherwise under a key that stayed."""
    for key, renamed in LEGACY_VALUES.items():
        value = found.values.get(key)
        if not isinstance(value, str) or value not in renamed:
            continue
        if renamed[value] is DROP:
            del found.values[key]
            found.entries.append(Entry(key, value, {}, f"{key} is empty and is no longer used", "it is empty"))
        else:
            found.values[key] = renamed[value]
            line = f"{key} {value} is now {renamed[value]}"
            found.entries.append(Entry(key, value, {key: renamed[value]}, line))
    for key in _LISTS:
        value = found.values.get(key)
        if isinstance(value, str) and "," in value and not set(value) & set("[](){}*\\|"):
            found.values[key] = [name.strip() for name in value.split(",") if name.strip()]
            line = f"{key} {value} is now {' '.join(found.values[key])}"
            found.entries.append(Entry(key, value, {key: found.values[key]}, line))


def translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """``translate_source`` as (values, lines for the log, problems)."""
    found = translate_source(values)
    return found.values, [entry.line for entry in found.entries], found.problems


def _translate_key(key: str, rule: Old, values: Mapping[str, Any], found: Translation) -> None:
    value = values[key]
    if value is None and key != "peft_config_path":
        found.gone(key, value, "null asks for nothing")
        return
    try:
        answer = rule.read(value, values)
    except ValueError as error:
        found.problems.append(f"{key} is {show(key, value)}: {error}")
        return
    if isinstance(answer, Gone):
        found.gone(key, value, answer.reason)
        return
    remark = rule.note
    if isinstance(answer, Several):
        new, remark = answer.values, rule.note if answer.note is None else answer.note
        for other in answer.over:
            if found.said_by.get(other) == other:
                found.values.pop(other, None)
    elif rule.new is None or answer is DROP:
        new = {}
    else:
        new = {rule.new: answer}
    if not new and isinstance(answer, Several):
        found.gone(key, value, remark)
        return
    if not new:
        found.gone(key, value, "" if rule.new else remark, rule.new)
        return
    for name, each in new.items():
        found.put(name, each, key)
    found.became(key, value, new, remark)


def _translate_mode(values: Mapping[str, Any], found: Translation) -> None:
    """``use_lora`` and ``q_lora`` say the train_mode between them: QLoRA is LoRA, so both together mean qlora."""
    new, said_by, problems = found.values, found.said_by, found.problems
    asked: list[tuple[str, str]] = []
    denied: list[tuple[str, str]] = []
    for key, mode in MODE_FLAGS.items():
        if key not in values:
            continue
        try:
            (asked if flag(values[key]) else denied).append((key, mode))
        except ValueError as error:
            problems.append(f"{key} is {show(key, values[key])}: {error}")
    explicit = new.get("train_mode")
    quantising = explicit == "qlora" or (explicit is None and quantised(values))
    mode = "qlora" if "qlora" in [mode for _, mode in asked] or quantising else "lora"
    for key, _ in asked:
        if explicit is not None and explicit != mode:
            problems.append(
                f"{key} is true, and train_mode says {explicit!r}: leave {key} out, or set train_mode to {mode}"
            )
        else:
            new["train_mode"] = mode
            said_by.setdefault("train_mode", key)
            found.became(key, values[key], {"train_mode": mode}, "")
    for key, meant in denied:
        if new.get("train_mode") == meant or (meant == "lora" and new.get("train_mode") == "qlora"):
            problems.append(
                f"{key} is false, and {said_by['train_mode']} asks for {new['train_mode']}: leave {key} out"
            )
        else:
            found.gone(key, values[key], "train_mode says it")
