"""Conversations out of the ordinary: two answers in a row, an answer first, messages and tools that the template leaves out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
from template_styles import STYLES
from test_spans_real import Messages, runs_of, tokenizer_for, trl_templates, trl_tokenizer, with_written_arguments

from hf_sft.data.chat import ChatEncoder, EncodingError, encode_conversation
from hf_sft.data.formats import Conversation

# ---- turns that do not come one by one ----

WELCOME = {"role": "assistant", "content": "Welcome"}
ONE, SECOND = {"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}
ASK = {"role": "user", "content": "Hi there"}
_TOOL = {"type": "function", "function": {"name": "add", "arguments": {"first": "zig", "second": "zag"}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [_TOOL]}
RESULT = {"role": "tool", "name": "add", "content": "zigzag"}


def learned_texts(tokenizer: Any, messages: Messages, **options: Any) -> list[str]:
    row = encode_conversation(tokenizer, messages, **options)
    return [tokenizer.decode(row["input_ids"][a:b]) for a, b in runs_of(row)]


def from_trl(name: str) -> Any:
    return trl_tokenizer(next(path for path in trl_templates() if path.stem == name).read_text(encoding="utf-8"))


needs_trl = pytest.mark.skipif(not trl_templates(), reason="trl is not installed: pip install trl")


@needs_trl
def test_no_header_is_learned_where_the_assistant_begins() -> None:
    """A first message of the assistant that begins otherwise than the prompt: with a BOS, with a default system prompt; or
    whose prompt cannot be rendered, with tags that hold some of it."""
    refused = "qwen2_5_vl llama3 gptoss_training qwen2_5_training qwen3_5_nothink_training qwen3_training".split()
    for name in refused:
        tokenizer = from_trl(name)
        with pytest.raises(EncodingError, match=r"begins with the assistant, .* train: false"):
            encode_conversation(tokenizer, [WELCOME, ASK, ONE])
        assert learned_texts(tokenizer, [{**WELCOME, "train": False}, ASK, ONE])[0].count("one") == 1
    for path in trl_templates():
        tokenizer = from_trl(path.stem)
        try:
            found = learned_texts(tokenizer, [WELCOME, ASK, ONE])
            first, second = found
        except EncodingError:
            continue
        assert first.replace("Welcome", "one") == second, path.stem  # whatever stands before the text in both


_OLMO = STYLES["olmo-2"]


@pytest.mark.parametrize("tokens", ["", "<|user|> <|assistant|> <|system|>"])
def test_no_header_is_learned_between_two_answers(tokens: str) -> None:
    """The line break before the second header is not in the prompt, which stands in the loop."""
    prompt = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    inside = _OLMO.template.replace(
        "{% endfor %}" + prompt, "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
    )
    assert inside != _OLMO.template
    tokenizer = tokenizer_for(inside, tokens.split(), _OLMO.bos, _OLMO.eos)
    assert learned_texts(tokenizer, [ASK, ONE, ASK, SECOND]) == ["one<|endoftext|>", "two<|endoftext|>"]
    messages = [ASK, ONE, SECOND]
    for options in ({}, {"train_on": "last"}):
        with pytest.raises(EncodingError, match="before message 2 does not fit the conversation's render"):
            encode_conversation(tokenizer, messages, **options)
    with pytest.raises(EncodingError, match="before message 2 does not fit the conversation's render"):
        encode_conversation(tokenizer, [ASK, {**ONE, "train": False}, SECOND])


_SPEAKERS = ["<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
_TULU = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def check_next_headers(tokenizer: Any) -> None:
    system = {"role": "system", "content": "Be rude"}
    for messages in ([ASK, ONE, SECOND], [ASK, ONE, system, ASK, SECOND]):
        with pytest.raises(EncodingError, match=r"nothing but the begin of the next message .* learn to stop"):
            encode_conversation(tokenizer, messages)
    found = learned_texts(tokenizer, [ASK, ONE, ASK, SECOND])
    assert all(text.endswith("<|user|>") for text in found)
    assert learned_texts(tokenizer, [ASK, {**ONE, "train": False}, SECOND]) == found[1:]


def test_the_next_header_ends_a_turn_only_if_the_user_speaks() -> None:
    check_next_headers(tokenizer_for(_TULU, _SPEAKERS))


@needs_trl
def test_the_next_header_ends_a_turn_of_glm_only_if_the_user_or_a_tool_speaks() -> None:
    tokenizer = from_trl("glm4moe")
    check_next_headers(tokenizer)
    for messages in ([ASK, CALL, ONE], [ASK, CALL, ASK, ONE]):
        with pytest.raises(EncodingError, match=r"nothing but the begin of the next message .* role tool"):
            encode_conversation(tokenizer, messages)
    called, answered = learned_texts(tokenizer, [ASK, CALL, RESULT, ONE])
    assert called.endswith("</tool_call><|observation|>")
    assert answered.endswith("one<|user|>")


def test_a_turn_end_that_the_next_message_brings() -> None:
    """An end of turn is one, whoever speaks next."""
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}"
    )
    assert learned_texts(tiny.tiny_tokenizer(text), [ASK, ONE, SECOND]) == ["one<|im_end|>", "two<|im_end|>"]


# ---- what a template leaves out ----

DEVELOPER = {"role": "developer", "content": "Be kind"}


def dropping(role: str, body: str = "{{ m.content }}") -> str:
    turn = f"<|im_start|>{{{{ m.role }}}}\n{body}<|im_end|>\n"
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return f"{{% for m in messages %}}{{% if m.role != '{role}' %}}{turn}{{% endif %}}{{% endfor %}}{prompt}"


# Users' texts as they are; changed, so that they are not replaced; read by the template's code.
@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content }}",
        "{{ m.content | upper if m.role == 'user' else m.content }}",
        "{% if m.role == 'user' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}",
        "{% if m.role == 'user' and m.content[0] not in 'Hq\"' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}",
    ],
)
@pytest.mark.parametrize("role", ["developer", "system", "user", "tool"])
def test_a_message_that_the_template_leaves_out(role: str, body: str) -> None:
    tokenizer = tiny.tiny_tokenizer(dropping(role, body))
    ask = {"role": "system" if role == "user" else "user", "content": 'Hi "you"'}
    messages = [ask, {"role": role, "content": "quiet"}, ONE]
    other = "as a system message" if role == "developer" else "remove the message"
    for options in ({}, {"train_on": "last"}, {"train_on": "all"}):
        with pytest.raises(EncodingError, match=rf"does not write message 1 \({role}\).*chat_template.*{other}"):
            encode_conversation(tokenizer, messages, **options)
        blank = [ask, {"role": role, "content": " "}, ONE]
        assert encode_conversation(tokenizer, blank, **options) == encode_conversation(tokenizer, [ask, ONE], **options)
    both = ChatEncoder(tokenizer).encode([Conversation(blank), Conversation(messages), Conversation(blank)])
    assert [isinstance(row, EncodingError) for row in both] == [False, True, False]  # of one shape
    assert encode_conversation(tiny.tiny_tokenizer(dropping("nobody", body)), messages)


def test_reasoning_may_be_left_out() -> None:
    tokenizer = tiny.tiny_tokenizer(dropping("nobody"))
    assert learned_texts(tokenizer, [ASK, {**ONE, "reasoning_content": "so"}]) == ["one<|im_end|>"]


def test_tools_that_the_template_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    deaf, knows = (tiny.tiny_tokenizer(before + dropping("nobody")) for before in ("", "{{ tools }}"))
    for options in ({}, {"train_on": "all"}):
        with pytest.raises(EncodingError, match="does not write the conversation's tools"):
            encode_conversation(deaf, [ASK, ONE], tools=tools, **options)
        assert encode_conversation(knows, [ASK, ONE], tools=tools, **options)
        assert encode_conversation(deaf, [ASK, ONE], tools=[], **options)
    calls: list[Any] = []
    render = ChatEncoder._render
    monkeypatch.setattr(ChatEncoder, "_render", lambda self, *args: calls.append(args) or render(self, *args))
    encoder = ChatEncoder(knows)
    several = [Conversation([{"role": "user", "content": f"question {n}"}, ONE], tools) for n in range(50)]
    assert all(not isinstance(row, EncodingError) for row in encoder.encode(several))
    assert len(calls) < 62  # one for each, and a few for their shape


# ---- arguments of tool calls as text ----


@needs_trl
@pytest.mark.parametrize("content", ["", None, "Let me see"])
def test_arguments_where_the_template_wants_text(content: str | None) -> None:
    tokenizer = from_trl("deepseekv3")
    arguments = {"city": "Zürich", "quote": 'say "x"'}
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [ASK, {"role": "assistant", "content": content, "tool_calls": [call]}, RESULT, ONE]
    wanted = with_written_arguments(messages)
    wanted[1]["content"] = content or ""
    for options in ({}, {"train_on": "all"}, {"train_on": "last"}):
        row = encode_conversation(tokenizer, messages, **options)
        assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(wanted, tokenize=False)
    called, answered = learned_texts(tokenizer, messages)
    assert json.dumps(arguments, ensure_ascii=False) in called and "Zürich" in called
    assert called.startswith(content or "<")
    assert answered.startswith("one<")
    assert messages[1]["tool_calls"][0]["function"]["arguments"] is arguments
