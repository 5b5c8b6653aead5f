"""What a line of the table is made of: a rule for one old key, and the converters that rules share."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_sft.conversion import convert

DROP = object()  # a converter's answer: nothing remains to be said under the new key
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Gone:
    """A converter's answer: nothing remains to be said, for this reason."""

    reason: str


@dataclass(frozen=True)
class Several:
    """A converter's answer: these new keys.

    Args:
        values: new key -> value.
        over: keys whose own value has gone into ``values``: what the source says under them is no contradiction.
        note: added to the line that is logged, in place of the rule's.
    """

    values: dict[str, Any]
    over: tuple[str, ...] = ()
    note: str | None = None


class Only:
    """Values in ``harmless`` (as text, any case) ask for nothing; others cannot be honoured, and ``why`` says so."""

    def __init__(self, harmless: Iterable[Any], why: str) -> None:
        words = [str(value).lower() for value in harmless]
        self.words, self.why = frozenset(words), why
        self.shown = ", ".join(word for word in words if word not in ("", "1", "no", "yes", "null"))

    def __call__(self, value: Any) -> Any:
        if str(value).lower() in self.words:
            return DROP
        raise ValueError(self.why)


@dataclass(frozen=True)
class Old:
    """What became of an old key.

    Args:
        new: the key that replaces it, or None where it only goes.
        value: from the old value to the new one, or ``DROP``, ``Gone`` or ``Several``; a ValueError is a problem for the user.
        note: a reason or remark, added to the line that is logged.
        doc: what the page of old keys says in place of the note.
        also: further keys that it may set.
        seeing: in place of ``value`` where the meaning depends on other keys: from the old value and all that the source says.
    """

    new: str | None
    value: Callable[[Any], Any] = lambda value: value
    note: str = ""
    doc: str = ""
    also: tuple[str, ...] = ()
    seeing: Callable[[Any, Values], Any] | None = None

    def read(self, value: Any, values: Values) -> Any:
        return self.value(value) if self.seeing is None else self.seeing(value, values)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that it may set."""
        return (*((self.new,) if self.new else ()), *self.also)

    @property
    def why(self) -> str:
        """Which values are taken, and why others are errors; empty where every value is."""
        return (
            ""
            if not isinstance(self.value, Only)
            else f"accepted: {self.value.shown}; others are errors: {self.value.why}"
        )


@dataclass(frozen=True)
class Entry:
    """What became of a key of one source.

    Args:
        key, value: as the source said them.
        new: new key -> value; empty where it only goes.
        line: for the log.
        remark: the line without the keys: why.
    """

    key: str
    value: Any
    new: dict[str, Any] = field(default_factory=dict)
    line: str = ""
    remark: str = ""


NONE = ("false", "none", "null", "", "0", "no")


def is_none(value: Any) -> bool:
    """Whether a value asks for nothing."""
    return str(value).lower() in NONE


def asks(values: Values, *keys: str) -> bool:
    """Whether one of the keys is given and asks for something."""
    return any(key in values and not is_none(values[key]) for key in keys)


def typed(value: Any, hint: Any) -> Any:
    """``convert`` with a sentence."""
    try:
        return convert(value, hint)
    except ValueError as wanted:
        raise ValueError(f"it must be {wanted}") from None


def flag(value: Any) -> bool:
    return bool(typed(value, bool))


def when(true: Any = DROP, false: Any = DROP) -> Callable[[Any], Any]:
    """A flag that becomes one value when true and another, or nothing, when false."""
    return lambda value: true if flag(value) else false


def choice(table: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Values renamed by a table; others pass and are judged under the new key."""
    return lambda value: table.get(str(value).lower(), value)


def unless_none(value: Any) -> Any:
    """Scripts write "", null or false where nothing is meant."""
    return DROP if is_none(value) else value


def share(value: Any) -> Any:
    """0 asks for no split."""
    return typed(value, float) or DROP


def names(value: Any) -> Any:
    """ "q_proj,v_proj" and "all" are a list of names here."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    return ["all-linear"] if value == ["all"] else value


def same_key(known: Iterable[str], keys: Iterable[str], what: str) -> None:
    """Raises ValueError for a key inside an old object that is none of ``known``."""
    known = tuple(known)
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            meant = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"{what} has no key {key}: {meant}")


def read_object(value: Any, what: str) -> dict[str, Any]:
    """An object, or the JSON or YAML file of one.

    Raises:
        ValueError: no such file, or no object in it.
    """
    if isinstance(value, Mapping):
        return dict(value)
    path = Path(str(value))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{what} cannot be read ({reason}): name a JSON or YAML file") from None
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"{what} is no valid YAML") from None
    else:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{what} is no valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} holds no object")
    return found
