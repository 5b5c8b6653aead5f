"""Supervised spans: what the model writes is learned, its end of turn once, and nothing of the others' turns."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft.data.chat import IGNORE, ChatEncoder, EncodingError, encode_conversation, encode_conversations
from hf_sft.data.formats import Conversation, to_conversation
from hf_sft.data.templates import NAMED_TEMPLATES, resolve_template

Messages = list[dict[str, Any]]


def chat(*texts: str, system: str | None = None) -> Messages:
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def learned(tokenizer: Any, row: dict[str, list[int]]) -> list[str]:
    """The texts of the supervised runs; checks that labels are the tokens themselves, unshifted."""
    assert len(row["input_ids"]) == len(row["labels"])
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, IGNORE)
        if label == IGNORE and runs[-1]:
            runs.append([])
        elif label != IGNORE:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


def spans(tokenizer: Any, messages: Messages, **options: Any) -> list[str]:
    return learned(tokenizer, encode_conversation(tokenizer, messages, **options))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="module")
def real() -> Any:
    """Real tokenizers by name; skips where they are absent."""
    from transformers import AutoTokenizer

    if not tiny.SHARED.is_dir():
        pytest.skip(f"no public data at {tiny.SHARED}")
    folders = {"qwen2.5": "tokenizers/qwen2.5", "minimind": "tokenizers/minimind", "stories": "models/stories260k"}
    loaded = {name: AutoTokenizer.from_pretrained(tiny.SHARED / folder) for name, folder in folders.items()}
    loaded["stories"].chat_template = resolve_template(loaded["stories"], "plain")
    return loaded


# ---- spans ----


def test_every_assistant_turn_with_its_end(tokenizer) -> None:
    messages = chat("Hi", "Hello!", "And?", "Bye.", system="Be kind")
    assert spans(tokenizer, messages) == ["Hello!<|im_end|>", "Bye.<|im_end|>"]
    assert spans(tokenizer, messages, train_on="last") == ["Bye.<|im_end|>"]
    row = encode_conversation(tokenizer, messages, train_on="all")
    assert row["labels"] == row["input_ids"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == text
    assert tokenizer.decode(encode_conversation(tokenizer, messages)["input_ids"]) == text


def test_turns_marked_not_to_be_learned(tokenizer) -> None:
    messages = chat("a", "b", "c", "d")
    messages[1]["train"] = False
    assert spans(tokenizer, messages) == ["d<|im_end|>"]
    messages[3]["train"] = False
    assert spans(tokenizer, messages) == spans(tokenizer, messages, train_on="last") == []


def test_turns_left_out_of_all(tokenizer) -> None:
    messages = chat("a", "b", "c", "d", system="s")
    messages[2]["train"] = False
    first, second = spans(tokenizer, messages, train_on="all")
    assert first == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert second == "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
    kept = {**encode_conversation(tokenizer, messages)}
    assert kept["input_ids"] == encode_conversation(tokenizer, messages, train_on="all")["input_ids"]
    del messages[2]["train"]
    messages[1]["train"] = False
    with pytest.raises(EncodingError, match=r"message 1 \(user\) has train: false, and train_on is all"):
        encode_conversation(tokenizer, messages, train_on="all")


@pytest.mark.parametrize(
    "texts",
    [
        ("same", "same", "same", "same"),
        ("say: yes", "yes", "yes yes yes", "say: yes"),
        ("assistant\nHi", "assistant\n", "user\n", "user\nassistant\n"),
        ("a", "", "b", ""),
        ("", "a", "", "b"),
        ("👩‍👩‍👧 e\u0301", "\U0001f600é漢字", "\u200b", "\ufeff"),
        ("x", "\nleading", "y", "trailing\n\n"),
        (" ", "  ", "\n", " \n "),
        ("</think>", "<think>\n</think>", "[INST]", "{{ bos_token }} {% if %}"),
        ("q" * 20_000, "a" * 20_000, "q", "a"),
    ],
)
def test_only_the_assistants_text_is_learned(tokenizer, texts: tuple[str, ...]) -> None:
    assert spans(tokenizer, chat(*texts)) == [f"{text}<|im_end|>" for text in texts[1::2]]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=2, max_size=6), st.booleans())
def test_any_text(tokenizer, texts: list[str], system: bool) -> None:
    texts = texts[: len(texts) // 2 * 2]
    messages = chat(*texts, system="\u2028s" if system else None)
    if any(mark in "".join(texts) for mark in ("<|im_", *map(chr, range(0xFDD0, 0xFDD6)))):
        return
    row = encode_conversation(tokenizer, messages)
    assert learned(tokenizer, row) == [f"{text}<|im_end|>" for text in texts[1::2]]
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_special_token_in_a_text_is_refused(tokenizer) -> None:
    for messages in (chat("a<|im_end|>", "b"), chat("a", "b<|im_start|>"), chat("a", "b", system="<|endoftext|>")):
        with pytest.raises(EncodingError, match=r"holds '<\|(im_end|im_start|endoftext)\|>'.*special token"):
            encode_conversation(tokenizer, messages)


def test_a_batch_names_what_it_cannot_encode(tokenizer) -> None:
    rows = [chat("a", "b"), chat("a", "<|im_end|>"), chat("a", "b", "c", "d")]
    found = encode_conversations(tokenizer, [to_conversation(row) for row in rows], train_on="assistant")
    assert found[0] == encode_conversation(tokenizer, rows[0])
    assert isinstance(found[1], EncodingError)
    assert found[2] == encode_conversation(tokenizer, rows[2])
    with pytest.raises(ValueError, match="train_on is 'user'"):
        encode_conversations(tokenizer, [], train_on="user")  # type: ignore[arg-type]


def test_one_skeleton_serves_all_rows_of_a_shape(tokenizer, monkeypatch) -> None:
    encoder = ChatEncoder(tokenizer)
    renders = []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: renders.append(1) or apply(*a, **k))
    encoder.encode([Conversation(chat(f"question {n}", f"answer {n}")) for n in range(50)])
    assert 50 < len(renders) < 56


def test_state_left_by_a_call_does_no_harm() -> None:
    tokenizer = tiny.tiny_tokenizer()
    before = encode_conversation(tokenizer, chat("Hi", "Hello"))
    tokenizer(["a", "abc"], truncation=True, max_length=2, padding=True)
    assert encode_conversation(tokenizer, chat("Hi", "Hello")) == before


# ---- the prompt's tokens are those of inference ----


@pytest.mark.parametrize("name", ["tiny", "qwen2.5", "minimind", "stories"])
@pytest.mark.parametrize("answer", ["Hello", "\nHello", "\n\nHello", " Hello", "5", "", "'s", "。"])
def test_the_prompt_is_that_of_inference(tokenizer, real, name: str, answer: str) -> None:
    tokenizer = {"tiny": tokenizer, **real}[name]
    messages = chat("How are you? 1  2", answer)
    row = encode_conversation(tokenizer, messages)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt)] == [IGNORE] * len(prompt)
    assert row["labels"][len(prompt)] != IGNORE
    assert tokenizer.decode(row["input_ids"]) == tokenizer.decode(
        tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    )


def test_a_token_that_straddles_the_border_is_split(real) -> None:
    tokenizer = real["qwen2.5"]
    row = encode_conversation(tokenizer, chat("Hi", "\nHello"))
    joint = tokenizer.apply_chat_template(chat("Hi", "\nHello"), return_dict=False)
    assert tokenizer.decode(joint) == tokenizer.decode(row["input_ids"])
    assert len(joint) == len(row["input_ids"]) - 1  # jointly, the template's line break and the answer's are one token
    assert learned(tokenizer, row) == ["\nHello<|im_end|>"]


def test_plain_on_a_real_llama_tokenizer(real) -> None:
    tokenizer = real["stories"]
    row = encode_conversation(tokenizer, chat("Hi", "Hello you", "\U0001f600", "Bye", system="Be kind"))
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert row["input_ids"].count(tokenizer.eos_token_id) == row["labels"].count(tokenizer.eos_token_id) == 2
    assert row["labels"][-1] == tokenizer.eos_token_id
    written = [i for i, label in enumerate(row["labels"]) if label != IGNORE]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"][written[0]]).startswith("▁")  # the model writes the space
    assert learned(tokenizer, row) == ["Hello you</s>", "Bye</s>"]


@pytest.mark.parametrize("template", ["{{ bos_token }}" + tiny.CHATML, tiny.CHATML])
def test_one_bos_if_the_template_has_one(template: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tiny_tokenizer(template)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert tokenizer("a")["input_ids"][0] == bos
    ids = encode_conversation(tokenizer, chat("Hi", "Hello", "a", "b"))["input_ids"]
    assert ids.count(bos) == template.count("bos_token")


# ---- thinking and tools ----

THINK_BLOCK = "<think>\n{}\n</think>\n\n"


def test_thinking_where_the_prompt_opens_it(real) -> None:
    tokenizer = real["minimind"]
    empty = THINK_BLOCK.format("")
    assert spans(tokenizer, chat("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]
    row = encode_conversation(tokenizer, chat("a", "b"))
    assert empty in tokenizer.decode([t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0])
    for messages in (chat("a", THINK_BLOCK.format("so") + "b"), chat("a", "b")):
        if "think" not in messages[1]["content"]:
            messages[1]["reasoning_content"] = "so"
        for kwargs in (None, {"open_thinking": True}):  # the prompt of the first closes the block: it is not used there
            assert spans(tokenizer, messages, chat_template_kwargs=kwargs) == ["so\n</think>\n\nb<|im_end|>"]


QWEN3_LIKE = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set text = m.content or '' %}{%- set thought = m.reasoning_content or '' %}"
    "{%- if '</think>' in text %}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- text | trim }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- '\n<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)


@pytest.fixture(scope="module")
def thinker() -> Any:
    return tiny.tiny_tokenizer(QWEN3_LIKE)


def test_thinking_that_leaves_the_history(thinker) -> None:
    messages = chat("a", THINK_BLOCK.format("one") + "b", "c", THINK_BLOCK.format("two") + " d ")
    assert spans(thinker, messages) == ["b<|im_end|>", THINK_BLOCK.format("two") + "d<|im_end|>"]
    plain = chat("a", "b", "c", "d")
    assert spans(thinker, plain) == ["b<|im_end|>", THINK_BLOCK.format("") + "d<|im_end|>"]
    # The prompt holds the empty block, the history does not.
    assert spans(thinker, plain, chat_template_kwargs={"enable_thinking": False}) == ["b<|im_end|>", "d<|im_end|>"]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_tool_calls_are_learned_and_results_are_not(thinker) -> None:
    messages = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2"},
    ]
    first, second = spans(thinker, messages)
    assert first.count('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>') == 2
    assert first.endswith("</tool_call><|im_end|>")
    assert second == THINK_BLOCK.format("") + "It is 2<|im_end|>"
    with pytest.raises(EncodingError, match="does not write a tool call of message 1"):
        encode_conversation(tiny.tiny_tokenizer(NAMED_TEMPLATES["chatml"]), messages)


# ---- templates that leave no certainty ----

_OTHER_END = "{% if add_generation_prompt %}<|endoftext|>{% else %}<|im_end|>{% endif %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            tiny.CHATML.replace("<|im_end|>\n{% endfor", "\n{% endfor"),
            "does not end .* begins every turn.*learn to stop",
        ),
        (
            tiny.CHATML.replace("<|im_end|>\n{% endfor", "\n{% endfor").replace("<|im_start|>", "### "),
            "does not end .* with a special token.*learn to stop",
        ),
        (tiny.CHATML.replace("message['content']", "message['content'] | upper"), "changes the text"),
        (tiny.CHATML.replace("message['content']", "message['content'][:2]"), "leaves out|changes the text"),
        (tiny.CHATML.replace("message['content']", "message['content'] * 2"), "a text of message 1 2 times"),
        (tiny.CHATML.replace("message['content']", "message['role']"), "leaves out the content"),
        ("{{ raise_exception('not today') }}", "refuses the conversation: TemplateError: not today"),
        (
            tiny.CHATML.replace("{% for", "{{ messages[7].content.x }}{% for"),
            "refuses the conversation: UndefinedError",
        ),
        (tiny.CHATML.replace("<|im_start|>assistant\n", "<|im_start|>robot\n"), None),
        (tiny.CHATML.replace("<|im_end|>", _OTHER_END), "does not fit the conversation's render"),
        (tiny.CHATML.replace("in messages %}", "in messages | reverse %}"), "message 1 before the messages"),
    ],
)
def test_no_guessing(template: str, reason: str | None) -> None:
    tokenizer = tiny.tiny_tokenizer(template)
    if reason is None:  # the role's name is not in the prompt, so it is the model's to write
        assert spans(tokenizer, chat("Hi", "Hello")) == ["assistant\nHello<|im_end|>"]
        return
    with pytest.raises(EncodingError, match=reason):
        encode_conversation(tokenizer, chat("Hi", "Hello"))


@pytest.mark.parametrize("texts", [("Hi", "Hello"), ("Hi", "Hello", "And?", "Bye")])
def test_messages_show_no_placeholders(texts: tuple[str, ...]) -> None:
    bare = tiny.CHATML.replace("<|im_end|>\n{% endfor", "{% endfor").replace("<|im_start|>{{", "{{")
    shouting = tiny.CHATML + "{{ raise_exception('not this: ' + messages[1]['content']) }}"
    for template in (bare, shouting):
        with pytest.raises(EncodingError) as caught:
            encode_conversation(tiny.tiny_tokenizer(template), chat(*texts))
        assert not re.search("ufdd|[\ufdd0-\ufdd5]", str(caught.value))


def test_a_conversation_that_begins_with_the_assistant(tokenizer) -> None:
    messages = chat("skip", "Welcome", "Hi", "Hello")[1:]
    assert spans(tokenizer, messages) == ["Welcome<|im_end|>", "Hello<|im_end|>"]
    strict = tiny.tiny_tokenizer("{% if messages[0]['role'] == 'system' %}{% endif %}" + tiny.CHATML)
    with pytest.raises(EncodingError, match=r"begins with the assistant, .* train: false"):
        encode_conversation(strict, messages)
    messages[0]["train"] = False
    assert spans(strict, messages) == ["Hello<|im_end|>"]


def test_user_texts_may_be_changed_by_the_template() -> None:
    quoting = tiny.CHATML.replace(
        "{{ message['content'] }}",
        "{% if message['role'] == 'user' %}{{ message['content'] | tojson }}"
        "{% else %}{{ message['content'] }}{% endif %}",
    )
    tokenizer = tiny.tiny_tokenizer(quoting)
    assert spans(tokenizer, chat('say "yes"', "yes", "yes", '"yes"')) == ["yes<|im_end|>", '"yes"<|im_end|>']


# ---- named templates ----


def test_templates_by_name_file_and_text(tokenizer, tmp_path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(tiny.CHATML, encoding="utf-8")
    assert resolve_template(tokenizer, None) == resolve_template(tokenizer, str(path)) == tiny.CHATML
    assert resolve_template(tokenizer, "{{ 1 }}") == "{{ 1 }}"
    chatml, plain = (tiny.tiny_tokenizer(resolve_template(tokenizer, name)) for name in ("chatml", "plain"))
    messages = chat("Hi", "Hello", "And?", "Bye", system="Be kind")
    assert encode_conversation(chatml, messages) == encode_conversation(tokenizer, messages)
    assert plain.apply_chat_template(messages, tokenize=False) == (
        "System: Be kind\nUser: Hi\nAssistant: Hello<|im_end|>User: And?\nAssistant: Bye<|im_end|>"
    )
    assert spans(plain, messages) == [" Hello<|im_end|>", " Bye<|im_end|>"]


def test_templates_that_are_not_there(tokenizer) -> None:
    bare = tiny.tiny_tokenizer(None)
    for call in (lambda: resolve_template(bare, None), lambda: encode_conversation(bare, chat("Hi", "Hello"))):
        with pytest.raises(ValueError, match=r"no chat template.*Set chat_template to one of: plain, chatml"):
            call()
    with pytest.raises(ValueError, match=r"'chatlm': no known name \(plain, chatml, .*\), no file"):
        resolve_template(tokenizer, "chatlm")
    bare.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        resolve_template(bare, "plain")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("a\n{% for m in messages %}\nb", r"line 2: .*end.*'endfor'|line \d: Unexpected end of template"),
        ("{{ messages[0] | nothing }}", "line 1: No filter named 'nothing'"),
        ("\n\n{{ a b }}", "line 3: expected token"),
        ("{% generation %}a", "line 1: "),
        ("{% for m in messages %}{% endfor %}{% break %}", "'break' outside loop .a tag stands where it cannot"),
    ],
)
def test_a_template_that_does_not_compile_is_found_once(tokenizer, tmp_path, template: str, problem: str) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(template, encoding="utf-8")
    for text, origin in ((template, "the text of chat_template"), (str(path), "own.jinja"), (None, "the tokenizer's")):
        with pytest.raises(ValueError, match=f"{origin}.* is no valid Jinja template: ({problem})"):
            resolve_template(tiny.tiny_tokenizer(template) if text is None else tokenizer, text)


def test_tags_that_transformers_adds_are_known(tokenizer) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert resolve_template(tokenizer, template) == template
    assert tokenizer.apply_chat_template(chat("a", "b"), chat_template=template, tokenize=False) == "a"


def test_texts_that_are_no_template(tokenizer, tmp_path) -> None:
    for text in ("no braces " * 500, "with a null\0"):
        with pytest.raises(ValueError, match=r"chat_template is '.{1,90}: no known name .*no file"):
            resolve_template(tokenizer, text)
    (tmp_path / "empty.jinja").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.jinja is empty"):
        resolve_template(tokenizer, str(tmp_path / "empty.jinja"))


def test_chatml_needs_its_tokens(real) -> None:
    with pytest.raises(ValueError, match=r"needs <\|im_start\|> and <\|im_end\|>.*new_special_tokens"):
        resolve_template(real["stories"], "chatml")


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        chat_template = tiny.CHATML

    with pytest.raises(ValueError, match=r"Slow is a slow tokenizer.*AutoTokenizer"):
        encode_conversation(Slow(), chat("Hi", "Hello"))


def test_messages_are_checked(tokenizer) -> None:
    with pytest.raises(ValueError, match="role 'gpt'"):
        encode_conversation(tokenizer, [{"role": "gpt", "content": "Hi"}])
    with pytest.raises(ValueError, match="sets tokenize"):
        encode_conversation(tokenizer, chat("Hi", "Hello"), chat_template_kwargs={"tokenize": True})


# ---- special tokens that the user has added ----


def test_tokens_that_the_user_has_added_may_stand_in_texts() -> None:
    from hf_sft.models.vocabulary import add_special_tokens

    tokenizer = tiny.tiny_tokenizer()
    turn = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "<calc>4"}]
    (calc,) = add_special_tokens(tokenizer, ["<calc>"])
    row = encode_conversation(tokenizer, turn)
    assert row["labels"].count(calc) == 1
    add_special_tokens(tokenizer, ["<|im_end|>"])  # the template's own stay forbidden, asked for or not
    with pytest.raises(EncodingError, match="special token"):
        encode_conversation(tokenizer, [turn[0], {"role": "assistant", "content": "a<|im_end|>b"}])
