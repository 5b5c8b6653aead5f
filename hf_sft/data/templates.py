"""Chat templates by name, for tokenizers that bring none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_NO_TOOLS = (
    "{%- if tools %}"
    "{{ raise_exception('this chat template has no place for tools; use one that knows tools') }}"
    "{%- endif %}"
)
# The space after "Assistant:" is the model's to write: a prompt that ends in a space is tokenised unlike any text.
_PLAIN = (
    "{%- set names = {'system': 'System', 'developer': 'System', 'user': 'User', 'tool': 'Tool'} %}"
    + _NO_TOOLS
    + "{%- if bos_token %}{{ bos_token }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + (message['content'] or '') + eos_token }}"
    "{%- else %}{{ names[message['role']] + ': ' + message['content'] + '\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_CHATML = (
    _NO_TOOLS + "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMED_TEMPLATES: dict[str, str] = {"plain": _PLAIN, "chatml": _CHATML}
_NEEDED_TOKENS: dict[str, tuple[str, ...]] = {"chatml": ("<|im_start|>", "<|im_end|>")}


def special_tokens(tokenizer: Any) -> set[str]:
    """Texts that the tokenizer turns into a special token wherever they stand."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def resolve_template(tokenizer: Any, chat_template: str | None) -> str:
    """The Jinja text of the chat template that ``chat_template`` asks for.

    Args:
        tokenizer: a Hugging Face tokenizer; its own template counts if ``chat_template`` is None.
        chat_template: a name (``plain``, ``chatml``), the path of a template file, or the Jinja text itself.

    Raises:
        ValueError: the tokenizer has no template and none is given; no such name or file; a named template whose
            special tokens the tokenizer lacks.
    """
    names = ", ".join(NAMED_TEMPLATES)
    if chat_template is None:
        own = getattr(tokenizer, "chat_template", None)
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            raise ValueError(
                "The tokenizer has no chat template, and conversations cannot be written without one. "
                f"Set chat_template to one of: {names}, or to a file or text of a Jinja template."
            )
        return own
    if chat_template in NAMED_TEMPLATES:
        _check_named(tokenizer, chat_template)
        return NAMED_TEMPLATES[chat_template]
    if re.search(r"\{[{%]", chat_template):
        return chat_template
    path = Path(chat_template)
    if not path.is_file():
        raise ValueError(
            f"chat_template is {chat_template!r}: no known name ({names}), no file, and no Jinja text (which holds "
            "'{{' or '{%'). Use one of these."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"chat_template {path} is not in UTF-8. Save it as UTF-8.") from None


def _check_named(tokenizer: Any, name: str) -> None:
    missing = [token for token in _NEEDED_TOKENS.get(name, ()) if token not in special_tokens(tokenizer)]
    if missing:
        raise ValueError(
            f"chat_template {name} needs {' and '.join(missing)} as special tokens, and the tokenizer has none such. "
            f"Add them (new_special_tokens: {list(_NEEDED_TOKENS[name])}), or set chat_template to plain."
        )
    if name == "plain" and not tokenizer.eos_token:
        raise ValueError(
            "chat_template plain ends each answer with the tokenizer's eos_token, and it has none. "
            "Set eos_token in the tokenizer's tokenizer_config.json, or use another template."
        )
