"""Chat templates: by name, from a file or the tokenizer, and with a system prompt written into them.

The named templates are files in ``chat_templates``, each a model family's format as its makers document it.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Special tokens that a named template writes, the end of turn among them. The others end turns with the tokenizer's eos_token.
_NEEDED_TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}


class _NamedTemplates(Mapping[str, str]):
    """The Jinja text of each named template, read when it is asked for."""

    names = ("plain", "chatml", "llama2", "llama3", "vicuna", "alpaca", "zephyr", "mistral", "gemma", "phi3")

    def __getitem__(self, name: str) -> str:
        if name not in self.names:
            raise KeyError(name)
        return _read_named(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@functools.cache
def _read_named(name: str) -> str:
    file = importlib.resources.files("hf_sft.data").joinpath("chat_templates", f"{name}.jinja")
    return file.read_text(encoding="utf-8").strip()


NAMED_TEMPLATES: Mapping[str, str] = _NamedTemplates()


def special_tokens(tokenizer: Any) -> set[str]:
    """Texts that the tokenizer turns into a special token wherever they stand."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


# Attribute of a tokenizer: special tokens that the user has added, and that texts may therefore hold.
WANTED_TOKENS = "_hf_sft_wanted_tokens"


def forbidden_tokens(tokenizer: Any, template: str = "") -> set[str]:
    """Special tokens that texts must not hold: all but those that the user has added and the template does not write."""
    # bos, eos and their like stay forbidden as well: a turn could end inside a text.
    structure = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    wanted = set(getattr(tokenizer, WANTED_TOKENS, ())) - structure
    return special_tokens(tokenizer) - {token for token in wanted if token not in template}


def resolve_template(tokenizer: Any, chat_template: str | None, system_prompt: str | None = None) -> str:
    """The Jinja text of the chat template that ``chat_template`` asks for.

    Args:
        tokenizer: a Hugging Face tokenizer; its own template counts if ``chat_template`` is None (``default``, if it has
            several).
        chat_template: a name (``NAMED_TEMPLATES``, or one of the tokenizer's own), the path of a template file, or the Jinja
            text itself.
        system_prompt: the system message of conversations that begin without one. It becomes a part of the template, so
            that a tokenizer saved with it says the same at inference; it takes the place of one that is written in already.

    Raises:
        ValueError: the tokenizer has no template and none is given; no such name or file; a named template whose
            special tokens the tokenizer lacks; a template that is no valid Jinja; a system prompt that is blank or holds a
            special token, or whose template has no place for it.
    """
    text, origin = _find_template(tokenizer, chat_template)
    error = syntax_error(text)
    if error is not None:
        raise ValueError(f"{origin} is no valid Jinja template: {error}. Mend it, or set chat_template to another one.")
    if system_prompt is None:
        return text
    text = without_system_prompt(text)
    _check_system_prompt(tokenizer, text, system_prompt)
    _check_place_for_system(tokenizer, text, origin, system_prompt)
    return with_system_prompt(text, system_prompt)


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


def has_template(tokenizer: Any, chat_template: Any = None) -> bool:
    """Whether there is a template, named or the tokenizer's own. Data that are token rows already need none."""
    return bool(chat_template or getattr(tokenizer, "chat_template", None))


def _find_template(tokenizer: Any, chat_template: str | None) -> tuple[str, str]:
    """The text, and where it comes from, for messages."""
    names = ", ".join(NAMED_TEMPLATES)
    own = getattr(tokenizer, "chat_template", None)
    several = own if isinstance(own, dict) else {}
    if chat_template is None:
        text = several.get("default") if several else own
        if not text:
            has = f"no template 'default', only {', '.join(several)}" if several else "no chat template"
            raise ValueError(
                f"The tokenizer has {has}, and conversations cannot be written without one. "
                f"Set chat_template to one of: {', '.join([*several, names])}, or to a file or text of a Jinja template."
            )
        return text, "the tokenizer's chat template"
    if chat_template in NAMED_TEMPLATES:
        _check_named(tokenizer, chat_template)
        return NAMED_TEMPLATES[chat_template], f"chat_template {chat_template}"
    if chat_template in several:
        return several[chat_template], f"the tokenizer's chat template {chat_template}"
    if re.search(r"\{[{%]", chat_template):
        return chat_template, "the text of chat_template"
    path = Path(chat_template)
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a text that is too long for a name, or that no name can hold
        found = False
    if not found:
        shown = repr(chat_template if len(chat_template) <= 80 else chat_template[:77] + "...")
        names = ", ".join([names, *several])
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


def eos_advice(tokenizer: Any) -> str:
    """How to give the tokenizer an eos_token."""
    usual = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
    known = next((token for token in usual if token in tokenizer.get_vocab()), usual[0])
    way = "into tokenizer_config.json in the tokenizer's folder (make the file if it is not there)"
    return f'Write {{"eos_token": "{known}"}} {way}'


def _check_named(tokenizer: Any, name: str) -> None:
    special = special_tokens(tokenizer)
    missing = [token for token in _NEEDED_TOKENS.get(name, ()) if token not in special]
    if missing:
        raise ValueError(
            f"chat_template {name} needs {' and '.join(missing)} as special tokens, and the tokenizer has none such. "
            f"Add them (new_special_tokens: {missing})"
            + (", or set chat_template to plain." if tokenizer.eos_token else ".")
        )
    if name not in _NEEDED_TOKENS and not tokenizer.eos_token:
        raise ValueError(
            f"chat_template {name} ends each answer with the tokenizer's eos_token, and it has none. "
            f"{eos_advice(tokenizer)}, or use another template, such as chatml with its tokens in new_special_tokens."
        )


# ---------------------------------------------------------------------------------------------------------------------
# System prompts
#
# A template with a system prompt begins with a line of its own that puts the message before conversations without one:
#
#     {% set messages = ([{'role': 'system', 'content': "..."}] if not messages or ... else []) + messages | list %}
#
# Its line break belongs to the tag (trim_blocks), and the template behind it begins a line as it did before (lstrip_blocks).

_BEFORE = "{% set messages = ([{'role': 'system', 'content': "
_BEHIND = "}] if not messages or messages[0]['role'] not in ('system', 'developer') else []) + messages | list %}\n"
_STRING = r'"(?:[^"\\]|\\.)*"'
_WRITTEN = re.compile(
    rf"{re.escape(_BEFORE)}(?:{_STRING}|\[{_STRING}(?:, {_STRING})*\] \| join){re.escape(_BEHIND)}", re.DOTALL
)


def with_system_prompt(template: str, text: str) -> str:
    """The template, for which conversations that begin without a system message begin with this one."""
    return f"{_BEFORE}{_literal(text)}{_BEHIND}{template}"


def without_system_prompt(template: str) -> str:
    """The template without the system prompt that :func:`with_system_prompt` has written into it."""
    written = _WRITTEN.match(template)
    return template[written.end() :] if written else template


def _literal(text: str) -> str:
    """A Jinja expression whose value is the text.

    What looks at a template's text, to see which tags and tokens it knows or whether it marks the assistant's tokens, must not
    find those that the system prompt speaks of; so the literal is cut where they begin.
    """
    escapes = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r"}
    strings = [
        '"' + re.sub(r'[\x00-\x08\n-\x1f"\\\x7f]', lambda m: escapes.get(m[0], f"\\x{ord(m[0]):02x}"), part) + '"'
        for part in re.split(r"(?<=[<\[{])(?=.)", text, flags=re.DOTALL)
    ]
    return strings[0] if len(strings) == 1 else f"[{', '.join(strings)}] | join"


def _check_system_prompt(tokenizer: Any, template: str, text: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"system_prompt is {text!r}, which says nothing. Write the prompt, or leave system_prompt out."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"system_prompt holds half of a surrogate pair (U+{code:04X}). Remove it.") from None
    found = sorted(token for token in forbidden_tokens(tokenizer, template) if token in text)
    if found:
        raise ValueError(
            f"system_prompt holds {found[0]!r}, which the tokenizer reads as a special token. Take it out of the prompt."
        )


def _check_place_for_system(tokenizer: Any, template: str, origin: str, text: str) -> None:
    """Raise for a template that refuses system messages, or does not write them."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

    def render(system: str, length: int) -> str:
        messages = [{"role": "system", "content": system}, *turns[:length]]
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)

    refusal = None
    for length in (1, 2):
        try:
            written, other = render(text, length), render(text + "x", length)
        except Exception as error:  # a template is code: it may raise whatever it likes
            refusal = error
            continue
        if written != other:
            return
        raise ValueError(
            f"{origin} leaves out system messages, so system_prompt would not be read. Leave system_prompt out, or set "
            "chat_template to one that writes them."
        )
    raise ValueError(
        f"{origin} refuses a system message, so system_prompt cannot be used ({type(refusal).__name__}: {refusal}). Leave "
        "system_prompt out, or set chat_template to one that takes system messages."
    )
