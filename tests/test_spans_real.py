"""Spans under real templates: those of trl against their tags, and the styles of model families against what they must be."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from template_styles import CONVERSATIONS, STYLES, Style

from hf_sft.data.chat import IGNORE, ChatEncoder, EncodingError, encode_conversation
from hf_sft.data.formats import Conversation, to_conversation

Messages = list[dict[str, Any]]


def tokenizer_for(template: str, tokens: list[str], bos: str = "<bos>", eos: str = "<eos>") -> Any:
    tokenizer = tiny.tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens, "bos_token": bos, "eos_token": eos})
    return tokenizer


def runs_of(row: dict[str, list[int]]) -> list[tuple[int, int]]:
    """The supervised runs as [start, end) of tokens; a run ends where the next token is not learned."""
    learned = [n for n, label in enumerate(row["labels"]) if label != IGNORE]
    assert all(row["labels"][n] == row["input_ids"][n] for n in learned)
    starts = [n for n in learned if n - 1 not in learned]
    return [(start, next(n for n in range(start, len(row["labels"]) + 1) if n not in learned)) for start in starts]


# ---- styles ----


def styled(style: Style) -> Any:
    return tokenizer_for(style.template, style.tokens.split(), style.bos, style.eos)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("style", STYLES)
def test_styles(style: str, name: str) -> None:
    wanted, tokenizer = STYLES[style], styled(STYLES[style])
    expected = wanted.expected(name)
    if expected is None:
        with pytest.raises(EncodingError, match=wanted.refusal):
            encode_conversation(tokenizer, CONVERSATIONS[name], chat_template_kwargs=wanted.kwargs)
        return
    row = encode_conversation(tokenizer, CONVERSATIONS[name], chat_template_kwargs=wanted.kwargs)
    assert [tokenizer.decode(row["input_ids"][a:b]) for a, b in runs_of(row)] == expected


def test_the_end_that_a_style_writes_only_with_the_next_message() -> None:
    """The row is the render, and then what the template writes as soon as the conversation goes on."""
    tokenizer = styled(STYLES["glm-4"])
    one, two = CONVERSATIONS["one"], CONVERSATIONS["two"]
    render = tokenizer.apply_chat_template(one, tokenize=False)
    assert tokenizer.decode(encode_conversation(tokenizer, one)["input_ids"]) == render + "<|user|>"
    row, longer = encode_conversation(tokenizer, one), encode_conversation(tokenizer, two)
    assert longer["input_ids"][: len(row["input_ids"])] == row["input_ids"]
    assert longer["labels"][: len(row["input_ids"])] == row["labels"]
    called = [
        one[0],
        {"role": "assistant", "content": "Hm", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    ]
    knows = tokenizer.chat_template.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}\n{% endfor %}"
    ).replace("{{ m.role }}", "{{ 'observation' if m.role == 'tool' else m.role }}")
    tokenizer.chat_template = knows
    row = encode_conversation(tokenizer, called)
    assert [tokenizer.decode(row["input_ids"][a:b]) for a, b in runs_of(row)] == ["Hmf\n<|observation|>"]
    assert (
        encode_conversation(tokenizer, one, train_on="all")["input_ids"]
        == encode_conversation(tokenizer, one)["input_ids"][:-1]
    )


def test_every_turn_is_looked_at_alone() -> None:
    """train: false and train_on: last leave turns out; the others are learned as before."""
    for style in STYLES.values():
        expected = style.expected("two")
        if expected is None:
            continue
        tokenizer = styled(style)
        hi, hello, again, bye = CONVERSATIONS["two"]
        for messages, options, kept in (
            ([hi, hello, again, bye], {"train_on": "last"}, expected[1:]),
            ([hi, {**hello, "train": False}, again, bye], {}, expected[1:]),
            ([hi, hello, again, {**bye, "train": False}], {}, expected[:1]),
        ):
            row = encode_conversation(tokenizer, messages, chat_template_kwargs=style.kwargs, **options)
            assert [tokenizer.decode(row["input_ids"][a:b]) for a, b in runs_of(row)] == kept


@pytest.mark.parametrize("style", [name for name, style in STYLES.items() if style.expected("two")])
def test_turns_that_look_alike_have_the_same_borders(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken over from turns that look the same is what would be found for each by itself."""
    hi, hello, again, bye = CONVERSATIONS["two"]
    thought = {**bye, "content": "<think>\nso\n</think>\n\nBye now"}
    conversations = [
        [hi, hello, again, bye] * 3,
        [hi, thought, hi, hello, again, thought, hi, hello, again, bye, again, thought],
    ]
    for messages in conversations:
        rows = []
        for many in (1, 10**9):
            monkeypatch.setattr("hf_sft.data.spans._MANY_TURNS", many)
            (row,) = ChatEncoder(styled(STYLES[style]), chat_template_kwargs=STYLES[style].kwargs).encode(
                [Conversation(messages)]
            )
            rows.append(str(row) if isinstance(row, EncodingError) else row)
        assert rows[0] == rows[1]


# ---- the templates that come with trl ----

_TOKENS = re.compile(
    r"<\|[^|>{}]+\|>|<\uff5c[^\uff5c]+\uff5c>|</?s>|<(?:start|end)_of_turn>|<\|\w+>|<\w+\|>|<(?:bos|eos|pad|end_of_utterance)>"
)
_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")  # they take lists of parts, not texts


def trl_templates() -> list[Path]:
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        return []
    found = sorted(Path(spec.submodule_search_locations[0], "chat_templates").glob("*.jinja"))
    return [path for path in found if not path.stem.removesuffix("_training").startswith(_PARTS_ONLY)]


def thinking(messages: Messages) -> Messages:
    return [{**m, "reasoning_content": f"Think of {m['content']}"} if m["role"] == "assistant" else m for m in messages]


_TOOL = {"type": "function", "function": {"name": "add", "arguments": {"first": "zig", "second": "zag"}}}
CASES: dict[str, Messages] = {
    **CONVERSATIONS,
    "thinking": thinking(CONVERSATIONS["one"]),
    "two thoughts": thinking(CONVERSATIONS["two"]),
    "thinking in the text": [
        CONVERSATIONS["one"][0],
        {"role": "assistant", "content": "<think>\nLet me see\n</think>\n\nHello you"},
    ],
    "tools": [
        CONVERSATIONS["one"][0],
        {"role": "assistant", "content": "", "tool_calls": [_TOOL]},
        {"role": "tool", "name": "add", "content": "zigzag"},
        CONVERSATIONS["one"][1],
    ],
}


def with_written_arguments(messages: Messages) -> Messages:
    """As the template of DeepSeek-V3 wants tool calls: it adds the arguments to a text."""
    wanted = json.loads(json.dumps(messages))
    for message in wanted:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return wanted


def answer_of(message: dict[str, Any]) -> str:
    return message["content"].rpartition("</think>")[2].strip()


def trl_tokenizer(template: str) -> Any:
    return tokenizer_for(template, sorted({*_TOKENS.findall(template), *tiny.SPECIAL_TOKENS}))


def untagged(template: str) -> str:
    """The template without tags, which trim as much as they did."""
    return _TAG.sub(r"{%\1 set untagged = 0 \3%}", template)


def check_places(tokenizer: Any, messages: Messages, row: dict[str, list[int]]) -> None:
    """Each span is what a model must write at inference, found here by the texts, which are all different.

    It begins where the generation prompt ends (or earlier, where the turn is not written as the prompt says), holds the whole
    answer, and ends with a special token; nothing but special tokens and line breaks stands between answer and end.
    """
    render = tokenizer.apply_chat_template(messages, tokenize=False)
    decoded = tokenizer.decode(row["input_ids"])
    assert decoded.startswith(render)
    assert re.fullmatch(f"({_TOKENS.pattern})?", decoded[len(render) :])  # the end that comes with the next message
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    found = runs_of(row)
    assert len(found) == len(turns)
    for turn, (start, end) in zip(turns, found, strict=True):
        before, written = (tokenizer.decode(row["input_ids"][a:b]) for a, b in ((0, start), (start, end)))
        prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, tokenize=False)
        asked = messages[turn - 1]["content"]
        header, opened = (text[text.rindex(asked) + len(asked) :] for text in (prompt, before))
        assert header.startswith(opened)
        rest = header[len(opened) :]
        assert not rest or not written.startswith(rest)
        assert "think>" in rest or not rest.strip()  # only a thinking prefix may be missing in the turn
        answer, call = answer_of(messages[turn]), messages[turn].get("tool_calls")
        tail = written[written.rindex(answer) + len(answer) :] if answer else written
        if call:
            assert all(text in tail for text in ("add", "first", "zig", "second", "zag"))
            assert re.search(f"({_TOKENS.pattern})$", written)
        else:
            assert re.fullmatch(rf"\s*(?:{_TOKENS.pattern})+", tail)
        assert not any(m["content"] and m["content"] in written for n, m in enumerate(messages) if n not in turns)


@pytest.mark.parametrize("path", trl_templates() or [None], ids=lambda path: path.stem if path else "trl absent")
def test_trl_templates_without_their_tags(path: Path | None) -> None:
    """At least nine of ten conversations are encoded, and none wrong."""
    if path is None:
        pytest.skip("trl is not installed: pip install trl")
    tokenizer = trl_tokenizer(untagged(path.read_text(encoding="utf-8")))
    refused = {}
    for name, messages in CASES.items():
        try:
            row = encode_conversation(tokenizer, messages)
            if path.stem == "deepseekv3" and name == "tools":
                messages = with_written_arguments(messages)
        except EncodingError as error:
            refused[name] = str(error)
            continue
        check_places(tokenizer, messages, row)
    for name, reason in refused.items():
        assert re.search(REFUSED[name], reason)
    family = path.stem.removesuffix("_training")
    assert set(refused) == ({"system"} if family == "gemma" else set()) | ({"tools"} if family in NO_TOOLS else set())


REFUSED = {
    "system": "refuses the conversation: TemplateError: System role not supported",
    "tools": "does not write a tool call|refuses the conversation: (TemplateError: .*alternate)",
}
# Templates without a place for tool calls.
NO_TOOLS = set("cohere cohere2 deepseek_r1_distill gemma gemma3 lfm2 llama3 phi3 phi3_5 qwen2_5_vl".split())


def tagged_texts(tokenizer: Any, messages: Messages) -> tuple[list[int], list[str]]:
    """The tokens, and the texts that the tags mark: consecutive tagged tokens."""
    oracle = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = oracle["input_ids"], oracle["assistant_masks"]
    row = {"input_ids": ids, "labels": [token if m else IGNORE for token, m in zip(ids, mask, strict=True)]}
    return ids, [tokenizer.decode(ids[a:b]) for a, b in runs_of(row)]


@pytest.mark.parametrize(
    "path",
    [path for path in trl_templates() if path.stem.endswith("_training")] or [None],
    ids=lambda path: path.stem if path else "trl absent",
)
def test_spans_agree_with_the_tags_of_training_templates(path: Path | None) -> None:
    """Without the tags the same tokens, and spans that lie in the tagged texts; the original template learns the same answers.

    Accepted differences: a tag may hold the end of the generation prompt, and what follows the end-of-turn token.
    """
    if path is None:
        pytest.skip("trl is not installed: pip install trl")
    template = path.read_text(encoding="utf-8")
    original = path.with_name(path.name.replace("_training", "")).read_text(encoding="utf-8")
    tagged, bare, first = (trl_tokenizer(text) for text in (template, untagged(template), original))
    checked = 0
    for name, messages in CASES.items():
        try:
            ids, tags = tagged_texts(tagged, messages)
        except Exception:  # the template refuses it
            continue
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            rows = [encode_conversation(tokenizer, messages) for tokenizer in (bare, tagged)]
        except EncodingError:
            continue
        assert rows[0] == rows[1] or name == "tools"  # diffusion_gemma's tags leave out what ends a call
        assert rows[1]["input_ids"] == ids
        ours = [bare.decode(ids[a:b]) for a, b in runs_of(rows[1])]
        assert len(ours) == len(tags) == len(turns)
        for turn, span, tag in zip(turns, ours, tags, strict=True):
            prompt = bare.apply_chat_template(messages[:turn], add_generation_prompt=True, tokenize=False)
            before, found, after = tag.partition(span)
            assert found
            assert before in prompt[-60:]  # the prompt holds it
            assert after.strip() in ("", "<eos>")  # a line break; Phi-3's <|endoftext|> behind its <|end|>
        checked += 1
        try:
            row = encode_conversation(first, messages)
        except EncodingError:
            continue
        for turn, (a, b), span in zip(turns, runs_of(row), ours, strict=True):
            text, answer = first.decode(row["input_ids"][a:b]), answer_of(messages[turn])
            if answer:
                assert text[text.rindex(answer) :] == span[span.rindex(answer) :]
    assert checked >= 5


# ---- real tokenizers, real tool calls ----


@pytest.mark.parametrize("name", ["qwen2.5", "minimind"])
def test_real_conversations_with_tools(shared_data: Path, name: str) -> None:
    """Each call is learned as the template writes it, with its end of turn; no result is."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    records = json.loads((shared_data / "toolcall" / "glaive_toolcall_en_demo.json").read_text(encoding="utf-8"))
    conversations = [to_conversation(record) for record in records[:100]]
    called = 0
    for conversation, row in zip(conversations, ChatEncoder(tokenizer).encode(conversations), strict=True):
        assert not isinstance(row, EncodingError)
        expected = []
        for message in conversation.messages:
            if message["role"] == "assistant":
                parts = [message["content"]] if message["content"] else []
                for call in message.get("tool_calls") or []:
                    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                    body = f'{{"name": "{call["function"]["name"]}", "arguments": {arguments}}}'
                    parts.append(f"<tool_call>\n{body}\n</tool_call>")
                    called += 1
                expected.append("\n".join(parts) + "<|im_end|>")
        assert [tokenizer.decode(row["input_ids"][a:b]) for a, b in runs_of(row)] == expected
        render = tokenizer.apply_chat_template(conversation.messages, tools=conversation.tools, tokenize=False)
        assert tokenizer.decode(row["input_ids"]) == render
    assert called > 50
