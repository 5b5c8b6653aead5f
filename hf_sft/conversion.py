"""Values from files and the command line, turned into the types that the dataclasses ask for.

One rule per type, the same for JSON, YAML and ``--key value``: text that spells a value of the type is taken, anything
else is a ``ValueError`` whose text names the type wanted.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

TRUE_WORDS = ("true", "yes", "on", "t", "y", "1")
FALSE_WORDS = ("false", "no", "off", "f", "n", "0")
_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    dict: "an object",
    type(None): "null",
}


def is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the hint alone."""
    return get_args(hint) if is_union(hint) else (hint,)


def choices(hint: Any) -> list[Any]:
    """The values that a hint allows, if it names them (``Literal`` or ``Enum``), else an empty list."""
    found: list[Any] = []
    for member in members(hint):
        if get_origin(member) is Literal:
            found += get_args(member)
        elif isinstance(member, type) and issubclass(member, Enum):
            found += [item.value for item in member]
    return found


def takes(hint: Any, kind: type) -> bool:
    """Whether the hint, or one of its alternatives, is ``kind`` (bool, list, dict)."""
    return any((get_origin(member) or member) is kind for member in members(hint))


def describe(hint: Any) -> str:
    """The type in words: "a whole number or null"."""
    if is_union(hint):
        alternatives = members(hint)
        if choices(hint):  # HF writes `SchedulerType | str`: only the names of the enum are taken
            alternatives = tuple(member for member in alternatives if member is not str)
        return " or ".join(describe(member) for member in alternatives)
    if get_origin(hint) is list:
        return f"a list of {describe(get_args(hint)[0])} items"
    if get_origin(hint) is dict:
        return _NAMES[dict]
    if choices(hint):
        return "one of " + ", ".join(json.dumps(choice) for choice in choices(hint))
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def convert(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint``.

    Raises:
        ValueError: the value does not spell the type; the text is the type wanted, in words.
    """
    if hint is Any:
        return value
    if is_union(hint):
        return _to_union(value, hint)
    origin = get_origin(hint) or hint
    if origin is Literal or (isinstance(origin, type) and issubclass(origin, Enum)):
        return _to_choice(value, hint)
    if origin is list:
        return _to_list(value, hint)
    if origin in _READERS:
        return _READERS[origin](value)
    raise ValueError(describe(hint))  # an object that no file can spell


def _to_union(value: Any, hint: Any) -> Any:
    alternatives = list(members(hint))
    if type(None) in alternatives and _spells_null(value, text_allowed=str in alternatives):
        return None
    text = [member for member in alternatives if member is str and not choices(hint)]
    others = [member for member in alternatives if member not in (str, type(None))]
    if isinstance(value, str) and value.lstrip().startswith("{") and takes(hint, dict):
        return _to_dict(value)  # half-written JSON is not the name of a file
    for member in others + text:
        if isinstance(value, str) and text and _stays_text(value, member):
            continue
        try:
            return convert(value, member)
        except ValueError:
            continue
    raise ValueError(describe(hint))


def _stays_text(value: str, member: Any) -> bool:
    """Where text is taken too: one word is no list, and of the words for true and false only these two count."""
    if get_origin(member) is list:
        return not value.lstrip().startswith("[")
    return member is bool and value.lower() not in ("true", "false")


def _spells_null(value: Any, text_allowed: bool) -> bool:
    """null, or none where it cannot be text ("none" is a value of report_to)."""
    if isinstance(value, str):
        return value.lower() == "null" or (value.lower() == "none" and not text_allowed)
    return value is None


def _to_choice(value: Any, hint: Any) -> Any:
    allowed = choices(hint)
    for choice in allowed:
        if value == choice and isinstance(value, bool) == isinstance(choice, bool):
            return choice
        if isinstance(value, str) and value.lower() == str(choice).lower():
            return choice
    if value is False and "no" in allowed:  # how YAML 1.1 reads `eval_strategy: no`
        return "no"
    raise ValueError(describe(hint))


def _to_list(value: Any, hint: Any) -> list[Any]:
    item = (get_args(hint) or (Any,))[0]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{describe(hint)}, and this is no JSON ({error})") from None
    if isinstance(value, (list, tuple)):
        try:
            return [convert(entry, item) for entry in value]
        except ValueError:
            raise ValueError(describe(hint)) from None
    return [convert(value, item)]


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower() if isinstance(value, (str, int)) else ""
    if word in TRUE_WORDS or word in FALSE_WORDS:
        return word in TRUE_WORDS
    raise ValueError(_NAMES[bool])


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(_NAMES[float])
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(_NAMES[float]) from None
    if not math.isfinite(number):
        raise ValueError(_NAMES[float])
    return number


def _to_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass  # "1e3" is a whole number too
    try:
        number = _to_float(value)
    except ValueError:
        raise ValueError(_NAMES[int]) from None
    if not number.is_integer():
        raise ValueError(_NAMES[int])
    return int(number)


def _to_str(value: Any) -> str:
    if isinstance(value, str):
        return value
    hint = ' (write it in quotes: "...")' if isinstance(value, (int, float)) else ""
    raise ValueError(_NAMES[str] + hint)


def _to_dict(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"an object, and this is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(_NAMES[dict])
    return value


def _to_none(value: Any) -> None:
    if value is None:
        return
    raise ValueError(_NAMES[type(None)])


_READERS: dict[Any, Callable[[Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    dict: _to_dict,
    type(None): _to_none,
}


_SECRET = re.compile(
    r"(^|_)(token|secret|password|passwd|(api|access|private|wandb|hub)_?key|credential|webhook)s?($|_)", re.IGNORECASE
)
_TOKEN_OF_TEXT = re.compile(
    r"(^|_)(mask|pad|eos|bos|unk|cls|sep|special|input)_tokens?(_|$)|^average_tokens_|_tokens_per_"
)


_USER_OF_URL = re.compile(r"(\w://)[^/@\s]+@")


def is_secret(key: str) -> bool:
    """Whether a key names what must not be written or shown, such as a token of the hub."""
    return _SECRET.search(key) is not None and _TOKEN_OF_TEXT.search(key) is None


def show(key: str, value: Any) -> str:
    """A value for a message; what stands under a key that names a secret stays out of logs, and so does a password in a URL."""
    if is_secret(key) and not (value is None or isinstance(value, bool)):
        return "(hidden)"
    return _USER_OF_URL.sub(r"\1(hidden)@", repr(value))


def has_password(value: Any) -> bool:
    """Whether a text is a URL with a user or a password in it."""
    return isinstance(value, str) and _USER_OF_URL.search(value) is not None
