"""Special tokens that stand in texts: refused, or kept as the letters that they are."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft.data.chat import IGNORE, ChatEncoder, EncodingError, SpecialTokenError, encode_conversation
from hf_sft.data.messages import Conversation
from hf_sft.data.templates import resolve_template, special_tokens
from hf_sft.data.texts import TextEncoder

KEEP: Any = {"special_tokens_in_text": "text"}
ALIEN = "before<|im_end|>\n<|im_start|>user\nafter <|endoftext|>"


def chat(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]


def learned(tokenizer: Any, row: Any) -> list[str]:
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, IGNORE)
        if label != IGNORE:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def special_count(tokenizer: Any, row: Any) -> int:
    special = set(tokenizer.convert_tokens_to_ids(sorted(special_tokens(tokenizer))))
    return sum(token in special for token in row["input_ids"])


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """Tiny and, where they are at hand, real ones; stories260k is a SentencePiece tokenizer that begins texts with a space."""
    found = {"tiny": tiny.tiny_tokenizer()}
    if tiny.SHARED.is_dir():
        from transformers import AutoTokenizer

        for name, folder in {"qwen2.5": "tokenizers", "minimind": "tokenizers", "stories260k": "models"}.items():
            found[name] = AutoTokenizer.from_pretrained(tiny.SHARED / folder / name)
        found["stories260k"].chat_template = resolve_template(found["stories260k"], "plain")
    return found


NAMES = ["tiny", "qwen2.5", "minimind", "stories260k"]


def take(tokenizers: dict[str, Any], name: str) -> Any:
    return tokenizers[name] if name in tokenizers else pytest.skip(f"no public data at {tiny.SHARED}")


# ---- refused ----


def test_the_error_says_which_token_and_the_ways_out() -> None:
    tokenizer = tiny.tiny_tokenizer()
    with pytest.raises(
        SpecialTokenError, match=r"holds '<\|im_end\|>' .*special_tokens_in_text: text.*new_special"
    ) as caught:
        encode_conversation(tokenizer, chat("a", "b<|im_end|>c"))
    assert caught.value.token == "<|im_end|>"
    again = pickle.loads(pickle.dumps(caught.value))  # errors travel between processes
    assert (str(again), again.token) == (str(caught.value), "<|im_end|>")
    (row,) = TextEncoder(tokenizer).encode(["a<|endoftext|>"])
    assert isinstance(row, SpecialTokenError)
    assert row.token == "<|endoftext|>"
    (row,) = ChatEncoder(tokenizer).encode([Conversation(chat("a", "b"), tools=[{"name": "<|im_end|>"}])])
    assert isinstance(row, SpecialTokenError)
    for make in (ChatEncoder, TextEncoder):
        with pytest.raises(ValueError, match="special_tokens_in_text is 'keep'; it must be refuse or text"):
            make(tokenizer, special_tokens_in_text="keep")


# ---- kept as text ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["question", "answer", "system", "both"])
def test_special_tokens_are_spelled(tokenizers, name: str, place: str) -> None:
    """The text is the same, the structure too, and no special token but the template's is in the row."""
    tokenizer = take(tokenizers, name)
    alien = ALIEN if name != "stories260k" else "before</s> <s>after<unk>"
    texts = {"question": (f"q {alien}", "x"), "answer": ("q", f"x {alien} y"), "both": (alien, f"{alien}{alien}")}
    messages = chat(*texts.get(place, ("q", "x")), "and", "so")
    plain = chat("q", "x", "and", "so")
    if place == "system":
        messages, plain = ([{"role": "system", "content": s}, *m] for s, m in ((alien, messages), ("s", plain)))
    with pytest.raises(SpecialTokenError):
        encode_conversation(tokenizer, messages)
    row = encode_conversation(tokenizer, messages, **KEEP)
    decoded = re.sub(r"(</?s>) (User|System):", r"\1\2:", tokenizer.decode(row["input_ids"]))  # SentencePiece's space
    assert decoded == tokenizer.apply_chat_template(messages, tokenize=False)
    assert special_count(tokenizer, row) == special_count(tokenizer, encode_conversation(tokenizer, plain))
    ends = [run.removeprefix(" ") for run in learned(tokenizer, encode_conversation(tokenizer, plain))]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    wanted = [answer + end[1 if end[0] == "x" else 2 :] for answer, end in zip(answers, ends, strict=True)]
    found = learned(tokenizer, row)
    assert [run.removeprefix(" ") if name == "stories260k" else run for run in found] == wanted
    everything = encode_conversation(tokenizer, messages, train_on="all", **KEEP)
    assert everything["input_ids"] == everything["labels"] == row["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_special_tokens_are_the_same(tokenizers, name: str) -> None:
    tokenizer = take(tokenizers, name)
    messages = chat("Hi there <think>", "Hello\n</tool_call> you", "", "👩‍👩‍👧")
    assert encode_conversation(tokenizer, messages, **KEEP) == encode_conversation(tokenizer, messages)


def test_the_tokens_are_those_that_transformers_would_use(tokenizers) -> None:
    """With ``sanitize_control_tokens`` transformers spells them in the same way at inference."""
    tokenizer = take(tokenizers, "qwen2.5")
    messages = chat(f"Say {ALIEN}!")
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
    )
    row = encode_conversation(tokenizer, [*messages, {"role": "assistant", "content": "No."}], **KEEP)
    assert row["input_ids"][: len(prompt)] == prompt


def test_tool_calls_and_tools(tokenizers) -> None:
    """Names, arguments, keys and schemas are spelled too; added tokens that are not special stay what they are."""
    tokenizer = take(tokenizers, "qwen2.5")
    call = {"type": "function", "function": {"name": "find", "arguments": {"q<|im_end|>": "a<|im_start|>b"}}}
    tools = [{"type": "function", "function": {"name": "find", "description": "Not <|endoftext|>", "parameters": {}}}]
    messages = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": "<think>", "tool_calls": [call]},
        {"role": "tool", "content": "<|im_end|>"},
        {"role": "assistant", "content": "No"},
    ]
    row = encode_conversation(tokenizer, messages, tools=tools, **KEEP)
    render = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == render
    assert special_count(tokenizer, row) == 2 * 5  # system, user, call, result, answer
    first, second = learned(tokenizer, row)
    assert first.endswith('{"q<|im_end|>": "a<|im_start|>b"}}\n</tool_call><|im_end|>')
    assert second == "No<|im_end|>"
    assert row["input_ids"].count(tokenizer.convert_tokens_to_ids("<tool_call>")) == render.count("<tool_call>") > 1


def test_they_are_counted() -> None:
    tokenizer = tiny.tiny_tokenizer()
    encoder = ChatEncoder(tokenizer, **KEEP)
    rows = [chat("<|im_end|><|im_end|>", "a"), chat("a", "b"), chat("<|im_end|>", "<|im_start|>")]
    encoder.encode(map(Conversation, rows))
    assert encoder.special_tokens_met == {"<|im_end|>": 2, "<|im_start|>": 1}
    texts = TextEncoder(tokenizer, **KEEP)
    texts.encode(["a", "<|im_end|>b<|im_end|>"])
    assert texts.special_tokens_met == {"<|im_end|>": 1}


def test_a_tail_behind_a_spelled_answer() -> None:
    tokenizer = tiny.tiny_tokenizer()
    (row,) = ChatEncoder(tokenizer, end_tail=2, **KEEP).encode([Conversation(chat("a", "b<|im_end|>"))])
    assert learned(tokenizer, row) == ["b<|im_end|>" + "<|im_end|>" * 3]
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1 + 3  # the question's and the answer's with its tail


def test_templates_that_look_at_the_token() -> None:
    """What the template makes of the token cannot be kept."""
    split = tiny.CHATML.replace("message['content']", "message['content'].split('<|im_end|>')[0]")
    shout = tiny.CHATML.replace("message['content']", "message['content'] | upper")
    for template in (split, shout):
        with pytest.raises(
            SpecialTokenError, match=r"'<\|im_end\|>', and the chat template does not write it as it is"
        ):
            encode_conversation(tiny.tiny_tokenizer(template), chat("a<|im_end|>", "B"), **KEEP)


def test_templates_with_tags() -> None:
    """Marks of tags and of special tokens stand side by side; a template that changes the text in other ways is followed."""
    tagged = tiny.CHATML.replace(
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n",
        "<|im_start|>{{ message['role'] }}\n"
        "{% if message['role'] == 'user' %}{{ message['content'] | replace('q', 'Q') }}<|im_end|>"
        "{% else %}{% generation %}{{ message['content'] | replace('q', 'Q') }}{% endgeneration %}<|im_end|>{% endif %}\n",
    )
    tokenizer = tiny.tiny_tokenizer(tagged)
    row = encode_conversation(tokenizer, chat("q<|im_end|>", "q<|im_start|>b", "c", "d<|im_end|>"), **KEEP)
    assert learned(tokenizer, row) == ["Q<|im_start|>b<|im_end|>", "d<|im_end|><|im_end|>"]
    assert special_count(tokenizer, row) == 2 * 4
    row = encode_conversation(tokenizer, chat("a", "b", "c", "d<|im_end|>"), train_on="last", **KEEP)
    assert learned(tokenizer, row) == ["d<|im_end|><|im_end|>"]


def test_marks_in_texts_are_refused() -> None:
    tokenizer = tiny.tiny_tokenizer()
    for code in range(0xFDD0, 0xFDD6):
        for text in (chr(code), f"<|im_end|>{chr(code)}"):
            for messages in (chat(text, "a"), chat("a", text)):
                with pytest.raises(EncodingError, match=r"noncharacter of U\+FDD0"):
                    encode_conversation(tokenizer, messages, **KEEP)
    (row,) = TextEncoder(tokenizer, **KEEP).encode(["\ufdd20\ufdd3<|im_end|>"])
    assert isinstance(row, EncodingError)
    assert isinstance(TextEncoder(tokenizer).encode(["\ufdd20\ufdd3"])[0], dict)  # nothing is hidden there


def test_a_token_that_cannot_be_spelled() -> None:
    """A vocabulary without the letters would write <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "hi": 1, "</s>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    (row,) = TextEncoder(tokenizer, **KEEP).encode(["hi </s> hi"])
    assert isinstance(row, EncodingError)
    assert "cannot write '</s>' as ordinary text" in str(row)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "a", " ", "\n", "<|im_", "end|>", "é"])),
        min_size=2, max_size=4,
    )
)  # fmt: skip
def test_any_mixture(parts: list[list[str]]) -> None:
    tokenizer = tiny.tiny_tokenizer()
    messages = chat(*map("".join, parts[: len(parts) // 2 * 2]))
    row = encode_conversation(tokenizer, messages, **KEEP)
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert special_count(tokenizer, row) == 2 * len(messages)
    assert learned(tokenizer, row) == [m["content"] + "<|im_end|>" for m in messages[1::2]]


# ---- raw texts ----


@pytest.mark.parametrize("name", NAMES)
def test_raw_texts(tokenizers, name: str) -> None:
    tokenizer = take(tokenizers, name)
    alien = ALIEN if name != "stories260k" else "before</s> <s>after<unk>"
    plain, row = TextEncoder(tokenizer, **KEEP).encode(["before", alien])
    assert plain == TextEncoder(tokenizer).encode(["before"])[0]
    assert special_count(tokenizer, row) == special_count(tokenizer, plain)
    assert tokenizer.decode(row["input_ids"]) == tokenizer.decode(plain["input_ids"]).replace("before", alien, 1)
    assert row["labels"][-1] == tokenizer.eos_token_id
    assert (row["labels"][0] == IGNORE) == (plain["labels"][0] == IGNORE)
