"""Old keys and values, brought up to date by the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_sft.conversion import is_secret, show
from hf_sft.legacy.hugging_face import HUGGING_FACE
from hf_sft.legacy.llama_factory import LLAMA_FACTORY
from hf_sft.legacy.lr0 import LR0
from hf_sft.legacy.preferences import PREFERENCES
from hf_sft.legacy.rules import DROP, Entry, Gone, Old, Several, flag
from hf_sft.legacy.scripts import MODE_FLAGS, SCRIPTS, quantised
from hf_sft.legacy.tracking import TRACKING
from hf_sft.legacy.wedlm import WEDLM, objective

LEGACY: dict[str, Old] = {**HUGGING_FACE, **SCRIPTS, **LLAMA_FACTORY, **WEDLM, **PREFERENCES, **TRACKING, **LR0}

# Values that were renamed under a key that stayed, or ask for nothing there.
LEGACY_VALUES: dict[str, dict[str, Any]] = {
    "optim": {"adamw_hf": "adamw_torch"},
    "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"},
    "eval_file": {"": DROP},
    "task_type": {"": DROP, "pt": "pretrain"},
    "deepspeed": {"": DROP},
    "resume_from_checkpoint": {"": DROP},
}

# Old here, and still fields of TrainingArguments: they make no source an old one.
STILL_FIELDS = ("gradient_checkpointing", "gradient_checkpointing_kwargs")
# Keys whose scripts cut longer records, and keys of Firefly alone, whose max_seq_length does.
_CUTTING = ("max_length", "model_max_length", "cutoff_len", "max_seq_len", "seq_length")
_FIREFLY = ("template_name", "tokenize_num_workers")
_RECORDS = "a batch is of records there; packing true takes several documents per row and trains faster, in fewer steps"
_CUT = "records that are longer are cut, as there"

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
        winning: keys of the command line, which contradict nothing: they win.
    """

    values: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    said_by: dict[str, str] = field(default_factory=dict)
    winning: frozenset[str] = frozenset()

    def put(self, key: str, value: Any, old_key: str) -> None:
        """Set the new key, unless another key already gave it another value. Objects are merged item by item."""
        known = self.values.get(key, value)
        if isinstance(known, dict) and isinstance(value, dict) and all(known.get(k, v) == v for k, v in value.items()):
            self.values[key] = {**known, **value}
        elif self.yields(old_key, self.said_by.get(key, old_key)):
            return
        elif self.yields(self.said_by.get(key, old_key), old_key):
            self.values[key], self.said_by[key] = value, old_key
        elif str(known) != str(value):
            self.problems.append(
                f"{old_key} ({show(old_key, value)}) is now {key}, and {self.said_by[key]} says {show(key, known)}: "
                f"keep one of them ({key} is the new name)"
            )
        else:
            self.values[key] = known
        self.said_by.setdefault(key, old_key)

    def yields(self, key: str, other: str) -> bool:
        """Whether ``other`` is of the command line, and ``key`` is not."""
        return other in self.winning and key not in self.winning

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


def translate_source(from_file: Mapping[str, Any], from_line: Mapping[str, Any] | None = None) -> Translation:
    """Bring old keys and values up to date, those of the file and of the command line together, since some explain others.

    Args:
        from_file: key -> value as found there.
        from_line: the same of the command line: it replaces keys of that name before, and wins where another name is meant.
    """
    from_line = from_line or {}
    values = {**from_file, **from_line}
    new = {key: value for key, value in values.items() if not _is_old(key)}
    found = Translation(new, said_by={key: key for key in new}, winning=frozenset(from_line))
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
    _count_records(from_file, from_line, found)
    _cut_records(values, found)
    return found


def _is_old(key: str) -> bool:
    return key in LEGACY or key in MODE_FLAGS


def _count_records(from_file: Mapping[str, Any], from_line: Mapping[str, Any], found: Translation) -> None:
    """A batch of old scripts is of records: as many steps are taken only where they are not packed."""

    def counts(keys: Iterable[str]) -> bool:
        """Whether a batch size for training is among them."""
        size = "per_device_train_batch_size"
        return size in found.values and any(key == size or (key in LEGACY and size in LEGACY[key].keys) for key in keys)

    def old(keys: Iterable[str]) -> bool:
        return any(_is_old(key) and key not in STILL_FIELDS for key in keys)

    if str(found.values.get("attention_backend") or "auto") != "auto":  # it packs documents
        return
    # An old flag beside a file of today's keys does not change what the file's batch size counts.
    if (old(from_file) and counts([*from_file, *from_line])) or (old(from_line) and counts(from_line)):
        _imply("packing", False, _RECORDS, found)


def _cut_records(values: Mapping[str, Any], found: Translation) -> None:
    """Old scripts cut what is too long; here it is dropped by default."""
    firefly = values.get("max_seq_length") is not None and any(key in values for key in _FIREFLY)
    if firefly or any(values.get(key) is not None for key in _CUTTING):
        _imply("overlength", "truncate", _CUT, found)


def _imply(key: str, value: Any, remark: str, found: Translation) -> None:
    """What old scripts did without a key for it; texts and WeDLM have rules of their own here."""
    own_rules = found.values.get("task_type") == "pretrain" or found.values.get("objective") == "wedlm"
    if own_rules or found.values.get(key) is not None:
        return
    found.values[key] = value
    found.entries.append(Entry(key, None, {key: value}, f"{key} is now {str(value).lower()}: {remark}", remark))


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


def translate(
    from_file: Mapping[str, Any], from_line: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[str], list[str]]:
    """``translate_source`` as (values, lines for the log, problems)."""
    found = translate_source(from_file, from_line)
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
            wins = found.yields(key, other) and not answer.values  # nothing has taken it
            if found.said_by.get(other) == other and not wins:
                found.values.pop(other, None)
                del found.said_by[other]
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
        if explicit is not None and explicit != mode and found.yields(key, "train_mode"):
            found.gone(key, values[key], "train_mode says it")
        elif explicit is not None and explicit != mode and not found.yields("train_mode", key):
            problems.append(
                f"{key} is true, and train_mode says {explicit!r}: leave {key} out, or set train_mode to {mode}"
            )
        else:
            new["train_mode"] = mode
            if explicit != mode:
                said_by["train_mode"] = key
            found.became(key, values[key], {"train_mode": mode}, "")
    for key, meant in denied:
        if found.yields(key, said_by.get("train_mode", key)):
            found.gone(key, values[key], "train_mode says it")
        elif new.get("train_mode") == meant or (meant == "lora" and new.get("train_mode") == "qlora"):
            problems.append(
                f"{key} is false, and {said_by['train_mode']} asks for {new['train_mode']}: leave {key} out"
            )
        else:
            found.gone(key, values[key], "train_mode says it")
