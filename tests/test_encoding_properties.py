"""Whatever the texts: what is learned is the assistant's text and its end of turn, letter for letter, in whatever company it is
encoded.

Each template is written here once more, as segments (text, learned); the rows must say the same.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from template_styles import STYLES

from hf_sft.data.chat import IGNORE, ChatEncoder, EncodingError, encode_conversation
from hf_sft.data.messages import Conversation
from hf_sft.data.templates import resolve_template, special_tokens

Messages = list[dict[str, Any]]
Segments = list[tuple[str, bool]]


# ---- templates, as what they write ----


def by_turns(
    head: str, tail: str, end: str, *, behind: str = "\n", trim: bool = False, bos: str = "", last: str = ""
) -> Callable:
    """Templates that write ``head.format(role)``, the content, ``end`` and what lies ``behind``; ``tail`` is the assistant's
    head."""

    def segments(messages: Messages) -> Segments:
        found = [(bos, False)]
        for message in messages:
            text = message["content"].strip() if trim else message["content"]
            answers = message["role"] == "assistant"
            found += [
                (tail if answers else head.format(message["role"]), False),
                (text + end, answers),
                (behind, False),
            ]
        return [*found, (last, False)]

    return segments


def qwen25(messages: Messages) -> Segments:
    chatml = by_turns("<|im_start|>{}\n", "<|im_start|>assistant\n", "<|im_end|>")
    default = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    has_system = messages[0]["role"] == "system"
    return chatml(messages if has_system else [{"role": "system", "content": default}, *messages])


def minimind(messages: Messages) -> Segments:
    messages = [{**m, "content": m["content"].lstrip("\n")} if m["role"] == "assistant" else m for m in messages]
    return by_turns("<|im_start|>{}\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>")(messages)


def plain(messages: Messages) -> Segments:
    names = {"system": "System", "user": "User"}
    found: Segments = []
    for message in messages:
        if message["role"] == "assistant":
            found += [("Assistant:", False), (f" {message['content']}<|im_end|>", True)]
        else:
            found.append((f"{names[message['role']]}: {message['content']}\n", False))
    return found


def mistral(messages: Messages) -> Segments:
    """The system prompt stands in the last question."""
    found: Segments = [("<s>", False)]
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    for n, message in enumerate(messages):
        if message["role"] == "user":
            in_front = system if n == len(messages) - 1 else ""
            found.append((f"[INST]{in_front}{message['content']}[/INST]", False))
        elif message["role"] == "assistant":
            found.append((f"{message['content'].strip()}</s>", True))
    return found


CHATML = by_turns("<|im_start|>{}\n", "<|im_start|>assistant\n", "<|im_end|>")
LLAMA3 = by_turns(
    "<|start_header_id|>{}<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", behind="",
    trim=True, bos="<s>",
)  # fmt: skip
GEMMA = by_turns("<start_of_turn>{}\n", "<start_of_turn>model\n", "<end_of_turn>", trim=True, bos="<bos>")
PHI3 = by_turns("<|{}|>\n", "<|assistant|>\n", "<|end|>", last="<|endoftext|>")
GLM4 = by_turns("<|{}|>\n", "<|assistant|>\n", "", behind="", bos="[gMASK]<sop>")


def glm4(messages: Messages) -> Segments:
    """The next question's token ends an answer."""
    found = GLM4(messages)
    for n, (text, learned) in enumerate(found):
        if learned:
            found[n] = (text + "<|user|>", True)
            found[n + 2 : n + 3] = [
                (following.removeprefix("<|user|>"), False) for following, _ in found[n + 2 : n + 3]
            ]
    return found


REFERENCES: dict[str, Callable[[Messages], Segments]] = {
    "chatml": CHATML, "plain": plain, "qwen2.5": qwen25, "minimind": minimind, "llama-3": LLAMA3, "gemma": GEMMA, "phi-3": PHI3,
    "mistral-tekken": mistral, "glm-4": glm4,
}  # fmt: skip


@functools.cache
def tokenizer_of(name: str) -> Any:
    if name in ("qwen2.5", "minimind"):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(tiny.SHARED / "tokenizers" / name)
    if name in ("chatml", "plain"):
        tokenizer = tiny.tiny_tokenizer()
        tokenizer.chat_template = resolve_template(tokenizer, name)
        return tokenizer
    if name == "llama-3":
        template, tokens, bos, eos = (
            "{% for m in messages %}{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + "
            "'<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
            "<|start_header_id|> <|end_header_id|> <|eot_id|>", "<s>", "<|end_of_text|>",
        )  # fmt: skip
    else:
        style = STYLES[name]
        template, tokens, bos, eos = style.template, style.tokens, style.bos, style.eos
    tokenizer = tiny.tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens.split(), "bos_token": bos, "eos_token": eos})
    return tokenizer


NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(not tiny.SHARED.is_dir(), reason=f"no public data at {tiny.SHARED}"))
    if name in ("qwen2.5", "minimind")
    else name
    for name in REFERENCES
]


# ---- texts ----

# What a careless search for borders would fall for, and what tokenizers stumble on.
ATOMS = [
    "assistant\n", "user\n", "User:", " Assistant:", "System: ", "[INST]", "[/INST]", "### Response:", "<<SYS>>", "model\n",
    "<|", "|>", "im_end", "</", "{{ x }}", "{% endif %}", "{#", "\\n", "'s", "the end", "0", "12 ", "Ünï", "é", "e\u0301",
    "\u05e9\u05dc\u05d5\u05dd", "\u202eabc\u202c", "\u0645\u0631\u062d\u0628\u0627",
    "👩‍👩‍👧", "🏳️‍🌈", "漢字", "\u200b", "\ufeff", "\u2028", "\x00", "\t", "\r\n", "\n",
    "\n\n", " ", "  ", "\u00a0", "\U0010ffff", "\ue0f00\ue0f1",
]  # fmt: skip
FOREIGN = {"mistral-tekken": ["[INST]", "[/INST]"]}


def texts(name: str) -> st.SearchStrategy[str]:
    atoms = [atom for atom in ATOMS if atom not in FOREIGN.get(name, [])]
    letters = st.text(st.characters(codec="utf-8", min_codepoint=32, max_codepoint=0x2FFF), max_size=5)
    return st.lists(st.sampled_from(atoms) | letters, max_size=6).map("".join)


@st.composite
def conversations(draw: st.DrawFn, name: str) -> Messages:
    count = 2 * draw(st.integers(1, 3))
    own = texts(name)
    messages = [{"role": "assistant" if n % 2 else "user", "content": draw(own)} for n in range(count)]
    if name not in ("gemma", "phi-3", "mistral-tekken") and draw(st.booleans()):
        messages.insert(0, {"role": "system", "content": draw(own)})
    return messages


def merged(segments: Iterable[tuple[str, bool]]) -> Segments:
    """Neighbours of one kind together, nothing empty."""
    found: Segments = []
    for text, learned in segments:
        if found and text and found[-1][1] == learned:
            found[-1] = (found[-1][0] + text, learned)
        elif text:
            found.append((text, learned))
    return found


def decoded(tokenizer: Any, row: Any) -> Segments:
    """The row as segments."""
    found: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, IGNORE)
        if not found or found[-1][1] != (label != IGNORE):
            found.append(([], label != IGNORE))
        found[-1][0].append(token)
    backend = tokenizer.backend_tokenizer
    return [(backend.decode(ids, skip_special_tokens=False), learned) for ids, learned in found]


def holds_special(tokenizer: Any, messages: Messages) -> bool:
    return any(token in message["content"] for token in special_tokens(tokenizer) for message in messages)


def usable(name: str, messages: Messages) -> bool:
    """Whether the tokenizer keeps the texts as they are; the encoder has no say in this."""
    if holds_special(tokenizer_of(name), messages):  # atoms that came together
        return False
    text = "".join(text for text, _ in REFERENCES[name](messages))
    tokenizer = tokenizer_of(name)
    return all(
        tokenizer.backend_tokenizer.decode(
            tokenizer.backend_tokenizer.encode(part, add_special_tokens=False).ids, False
        )
        == part
        for part in [text, *(message["content"] for message in messages)]
    )


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_spans_are_the_assistants_turns_and_nothing_else(name: str, data: Any) -> None:
    """Decoding what is learned gives each turn's rendered text and its end, decoding the rest gives the rest, and both in their
    order give the render."""
    messages = data.draw(conversations(name))
    if not usable(name, messages):  # a normaliser composes letters, say
        return
    tokenizer, expected = tokenizer_of(name), REFERENCES[name](messages)
    render = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = "".join(text for text, _ in expected)
    assert whole == render + ("<|user|>" if name == "glm-4" else "")
    row = encode_conversation(tokenizer, messages)
    assert decoded(tokenizer, row) == merged(expected)
    everything = encode_conversation(tokenizer, messages, train_on="all")
    assert tokenizer.backend_tokenizer.decode(everything["input_ids"], False) == render
    marked = [{**m, "train": data.draw(st.booleans())} if m["role"] == "assistant" else m for m in messages]
    kept = iter([m["train"] for m in marked if m["role"] == "assistant"])
    left = [(text, learned and next(kept)) for text, learned in merged(expected)]
    if name != "glm-4" or marked[-1]["train"]:
        assert decoded(tokenizer, encode_conversation(tokenizer, marked)) == merged(left)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_result_does_not_depend_on_the_batch(name: str, data: Any) -> None:
    """One by one, together, in any order and cut in any way, with refused ones among them."""
    tokenizer = tokenizer_of(name)
    drawn = data.draw(st.lists(conversations(name), min_size=2, max_size=6))
    end = tokenizer.eos_token
    batch = [
        Conversation(messages) for messages in [*drawn, [*drawn[0], {"role": "user", "content": f"x{end}"}], drawn[0]]
    ]

    def told(rows: list[Any]) -> list[Any]:
        return [str(row) if isinstance(row, EncodingError) else row for row in rows]

    alone = told([ChatEncoder(tokenizer).encode([one])[0] for one in batch])
    encoder = ChatEncoder(tokenizer)
    assert told(encoder.encode(batch)) == alone
    order = list(range(len(batch)))
    random.Random(data.draw(st.integers(0, 99))).shuffle(order)
    assert told(encoder.encode([batch[n] for n in order])) == [alone[n] for n in order]
    cut = data.draw(st.integers(0, len(batch)))
    assert told([*encoder.encode(batch[:cut]), *encoder.encode(batch[cut:])]) == alone
    assert isinstance(alone[-2], str)


@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_kilobytes_in_one_turn(name: str) -> None:
    tokenizer = tokenizer_of(name)
    long = "".join(random.Random(0).choices([*map(chr, range(97, 123)), " ", "\n", "é", "漢"], k=100_000)).strip()
    assert len(long.encode()) > 100_000
    for messages in (
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"{long}."}],
        [{"role": "user", "content": long}, {"role": "assistant", "content": "Hi"}],
    ):
        assert decoded(tokenizer, encode_conversation(tokenizer, messages)) == merged(REFERENCES[name](messages))


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_turns(name: str) -> None:
    messages = [{"role": "assistant" if n % 2 else "user", "content": f"text {n}"} for n in range(2_000)]
    assert decoded(tokenizer_of(name), encode_conversation(tokenizer_of(name), messages)) == merged(
        REFERENCES[name](messages)
    )


@functools.cache
def styled(name: str) -> Any:
    style = STYLES[name]
    tokenizer = tiny.tiny_tokenizer(style.template)
    tokens = {"additional_special_tokens": style.tokens.split(), "bos_token": style.bos, "eos_token": style.eos}
    tokenizer.add_special_tokens(tokens)
    return tokenizer


_SKIPS = "is empty, and the chat template|does not fit"  # a template that leaves out blank messages
REFUSED = {
    **dict.fromkeys([("text in HTML", False), ("text in HTML", True)], "changes the text"),
    **dict.fromkeys([("seed-oss", True), ("nemotron-nano-v2", True)], _SKIPS),
}
ENCODED = [
    name for name, style in STYLES.items() if style.expected("one") and style.expected("two") and name != "text as JSON"
]


@pytest.mark.parametrize("name", ENCODED)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_styles_with_any_text(name: str, data: Any) -> None:
    """What a style learns of an answer is the same whatever the texts are: no text makes a span wrong, few make it refused."""
    style, tokenizer = STYLES[name], styled(name)
    specials = [style.bos, style.eos, *style.tokens.split()]
    atoms = [atom for atom in ATOMS if not any(atom in token or token in atom for token in specials)]
    count = 2 * data.draw(st.integers(1, 2))
    own = st.lists(st.sampled_from(atoms), max_size=4).map("".join)
    messages = [{"role": "assistant" if n % 2 else "user", "content": data.draw(own)} for n in range(count)]
    if holds_special(tokenizer, messages):
        return
    try:
        row = encode_conversation(tokenizer, messages, chat_template_kwargs=style.kwargs)
    except EncodingError as error:
        blank = not all(message["content"].strip() for message in messages)
        assert (name, blank) in REFUSED
        assert re.search(REFUSED[name, blank], str(error))  # noqa: PT017  refused or not, the text decides
        return
    found = [text for text, learned in decoded(tokenizer, row) if learned]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(found) == len(answers)
    for n, (text, answer) in enumerate(zip(found, answers, strict=True)):
        pattern = style.last if style.last and n == len(answers) - 1 else style.learned
        assert text in {pattern.format(kept) for kept in (answer, answer.strip(), answer.lstrip("\n"))}
