"""Chat templates by name, for tokenizers that bring none."""

from __future__ import annotations

import functools
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
            special tokens the tokenizer lacks; a template that is no valid Jinja.
    """
    text, origin = _find_template(tokenizer, chat_template)
    error = syntax_error(text)
    if error is not None:
        raise ValueError(f"{origin} is no valid Jinja template: {error}. Mend it, or set chat_template to another one.")
    return text


@functools.lru_cache(maxsize=32)
def syntax_error(template: str) -> str | None:
    """What is wrong with a template's text, with its line; None if it compiles with the tags that transformers knows."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}...{% endgeneration %}`` marks what the assistant writes."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    try:
        environment.from_string(template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {(error.message or 'it cannot be read').rstrip('.')}"
    except SyntaxError as error:  # of the code that Jinja makes: {% break %} outside a loop
        return f"{error.msg} (a tag stands where it cannot)"
    return None


def _find_template(tokenizer: Any, chat_template: str | None) -> tuple[str, str]:
    """The text, and where it comes from, for messages."""
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
        return own, "the tokenizer's chat template"
    if chat_template in NAMED_TEMPLATES:
        _check_named(tokenizer, chat_template)
        return NAMED_TEMPLATES[chat_template], f"chat_template {chat_template}"
    if re.search(r"\{[{%]", chat_template):
        return chat_template, "the text of chat_template"
    path = Path(chat_template)
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a text that is too long for a name, or that no name can hold
        found = False
    if not found:
        shown = repr(chat_template if len(chat_template) <= 80 else chat_template[:77] + "...")
        raise ValueError(
            f"chat_template is {shown}: no known name ({names}), no file, and no Jinja text (which holds "
            "'{{' or '{%'). Use one of these."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"chat_template {path} is not in UTF-8. Save it as UTF-8.") from None
    if not text.strip():
        raise ValueError(f"chat_template {path} is empty. Write a Jinja template to it, or use one of: {names}.")
    return text, f"chat_template {path}"


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
