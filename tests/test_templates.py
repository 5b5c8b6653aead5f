"""Named chat templates against the formats that their makers document, and system prompts written into templates."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from hf_sft.data.chat import IGNORE, encode_conversation
from hf_sft.data.templates import (
    NAMED_TEMPLATES,
    forbidden_tokens,
    resolve_template,
    special_tokens,
    syntax_error,
    with_system_prompt,
    without_system_prompt,
)

Messages = list[dict[str, Any]]
NAMES = tuple(NAMED_TEMPLATES)
NEEDED = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


def chat(*texts: str | None, system: str | None = None) -> Messages:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def tokenizer_for(name: str) -> Any:
    """The tiny tokenizer with <s> and </s> and the special tokens that any named template needs."""
    tokenizer = tiny.tiny_tokenizer(None)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": NEEDED})
    tokenizer.chat_template = resolve_template(tokenizer, name)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: tokenizer_for(name) for name in NAMES}


def render(tokenizer: Any, messages: Messages, prompt: bool = False, **options: Any) -> str:
    options = {"add_generation_prompt": prompt, "tokenize": False, **options}
    # transformers takes an empty conversation in a batch alone
    return (
        tokenizer.apply_chat_template(messages, **options)
        if messages
        else tokenizer.apply_chat_template([[]], **options)[0]
    )


def learned(tokenizer: Any, messages: Messages) -> list[str]:
    """The texts of the supervised runs."""
    row = encode_conversation(tokenizer, messages)
    ids, labels = row["input_ids"], row["labels"]
    assert all(label in (token, IGNORE) for token, label in zip(ids, labels, strict=True))
    borders = [n for n in range(1, len(ids) + 1) if (labels[n - 1] == IGNORE) != (n == len(ids) or labels[n] == IGNORE)]
    # What the tokens add to the text before them: some tokenizers drop the space that a text begins with.
    texts = [tokenizer.decode(ids[:border]) for border in borders]
    return [text[len(before) :] for before, text in zip(texts[::2], texts[1::2], strict=True)]


# ---- the formats ----

# One turn; two turns behind a system prompt; a question and the generation prompt.
RENDERS: dict[str, tuple[str, str, str]] = {
    "plain": (
        "<s>User: Hi\nAssistant: Hello</s>",
        "<s>System: Be kind\nUser: Hi\nAssistant: Hello</s>User: And?\nAssistant: Bye</s>",
        "<s>User: Hi\nAssistant:",
    ),
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nBye<|im_end|>\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama2": (
        "<s>[INST] Hi [/INST] Hello </s>",
        "<s>[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] And? [/INST] Bye </s>",
        "<s>[INST] Hi [/INST]",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nBye<|eot_id|>",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "vicuna": (
        f"<s>{VICUNA}USER: Hi ASSISTANT: Hello</s>",
        "<s>Be kind USER: Hi ASSISTANT: Hello</s>USER: And? ASSISTANT: Bye</s>",
        f"<s>{VICUNA}USER: Hi ASSISTANT:",
    ),
    "alpaca": (
        f"<s>{ALPACA}### Instruction:\nHi\n\n### Response:\nHello</s>",
        "<s>Be kind\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nAnd?\n\n### Response:\nBye</s>",
        f"<s>{ALPACA}### Instruction:\nHi\n\n### Response:\n",
    ),
    "zephyr": (
        "<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n",
        "<|system|>\nBe kind</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nAnd?</s>\n<|assistant|>\nBye</s>\n",
        "<|user|>\nHi</s>\n<|assistant|>\n",
    ),
    "mistral": (
        "<s> [INST] Hi [/INST] Hello</s>",
        "<s> [INST] Be kind\n\nHi [/INST] Hello</s> [INST] And? [/INST] Bye</s>",
        "<s> [INST] Hi [/INST]",
    ),
    "gemma": (
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n",
        "<s><start_of_turn>user\nBe kind\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\nBye<end_of_turn>\n",
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    ),
    "phi3": (
        "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n</s>",
        "<|system|>\nBe kind<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
        "<|user|>\nAnd?<|end|>\n<|assistant|>\nBye<|end|>\n</s>",
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
    ),
}  # fmt: skip
# What an answer begins with and ends with; and whether the family strips it.
SPANS: dict[str, tuple[str, str, bool]] = {
    "plain": (" ", "</s>", False), "chatml": ("", "<|im_end|>", False), "llama2": (" ", " </s>", True),
    "llama3": ("", "<|eot_id|>", True), "vicuna": (" ", "</s>", False), "alpaca": ("", "</s>", False),
    "zephyr": ("", "</s>", False), "mistral": (" ", "</s>", False), "gemma": ("", "<end_of_turn>", True),
    "phi3": ("", "<|end|>", False),
}  # fmt: skip


def test_the_names() -> None:
    assert NAMES == ("plain", "chatml", "llama2", "llama3", "vicuna", "alpaca", "zephyr", "mistral", "gemma", "phi3")
    assert set(RENDERS) == set(SPANS) == set(NAMES) and len(NAMED_TEMPLATES) == 10
    folder = Path(importlib.util.find_spec("hf_sft.data").submodule_search_locations[0], "chat_templates")  # type: ignore
    assert {path.stem for path in folder.glob("*")} == set(NAMES)
    assert all(syntax_error(text) is None for text in NAMED_TEMPLATES.values())
    with pytest.raises(KeyError):
        NAMED_TEMPLATES["../templates"]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_template_writes(tokenizers, name: str) -> None:
    tokenizer = tokenizers[name]
    one, two, prompt = RENDERS[name]
    assert render(tokenizer, chat("Hi", "Hello")) == one
    assert render(tokenizer, chat("Hi", "Hello", "And?", "Bye", system="Be kind")) == two
    assert render(tokenizer, chat("Hi"), prompt=True) == prompt
    developer = [{"role": "developer", "content": "Be kind"}, *chat("Hi", "Hello", "And?", "Bye")]
    if name != "chatml":  # which writes any role
        assert render(tokenizer, developer) == two
    assert render(tokenizer, chat("Hi", None)) == render(tokenizer, chat("Hi", ""))
    assert one.startswith(prompt)


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_without_bos(name: str) -> None:
    tokenizer = tiny.tiny_tokenizer(None)
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": NEEDED})
    tokenizer.chat_template = resolve_template(tokenizer, name)
    for messages, expected in zip(
        (chat("Hi", "Hello"), chat("Hi", "Hello", "And?", "Bye", system="Be kind")), RENDERS[name], strict=False
    ):
        assert render(tokenizer, messages) == expected.replace("<s>", "")


@pytest.mark.parametrize("name", ["vicuna", "alpaca"])
def test_an_empty_system_message_leaves_the_familys_own_out(tokenizers, name: str) -> None:
    own = {"vicuna": VICUNA, "alpaca": ALPACA}[name]
    assert render(tokenizers[name], chat("Hi", "Hello", system="")) == RENDERS[name][0].replace(own, "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        (chat("Hi", "Hello"), [{"name": "add"}], "no place for tools; use one that knows tools"),
        ([*chat("Hi"), {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}], None, "no place for tool calls"),
        ([*chat("Hi", "Hello"), {"role": "tool", "content": "2"}], None, "no place for a message of the role tool"),
        ([*chat("Hi", "Hello"), {"role": "critic", "content": "2"}], None, "no place for a message of the role critic"),
    ],
    ids=["tools", "tool calls", "tool results", "unknown role"],
)  # fmt: skip
def test_what_a_template_has_no_place_for(tokenizers, name: str, messages: Messages, tools: Any, reason: str) -> None:
    written = {"chatml": ("tool calls", "role tool", "role critic"), "plain": ("tool calls", "role tool")}
    if reason.endswith(written.get(name, ())):
        render(tokenizers[name], messages)
        return
    with pytest.raises(TemplateError, match=reason):
        render(tokenizers[name], messages, tools=tools)


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
def test_turns_must_alternate(tokenizers, name: str) -> None:
    for messages in (chat("a", "b")[1:], [*chat("a"), *chat("b", "c")], [*chat("a", "b"), *chat("", "c")[1:]]):
        with pytest.raises(TemplateError, match="user and assistant messages in turn"):
            render(tokenizers[name], messages)
    with pytest.raises(TemplateError, match="no place for a message of the role system"):
        render(tokenizers[name], [*chat("a", "b", system="s"), *chat("a", "b", system="s")])
    with pytest.raises(TemplateError, match="system message into the first user message, and there is none"):
        render(tokenizers[name], chat(system="s"))


@pytest.mark.parametrize("name", ["vicuna", "alpaca"])
def test_one_system_message(tokenizers, name: str) -> None:
    with pytest.raises(TemplateError, match="a place for one system message, the first"):
        render(tokenizers[name], [*chat("a", "b", system="s"), *chat("a", "b", system="s")])


# ---- what is learned ----

ANSWERS = [
    "Hello", "", " ", "\n", " leading", "trailing ", "\n\nlines\n", "\U0001f600 \u00e9 \U0001f469\u200d\U0001f467",
    "\u0633\u0644\u0627\u0645",
    "[INST] a [/INST]", "ASSISTANT: USER: ### Response:\n", "<<SYS>>", "{{ bos_token }}{% if %}", "5", "Hi",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_answer_and_its_end_are_learned(tokenizers, name: str, answer: str) -> None:
    begin, end, strips = SPANS[name]
    written = answer.strip() if strips else answer
    expected = f"{begin}{written}{end}"
    tokenizer = tokenizers[name]
    assert learned(tokenizer, chat("Hi", answer)) == [expected]
    assert learned(tokenizer, chat("Hi", answer, answer, answer, system=answer)) == [expected, expected]
    row = encode_conversation(tokenizer, chat("Hi", answer, "And?"[: len(answer)], answer))
    assert tokenizer.decode(row["input_ids"]) == render(tokenizer, chat("Hi", answer, "And?"[: len(answer)], answer))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=2, max_size=5), st.booleans())
def test_any_text_is_learned(tokenizers, texts: list[str], system: bool) -> None:
    texts = texts[: len(texts) // 2 * 2]
    messages = chat(*texts, system="s" if system else None)
    if any(mark in "".join(texts) for mark in ("\ue0f0", "</s>")):
        return
    for name, tokenizer in tokenizers.items():
        begin, end, strips = SPANS[name]
        written = [text.strip() if strips else text for text in texts[1::2]]
        assert learned(tokenizer, messages) == [f"{begin}{text}{end}" for text in written], name


REAL = {
    "qwen2.5": ("tokenizers/qwen2.5", ["chatml", "plain", "llama2", "vicuna", "alpaca", "zephyr", "mistral"]),
    "gpt-neox-20b": ("tokenizers/gpt-neox-20b", ["plain", "llama2", "vicuna", "alpaca", "zephyr", "mistral"]),
    "stories260k": ("models/stories260k", ["plain", "llama2", "vicuna", "alpaca", "zephyr", "mistral"]),
}


@pytest.mark.parametrize("model", REAL)
def test_real_tokenizers(shared_data, model: str) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder, names = REAL[model]
    path = shared_data / folder
    if (path / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(path)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), eos_token="<|endoftext|>")
    for name in names:
        tokenizer.chat_template = resolve_template(tokenizer, name, "Be kind.")
        begin, end, strips = SPANS[name]
        end = end.replace("</s>", tokenizer.eos_token)
        for answer in ANSWERS:
            written = answer.strip() if strips else answer
            messages = chat("Hi", answer, "And?", answer)
            assert learned(tokenizer, messages) == [f"{begin}{written}{end}"] * 2, (name, answer)
            row = encode_conversation(tokenizer, messages)
            text = render(tokenizer, messages)
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(row["input_ids"]) == tokenizer.decode(whole)
            prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
            assert row["input_ids"][: len(prompt)] == prompt
            if tokenizer.bos_token_id not in (None, tokenizer.eos_token_id):
                count = text.count(tokenizer.bos_token)
                assert row["input_ids"].count(tokenizer.bos_token_id) == count
                assert count == {"zephyr": 0, "llama2": 2}.get(name, 1)


# ---- against templates that come with models ----


def trl_templates() -> dict[str, str]:
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(spec.submodule_search_locations[0], "chat_templates")
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


@pytest.mark.parametrize(
    ("name", "original"), [("llama3", "llama3"), ("phi3", "phi3"), ("gemma", "gemma"), ("gemma", "gemma3")]
)
def test_originals(tokenizers, name: str, original: str) -> None:
    text = trl_templates().get(original)
    if text is None:
        pytest.skip("trl is not installed: pip install trl")
    for messages in (
        chat("Hi", "Hello"), chat(" Hi\n", "\nHello ", "And?", ""), chat("Hi", "Hello", "And?"),
        chat("Hi", "Hello", system=" Be kind "),
    ):  # fmt: skip
        if original == "gemma" and messages[0]["role"] == "system":
            continue
        for prompt in (False, True):
            expected = render(tokenizers[name], messages, prompt, chat_template=text)
            assert render(tokenizers[name], messages, prompt) == expected


# ---- which template ----


class Bare:
    """What resolve_template asks of a tokenizer."""

    eos_token = "</s>"

    def __init__(self, chat_template: Any) -> None:
        self.chat_template = chat_template


def test_a_tokenizer_with_several_templates() -> None:
    tokenizer = Bare({"default": "{{ 1 }}", "tool_use": "{{ 2 }}"})
    assert resolve_template(tokenizer, None) == resolve_template(tokenizer, "default") == "{{ 1 }}"
    assert resolve_template(tokenizer, "tool_use") == "{{ 2 }}"
    assert resolve_template(tokenizer, "{{ 3 }}") == "{{ 3 }}"
    with pytest.raises(ValueError, match=r"'rag': no known name \(plain, .*, phi3, default, tool_use\), no file"):
        resolve_template(tokenizer, "rag")
    with pytest.raises(
        ValueError, match=r"has no template 'default', only rag, .*Set chat_template to one of: rag, plain"
    ):
        resolve_template(Bare({"rag": "{{ 1 }}"}), None)
    with pytest.raises(ValueError, match="the tokenizer's chat template rag is no valid Jinja template"):
        resolve_template(Bare({"rag": "{{ 1 }"}), "rag")


@pytest.mark.parametrize("name", sorted({*NAMES} - {"chatml"}))  # the tiny tokenizer has its tokens
def test_the_tokens_that_a_template_needs(name: str) -> None:
    tokenizer = tiny.tiny_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError) as caught:
        resolve_template(tokenizer, name)
    tokenizer.add_special_tokens({"additional_special_tokens": NEEDED})
    if "eos_token" in str(caught.value):
        assert f"chat_template {name} ends each answer with the tokenizer's eos_token" in str(caught.value)
        tokenizer.eos_token = "</s>"
    else:
        assert f"chat_template {name} needs <" in str(caught.value) and "new_special_tokens: ['<" in str(caught.value)
    assert resolve_template(tokenizer, name) == NAMED_TEMPLATES[name]


# ---- system prompts in templates ----

PROMPTS = [
    "Be kind.", 'say "yes" or \'no\'', "back\\slash \\n \\", "lines\r\nand\rmore\n\n", "\U0001f600 e\u0301 \u2028 \x85 \x00",
    "{{ messages }} {% if x %} {# no #} %} }} -%}", "{% generation %}", "<think> [INST] </think> <", "[", "{", " a ",
    "\\u0041 \\N{DIGIT ONE}",
    "<|im_end", "x" * 5000, "<a>" * 500,
]  # fmt: skip
CASES = [
    [], chat("Hi"), chat("Hi", "Hello"), chat("Hi", "Hello", "And?", "Bye"), chat("Hi", "Hello", system="own"),
    chat("Hi", "Hello", system=""), [{"role": "developer", "content": "own"}, *chat("Hi", "Hello")],
]  # fmt: skip


def outcome(tokenizer: Any, messages: Messages, prompt: bool, template: str, **options: Any) -> Any:
    try:
        return render(tokenizer, messages, prompt, chat_template=template, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def check_baked(tokenizer: Any, template: str, text: str) -> None:
    baked = with_system_prompt(template, text)
    assert syntax_error(baked) is None
    assert without_system_prompt(baked) == template
    for messages in CASES:
        own = bool(messages) and messages[0]["role"] != "user"
        explicit = messages if own else chat(system=text) + messages
        for prompt in (False, True):
            assert outcome(tokenizer, messages, prompt, baked) == outcome(tokenizer, explicit, prompt, template)


@pytest.mark.parametrize("text", PROMPTS, ids=range(len(PROMPTS)))
def test_a_template_with_a_system_prompt_writes_it(tokenizers, text: str) -> None:
    for tokenizer in tokenizers.values():
        check_baked(tokenizer, tokenizer.chat_template, text)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(codec="utf-8")) | st.text(st.sampled_from("\"'\\{}%#<[]>|-+ \n\r\tnxuN0")))
def test_any_system_prompt(tokenizers, text: str) -> None:
    tokenizer = tokenizers["plain"]
    for template in (
        tokenizer.chat_template,
        "\n  {% if 1 %}\n a{% endif %}\n" + tiny.CHATML + "\n",
        NAMED_TEMPLATES["llama2"],
    ):
        check_baked(tokenizer, template, text)


MACRO = (
    "{% macro first() %}{{ messages[0].content }}{% endmacro %}"
    "{% for m in messages %}{{ loop.length }}{{ first() }}{% endfor %}"
)
SCOPES = (
    "{% set ns = namespace(a=messages) %}"
    "{% for m in messages[1:] %}{% if messages[0].content %}{{ ns.a[0].role }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template",
    [
        "  {% set x = 1 %}\n  text {{ messages | length }}",
        "\n\ntext{{ messages[0]['content'] }}\n\n", " {{ messages[0].role }} ",
        "{#- a -#}  \n{% for m in messages %}{{ m.content }}{% endfor %}", "\t{%+ if messages %}\n{% endif %}", MACRO,
        SCOPES,
        "{%- set messages = messages[1:] %}{{ messages | length }}", "",
    ],
)  # fmt: skip
def test_a_system_prompt_changes_nothing_else(tokenizers, template: str) -> None:
    check_baked(tokenizers["plain"], template, "Be\nkind")


def test_templates_that_come_with_models(tokenizers) -> None:
    templates = trl_templates()
    if not templates:
        pytest.skip("trl is not installed: pip install trl")
    for template in templates.values():
        check_baked(tokenizers["chatml"], template, 'Be "kind" <b>\n')


def test_a_system_prompt_in_use(tokenizers, tmp_path) -> None:
    tokenizer = tokenizer_for("llama3")
    once = resolve_template(tokenizer, None, "Use <b> and [c].")
    tokenizer.chat_template = once
    assert resolve_template(tokenizer, None) == resolve_template(tokenizer, None, "Use <b> and [c].") == once
    assert resolve_template(tokenizer, None, "Other") == resolve_template(tokenizers["llama3"], None, "Other")
    assert "<b>" not in once and "[c]" not in once  # no tags of the template's own
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.chat_template == once
    explicit = chat("Hi", "Hello", system="Use <b> and [c].")
    assert encode_conversation(loaded, chat("Hi", "Hello")) == encode_conversation(tokenizers["llama3"], explicit)
    unfinished = chat("Hi", "Hel")
    assert render(loaded, unfinished, continue_final_message=True).endswith("\n\nHel")
    greeting = chat("", "Hello", "Hi", "Bye")[1:]  # the prompt before it is the empty conversation's
    assert learned(loaded, greeting) == learned(tokenizers["llama3"], greeting) == ["Hello<|eot_id|>", "Bye<|eot_id|>"]


def test_a_tuple_of_messages(tokenizers) -> None:
    tokenizer = tokenizers["chatml"]
    baked = with_system_prompt(tokenizer.chat_template, "s")
    assert render(tokenizer, tuple(chat("Hi")), chat_template=baked) == render(tokenizer, chat("Hi", system="s"))  # type: ignore


def test_tokens_in_a_system_prompt() -> None:
    tokenizer = tokenizer_for("chatml")
    for token in ("<|im_end|>", "</s>", "<|eot_id|>"):
        with pytest.raises(ValueError, match=r"system_prompt holds '<.*special token. Take it out"):
            resolve_template(tokenizer, "chatml", f"End with {token}")
    from hf_sft.models.vocabulary import add_special_tokens

    add_special_tokens(tokenizer, ["<calc>"])  # the user's own may stand in it, and in the texts
    baked = resolve_template(tokenizer, "chatml", "Write <calc>")
    assert "<calc>" in special_tokens(tokenizer) - forbidden_tokens(tokenizer, baked)
    tokenizer.chat_template = baked
    assert learned(tokenizer, chat("2+2", "<calc>4")) == ["<calc>4<|im_end|>"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "system_prompt is '', which says nothing"),
        (" \n", "which says nothing"),
        (["a"], r"system_prompt is \['a'\], which says nothing"),
        ("a\ud83d", r"half of a surrogate pair \(U\+D83D\)"),
    ],
)
def test_system_prompts_that_are_refused(tokenizers, text: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        resolve_template(tokenizers["plain"], None, text)


def test_templates_without_a_place_for_it(tokenizers) -> None:
    tokenizer = tokenizers["chatml"]
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + tiny.CHATML
    with pytest.raises(
        ValueError, match=r"refuses a system message, so system_prompt cannot .*\(TemplateError: no system role\)"
    ):
        resolve_template(tokenizer, refusing, "Be kind")
    dropping = tiny.CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    with pytest.raises(
        ValueError, match="text of chat_template leaves out system messages, so system_prompt would not be read"
    ):
        resolve_template(tokenizer, dropping, "Be kind")
    default = (
        "{% if messages[0].role != 'system' %}Be kind{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert resolve_template(tokenizer, default, "Be kind") == with_system_prompt(default, "Be kind")
    with_answer = "{{ messages[2].content[0] }}" + tiny.CHATML  # cannot write a question alone
    assert resolve_template(tokenizer, with_answer, "Be kind") == with_system_prompt(with_answer, "Be kind")
