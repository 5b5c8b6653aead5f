"""Conversations: messages in the form that chat templates take, and the checks that make them so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_sft.data.records import BadRecord, parse_json, shorten

ROLES = ("system", "developer", "user", "assistant", "tool")
# Texts of a message that a template may write, beside its content. Templates disagree on the name.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Older names of the role that answers a tool call: OpenAI's first function calls, and Llama 3.1.
_TOOL_ROLES = ("function", "ipython")
# Arguments of apply_chat_template that are ours to set.
_RESERVED_KWARGS = frozenset(
    "conversation messages tools documents chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)


class FormatError(ValueError):
    """A record that is no conversation in any known format."""


@dataclass(frozen=True)
class Conversation:
    """Messages in the form that chat templates take, with the tools and template variables of this conversation.

    Args:
        format: name of the format that it came in, one of ``formats.DATA_FORMATS``.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None
    format: str = "messages"


# ---------------------------------------------------------------------------------------------------------------------
# Values


def show(value: Any, width: int = 60) -> str:
    """A value for a message to users: one short line that any encoding can write."""
    return shorten(value, width).encode("utf-8", "backslashreplace").decode("utf-8")


def show_keys(record: dict[Any, Any]) -> str:
    """The keys of a record, for a message to users."""
    names = [show(repr(key), 40) for key in list(record)[:12]]
    return show(", ".join(names) + (", ..." if len(record) > len(names) else ""), 200) or "no keys"


def absent(value: Any) -> bool:
    """Whether a field has nothing in it: no value, or the empty text of a CSV cell."""
    return value is None or (isinstance(value, str) and not value)


def as_list(value: Any) -> Any:
    """Lists in the guise of Parquet readers, tuples and NumPy arrays, as lists; anything else as it is."""
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if getattr(value, "ndim", None) else value


def plain(value: Any, *, without_null: bool = False) -> Any:
    """The value in JSON's own types, all the way down.

    Args:
        without_null: leave out the keys that are None. Arrow fills those that an object lacks with None.
    """
    if isinstance(value, dict):
        items = {key: plain(item, without_null=without_null) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not None} if without_null else items
    value = as_list(value)
    if isinstance(value, list):
        return [plain(item, without_null=without_null) for item in value]
    return value.item() if hasattr(value, "item") and hasattr(value, "dtype") else value


def from_json(value: Any, where: str, wanted: str) -> Any:
    """The value of a JSON text, None of a blank one; a value that is no text as it is.

    Raises:
        FormatError: a text that is no JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    found = parse_json(value)
    if isinstance(found, BadRecord):
        python = "; it looks like Python's own notation, so write the column with json.dumps" if "{'" in value else ""
        raise FormatError(f"{where} is a string that is {show(found.reason, 160)}{python}; write {wanted}")
    return found


def check_text(value: Any, where: str) -> str:
    """The text.

    Raises:
        FormatError: no string, or one that holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        found = f"{type(value).__name__} {show(value)}"
        raise FormatError(f"{where} is {found}, but it must be a string; images and other parts are not supported")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise FormatError(
            f"{where} holds half of a surrogate pair (U+{code:04X}), which is no text; remove it"
        ) from None
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A checked copy of the messages, without keys that are None.

    Content in parts that are all text is joined; the roles ``function`` and ``ipython`` become ``tool``, a
    ``function_call`` becomes ``tool_calls``, whose arguments are objects (templates would quote a JSON text a second
    time); ``weight: 0``, as OpenAI marks turns, becomes ``train: false``.

    Raises:
        FormatError: no messages, no assistant turn, an unknown role, content that is no text. ``content`` may be None
            only in an assistant's message that has ``tool_calls`` or reasoning.
    """
    checked = check_turns(messages)
    if not any(message["role"] == "assistant" for message in checked):
        raise FormatError("the conversation has no assistant turn, so there is nothing to learn; add one")
    return checked


def check_turns(messages: Any, where: str = "") -> list[dict[str, Any]]:
    """As :func:`check_messages`, for a part of a conversation, which needs no assistant turn.

    Args:
        where: said behind "message 3" in errors: " of chosen".
    """
    messages = as_list(messages)
    if not isinstance(messages, list):
        raise FormatError(f"messages is {type(messages).__name__} {show(messages)}, but it must be a list of messages")
    if not messages:
        raise FormatError(f"the conversation{where} has no messages; at least one assistant turn is needed")
    return [_check_message(message, f"message {index}{where}") for index, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        found = f"{type(message).__name__} {show(message)}"
        raise FormatError(f"{where} is {found}, but it must be an object with role and content")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        if not isinstance(role, str) or role not in _TOOL_ROLES:
            raise FormatError(f"{where} has the role {show(repr(role))}; known are {', '.join(ROLES)}")
        message["role"] = role = "tool"
    for key in REASONING_KEYS:
        if key in message:
            check_text(message[key], f"{key} of {where}")
    if "tool_calls" in message or "function_call" in message:
        message = _with_tool_calls(message, where)
    message["content"] = _content(message, where)
    if "weight" in message:
        message = _with_weight(message, where)
    if "train" in message and (not isinstance(message["train"], bool) or (message["train"] and role != "assistant")):
        raise FormatError(
            f"train of {where} ({role}) is {show(message['train'])}; it must be true or false, and only assistant turns "
            "are trained"
        )
    return message


def _content(message: dict[str, Any], where: str) -> str | None:
    content = message.get("content")
    if not isinstance(content, str):
        content = as_list(content)
        if isinstance(content, list):
            content = "".join(_text_of_part(part, f"part {n} of {where}") for n, part in enumerate(content)) or None
    if content is None:
        role = message["role"]
        if role == "assistant" and ("tool_calls" in message or any(key in message for key in REASONING_KEYS)):
            return None
        raise FormatError(f"{where} ({role}) has no content; only an assistant's tool call or reasoning may do without")
    return check_text(content, f"content of {where}")


def _text_of_part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    is_text = kind is None or (isinstance(kind, str) and kind == "text")
    if not isinstance(part, dict) or not is_text or part.get("text") is None:
        found = show(part) if is_text else f"of type {show(repr(kind))}"
        raise FormatError(
            f'{where} is {found}, but only text is supported, {{"type": "text", "text": ...}}; images and other parts '
            "are not"
        )
    return check_text(part["text"], where)


def _with_weight(message: dict[str, Any], where: str) -> dict[str, Any]:
    """OpenAI's mark of turns: weight 0 is not learned."""
    weight = message.pop("weight")
    if message["role"] != "assistant" or (isinstance(weight, (int, float)) and weight == 1):
        return message
    if not isinstance(weight, (int, float)) or weight != 0:
        raise FormatError(f"weight of {where} is {show(weight)}; it must be 0 (not learned) or 1")
    return {**message, "train": False}


def _with_tool_calls(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The message with its calls as a list of objects; a ``function_call`` is one of them."""
    single, role = message.pop("function_call", None), message["role"]
    calls = plain(from_json(message.pop("tool_calls", None), f"tool_calls of {where}", "a list of objects"))
    if single is not None:
        if calls:
            raise FormatError(f"{where} has both tool_calls and function_call; write tool_calls alone")
        calls = [{"type": "function", "function": plain(single)}]
    if not calls:  # Arrow has an empty list where other messages have calls
        return message
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise FormatError(f"tool_calls of {where} is {show(calls)}, but it must be a list of objects")
    if role != "assistant":
        raise FormatError(f"{where} ({role}) has tool_calls; only the assistant calls tools")
    message["tool_calls"] = [_check_call(call, f"tool call {n} of {where}") for n, call in enumerate(calls)]
    return message


def _check_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    call = {key: value for key, value in call.items() if value is not None}
    if "function" in call:
        function = call["function"]
        if not isinstance(function, dict):
            raise FormatError(f"function of {where} is {show(function)}, but it must be an object with name, arguments")
        return {**call, "function": _check_call({k: v for k, v in function.items() if k != "function"}, where)}
    if not isinstance(call.get("name"), str) or not call["name"]:
        raise FormatError(f"{where} has no name: {show(call)}")
    if isinstance(call.get("arguments"), str):
        wanted = "the arguments as an object"
        arguments = from_json(call["arguments"], f"arguments of {where}", wanted)
        if not isinstance(arguments, (dict, type(None))):
            raise FormatError(f"arguments of {where} is {show(call['arguments'])}; write {wanted}")
        call["arguments"] = arguments or {}
    return call


# ---------------------------------------------------------------------------------------------------------------------
# What stands beside messages


def check_tools(value: Any) -> list[Any] | None:
    """Function schemas for the chat template, or None; a list, or its JSON text.

    Raises:
        FormatError: no list of objects.
    """
    tools = plain(from_json(value, "tools", "a list of function schemas"), without_null=True)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise FormatError(f"tools is {show(tools)}, but it must be a list of function schemas (objects)")
    return tools


def tools_of(record: dict[str, Any]) -> list[Any] | None:
    """The tools of a record: ``tools``, or ``functions`` as OpenAI called them first."""
    tools = check_tools(record.get("tools"))
    if tools is None and record.get("functions") is not None:
        tools = [{"type": "function", "function": schema} for schema in check_tools(record["functions"]) or []]
    return tools or None


def check_template_kwargs(value: Any) -> dict[str, Any] | None:
    """Variables for the chat template, or None; an object, or its JSON text. Those that are None are left out.

    Raises:
        FormatError: no object, or a name that hf_sft sets itself.
    """
    if value is None:
        return None
    value = from_json(value, "chat_template_kwargs", "an object of template variables")
    if value is not None and not isinstance(value, dict):
        raise FormatError(f"chat_template_kwargs is {show(value)}, but it must be an object of template variables")
    kwargs = {key: plain(item) for key, item in (value or {}).items() if item is not None}
    taken = sorted(_RESERVED_KWARGS & kwargs.keys())
    if taken:
        raise FormatError(f"chat_template_kwargs sets {', '.join(taken)}, which cannot be changed here; remove it")
    return kwargs or None
