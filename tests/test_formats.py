"""Recognising conversations."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft.data.files import read_records
from hf_sft.data.formats import DATA_FORMATS, FORMATS, FormatError, check_template_kwargs, to_conversation

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


# ---- conversations ----


@pytest.mark.parametrize(
    "record",
    [
        TURNS,
        {"messages": TURNS, "id": 7},
        {"prompt": "Hi", "generation": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"question": "Hi", "answer": "Hello"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"messages": [{**turn, "tool_calls": None, "name": None} for turn in TURNS], "tools": None},
    ],
)
def test_known_formats(record) -> None:
    conversation = to_conversation(record)
    assert conversation.messages == TURNS
    assert conversation.tools is None
    assert conversation.template_kwargs is None
    assert to_conversation(conversation) is conversation


def test_only_the_completion_is_learned() -> None:
    conversation = to_conversation({"prompt": [*TURNS, TURNS[0]], "completion": TURNS[1:]})
    assert [message.get("train") for message in conversation.messages] == [None, False, None, None]


def test_tools_and_template_variables_and_other_keys_pass() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    turns = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]
    turns += [{"role": "tool", "content": "2", "name": "add"}, {**TURNS[1], "reasoning_content": "so"}]
    record = {"messages": turns, "tools": json.dumps(tools), "chat_template_kwargs": {"enable_thinking": False}}
    conversation = to_conversation(record)
    assert conversation.messages == turns
    assert conversation.tools == tools
    assert conversation.template_kwargs == {"enable_thinking": False}


def with_turn(**changes) -> list:
    return [TURNS[0], {**TURNS[1], **changes}]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"story": "abc"}, r"no known format: an object with 'story'; known are .*messages.*question/answer"),
        ("abc", "no known format: abc"),
        (7, "no known format: 7"),
        ([], "no messages"),
        ({"messages": []}, "no messages"),
        ({"messages": "Hi"}, "messages is str Hi, but it must be a list"),
        (TURNS[:1], "no assistant turn"),
        (["Hi", "Hello"], "message 0 is str Hi"),
        (with_turn(role="gpt"), "message 1 has the role 'gpt'; known are system, developer, user, assistant, tool"),
        (with_turn(role=None), "message 1 has the role None"),
        (with_turn(content=7), "content of message 1 is int 7, but it must be a string"),
        (with_turn(content={"text": "a"}), "content of message 1 is dict"),
        (with_turn(content=[{"type": "image"}]), "part 0 of message 1 is of type 'image', but only text is supported"),
        (with_turn(content=["a"]), "part 0 of message 1 is a, but only text"),
        (with_turn(content=[{"type": "text", "text": 1}]), "part 0 of message 1 is int 1"),
        (with_turn(content=[]), r"message 1 \(assistant\) has no content"),
        (with_turn(role=["assistant"]), r"message 1 has the role \['assistant'\]"),
        (with_turn(role="\ud83d"), r"the role '\\ud83d'"),
        (with_turn(weight=0.5), "weight of message 1 is 0.5; it must be 0"),
        (with_turn(tool_calls=[{"function": {"arguments": {}}}]), "tool call 0 of message 1 has no name"),
        (with_turn(tool_calls=[{"name": "add", "arguments": "x"}]), "arguments of tool call 0 of .* no JSON"),
        (
            with_turn(tool_calls=[{"name": "add", "arguments": "[1]"}]),
            r"arguments of tool call 0 of message 1 is \[1\]",
        ),
        (with_turn(tool_calls=[{"name": "a"}], function_call={"name": "a"}), "both tool_calls and function_call"),
        ([{**TURNS[0], "tool_calls": [{"name": "a"}]}, TURNS[1]], r"message 0 \(user\) has tool_calls"),
        ({"messages": "[{'role': 'user'}]"}, "no JSON.*Python's own notation.*json.dumps"),
        ({"messages": "[1"}, "messages is a string that is no JSON"),
        (
            {"messages": [{"role": "system", "content": "a"}, *TURNS], "system": "b"},
            "begin with another system prompt, a;",
        ),
        ({"question": "a", "answer": "b", "system": 1}, "system is int 1"),
        ({"messages": TURNS, "functions": [1]}, "tools is .*must be a list of function schemas"),
        (with_turn(content=None), r"message 1 \(assistant\) has no content"),
        (with_turn(content="\ud83d"), r"half of a surrogate pair \(U\+D83D\)"),
        (with_turn(reasoning_content=1), "reasoning_content of message 1 is int 1"),
        (with_turn(tool_calls="add()"), "tool_calls of message 1"),
        (with_turn(train="yes"), "train of message 1"),
        ([{**TURNS[0], "train": True}, TURNS[1]], r"train of message 0 \(user\)"),
        ({"question": 1, "answer": "2"}, "question is int 1"),
        ({"question": "a", "answer": None}, "^answer is null, but question/answer needs"),
        ({"messages": None, "prompt": "a", "completion": None}, "^completion is null, but prompt/completion"),
        ({"question": None, "answer": None}, "^question and answer are null"),
        ({"messages": None}, "^messages is null"),
        ({"prompt": "a", "completion": TURNS[1:]}, "both be strings or both be lists"),
        ({"messages": TURNS, "tools": "{"}, "tools is a string that is no JSON"),
        ({"messages": TURNS, "tools": ["add"]}, "tools is .*must be a list of function schemas"),
        ({"messages": TURNS, "chat_template_kwargs": [1]}, "chat_template_kwargs is .*must be an object"),
        ({"messages": TURNS, "chat_template_kwargs": {"tokenize": True}}, "sets tokenize, which cannot be changed"),
    ],
)
def test_what_is_wrong_is_said(record, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        to_conversation(record)


def test_template_variables() -> None:
    assert check_template_kwargs(None) is check_template_kwargs({}) is None
    assert check_template_kwargs({"a": 1}) == {"a": 1}


def test_texts_are_for_pretraining() -> None:
    for data_format in ("auto", "text"):
        with pytest.raises(FormatError, match="plain text, which task_type pretrain reads"):
            to_conversation({"text": "once upon a time"}, data_format)


# ---- shapes that readers and APIs give messages ----


@pytest.mark.parametrize(
    "given",
    [
        json.dumps(TURNS), f" {json.dumps(TURNS, indent=1)}\n", tuple(TURNS), np.array(TURNS, dtype=object),
        [{**TURNS[0], "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i", "image": None}]}, TURNS[1]],
        [{**TURNS[0], "content": np.array([{"type": "text", "text": "Hi"}], dtype=object)}, TURNS[1]],
        [TURNS[0], {**TURNS[1], "tool_calls": [], "function_call": None, "weight": 1}],
    ],
)  # fmt: skip
def test_shapes_of_messages(given: Any) -> None:
    assert to_conversation({"messages": given}).messages == TURNS
    if not isinstance(given, str):
        assert to_conversation(given).messages == TURNS


def test_turns_in_columns_of_a_table() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "train": None}]
    tools = [{"name": "add", "parameters": {"properties": {"a": {"type": "integer"}, "b": None}}}]
    record = {"conversations": json.dumps(turns), "tools": json.dumps(tools), "system": "", "messages": ""}
    conversation = to_conversation(record)
    assert conversation.messages == TURNS and conversation.format == "sharegpt"
    assert conversation.tools == [{"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}]
    arrays = {"conversations": np.array(turns, dtype=object), "tools": np.array(tools, dtype=object)}
    assert to_conversation(arrays) == conversation
    assert to_conversation({**arrays, "tools": np.array([]), "chat_template_kwargs": '{"a": 1}'}).template_kwargs == {
        "a": 1
    }


def test_function_calls_of_openai() -> None:
    schema = {"name": "add", "parameters": {}}
    turns = [
        TURNS[0],
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "add", "content": "2"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "7", "function": {"name": "add", "arguments": ""}}],
        },
        {"role": "ipython", "content": "3"},
        {**TURNS[1], "weight": 0},
    ]
    conversation = to_conversation({"messages": turns, "functions": [schema]})
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert conversation.messages == [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "2"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "7", "function": {"name": "add", "arguments": {}}}],
        },
        {"role": "tool", "content": "3"},
        {**TURNS[1], "train": False},
    ]
    assert conversation.tools == [{"type": "function", "function": schema}]


def test_a_system_prompt_beside_the_turns() -> None:
    system = {"role": "system", "content": "s"}
    for record in (
        {"messages": TURNS}, {"messages": [system, *TURNS]}, {"question": "Hi", "answer": "Hello"},
        {"prompt": TURNS[:1], "completion": "Hello"}, {"instruction": "Hi", "output": "Hello"},
    ):  # fmt: skip
        assert to_conversation({**record, "system": "s"}).messages == [system, *TURNS]


# ---- declared formats ----

HUMAN = {"human": "Hi", "assistant": "Hello"}
PUT_IN = {"input": "Hi", "output": "Hello"}
EXAMPLES: list[tuple[str, Any]] = [
    ("messages", TURNS), ("messages", {"messages": TURNS}), ("messages", {"conversation": TURNS}),
    ("prompt_generation", {"prompt": "Hi", "generation": "Hello"}),
    ("prompt_completion", {"prompt": "Hi", "completion": "Hello"}),
    ("prompt_completion", {"prompt": TURNS[:1], "completion": "Hello"}),
    ("question_answer", {"question": "Hi", "answer": "Hello"}),
    ("alpaca", {"instruction": "Hi", "output": "Hello"}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
    ("sharegpt", {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
    ("sharegpt", [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]),
    ("firefly", {"conversation": [HUMAN]}), ("xtuner", {"conversation": [PUT_IN]}),
    ("preference", {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "record"), EXAMPLES)
def test_the_name_of_the_format(name: str, record: Any) -> None:
    conversation = to_conversation(record)
    assert (conversation.format, conversation.messages) == (name, TURNS)
    assert to_conversation(record, name) == conversation
    for other in {*DATA_FORMATS} - {name, "auto"}:
        with pytest.raises(FormatError, match=rf"data_format is {other} \(.*; |data_format is {other} \(.* {name}"):
            to_conversation(record, other)


def test_format_names() -> None:
    assert set(DATA_FORMATS) == {"auto", *(row.name for row in FORMATS)}
    with pytest.raises(ValueError, match="data_format is 'json'; it must be one of auto, messages") as caught:
        to_conversation(TURNS, "json")
    assert not isinstance(caught.value, FormatError)


def test_a_declared_format_that_does_not_fit() -> None:
    record = {"question": "a", "answer": "b"}
    with pytest.raises(FormatError) as caught:
        to_conversation(record, "alpaca")
    assert str(caught.value) == (
        "data_format is alpaca (instruction/input/output), but the record is an object with 'question', 'answer', as in "
        "question_answer: set data_format to question_answer or auto, or mend the record"
    )
    with pytest.raises(FormatError, match="the record is an object with 'story'; set data_format to auto, or mend"):
        to_conversation({"story": "b"}, "alpaca")
    with pytest.raises(FormatError, match=r"^output is null, but instruction/input/output needs"):
        to_conversation({**record, "instruction": "a", "output": None}, "alpaca")


def test_a_record_in_several_formats() -> None:
    both = {
        "question": "Hi",
        "answer": "Hello",
        "messages": TURNS,
        "conversations": TURNS,
        "output": "7",
        "instruction": "8",
    }
    assert to_conversation(both).format == "messages"
    assert to_conversation({**both, "conversations": TURNS[:1], "chosen": "a", "rejected": "b"}).format == "preference"
    declared = to_conversation(both, "alpaca")
    assert declared.format == "alpaca" and declared.messages[0]["content"] == "8"
    for name in ("messages", "sharegpt"):  # both are said of these
        assert to_conversation({"conversations": TURNS}, name).format == name


# ---- whatever a file may hold ----

_KEYS = st.sampled_from(
    "messages conversations conversation prompt completion generation question answer instruction input output history system "
    "tools functions chosen rejected text role content from value human assistant tool_calls function function_call name "
    "arguments train weight type chat_template_kwargs reasoning_content".split()
)
_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just("\ud800"),
    st.sampled_from(["user", "assistant", "system", "tool", "gpt", "human", "function_call", "text", "[]", "{}", "[{}]", "\0"]),
)  # fmt: skip
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=5), max_leaves=25
)


@settings(max_examples=400, deadline=None)
@given(_VALUES, st.sampled_from(DATA_FORMATS), st.booleans())
def test_any_record_is_read_or_refused(value: Any, data_format: str, arrays: bool) -> None:
    if arrays and isinstance(value, dict):
        value = {key: np.array(item, dtype=object) if isinstance(item, list) else item for key, item in value.items()}
    try:
        conversation = to_conversation(value, data_format)
    except FormatError as error:
        reason = str(error)
    else:
        assert any(message["role"] == "assistant" for message in conversation.messages)
        assert all(isinstance(message["content"], (str, type(None))) for message in conversation.messages)
        reason = ""
    assert len(reason.encode("utf-8")) < 1500


@pytest.mark.parametrize(
    "value",
    [
        {"k" * 1_000_000: 1}, {"messages": "x" * 1_000_000}, [{"role": "r" * 1_000_000, "content": ""}],
        {"conversations": [{"k" * 1_000_000: 1}]}, {"question": {"q" * 1_000_000: 1}, "answer": ""},
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "", "train": "t" * 1_000_000}]},
    ],
)  # fmt: skip
def test_messages_about_huge_records_are_short(value: Any) -> None:
    with pytest.raises(FormatError) as caught:
        to_conversation(value)
    assert len(str(caught.value)) < 1500


def test_nested_too_deeply() -> None:
    deep: Any = "a"
    for _ in range(100_000):
        deep = [deep]
    for record in (deep, {"messages": TURNS, "tools": deep}, {"messages": deep}, {"question": deep, "answer": ""}):
        with pytest.raises(FormatError):
            to_conversation(record)
    with pytest.raises(FormatError, match="deep"):
        to_conversation({"messages": TURNS, "tools": "[" * 100_000})


# ---- records of other projects ----

CALL = {"type": "function", "function": {"name": "search", "arguments": {"q": "rice"}}}


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"instruction": "Add", "input": "1 1", "output": "2"}, ["user: Add\n1 1", "assistant: 2"]),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, ["user: Hi", "assistant: Hello"]),
        ({"instruction": "Hi", "input": None, "output": "Hello", "history": None}, ["user: Hi", "assistant: Hello"]),
        (
            {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
            ["system: s", "user: a", "assistant: b", "user: c", "assistant: d"],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            ["system: s", "user: a", "assistant: b"],
        ),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "a"}, {"from": "bard", "value": "b"}]},
            ["system: s", "user: a", "assistant: b"],
        ),
        ({"conversations": TURNS}, ["user: Hi", "assistant: Hello"]),
        ({"conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]},
         ["user: a", "assistant: b", "user: c", "assistant: d"]),
        ({"conversation": [{"system": "s", "input": "a", "output": "b"}, {"input": "c", "output": "d"}]},
         ["system: s", "user: a", "assistant: b", "user: c", "assistant: d"]),
    ],
)  # fmt: skip
def test_formats_of_other_projects(record: dict, turns: list[str]) -> None:
    messages = to_conversation(record).messages
    assert [f"{message['role']}: {message['content']}" for message in messages] == turns


@pytest.mark.parametrize(
    "value", [{"name": "search", "arguments": {"q": "rice"}}, [{"name": "search", "arguments": {"q": "rice"}}]]
)
@pytest.mark.parametrize("written", [json.dumps, lambda value: value], ids=["text", "object"])
def test_function_calls_of_sharegpt(value, written) -> None:
    turns = [
        {"from": "human", "value": "a"}, {"from": "function_call", "value": written(value)},
        {"from": "observation", "value": "b"}, {"from": "gpt", "value": "c", "train": False},
    ]  # fmt: skip
    conversation = to_conversation({"conversations": turns, "tools": json.dumps([{"name": "search"}])})
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert conversation.messages[3]["train"] is False and conversation.tools == [{"name": "search"}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": "hi"}, "conversations is hi, but it must be a list of turns"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "no assistant turn"),
        (
            {"conversations": [{"from": "wizard", "value": "hi"}]},
            "turn 0 of conversations is from 'wizard'; known are human",
        ),
        ({"conversations": [{"from": "gpt", "value": 7}]}, "content of message 0 is int 7"),
        ({"conversations": [{"from": "gpt"}]}, "turn 0 of conversations has 'from'; it needs from/value"),
        ({"conversations": ["hi"]}, "turn 0 of conversations is hi, but it must be an object"),
        ({"conversations": [{"from": "function_call", "value": "search()"}]}, "a function_call that is no JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "a function_call without a name"),
        ({"conversation": [{"human": 1, "assistant": "b"}]}, "human of turn 0 of conversation is int 1"),
        ({"instruction": "a", "output": 1}, "output is int 1"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "history is .* a list of .question, answer. pairs"),
        ({"instruction": "a", "output": None}, "output is null"),
    ],
)
def test_malformed_records_of_other_projects(record: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        to_conversation(record)


def test_real_files_of_other_projects(shared_data) -> None:
    files = {"multiturn/dummy_conversation.json": 500, "alpaca/instruction-data.json": 1100}
    files |= {"toolcall/glaive_toolcall_en_demo.json": 300}
    for name, count in files.items():
        conversations = [to_conversation(record.value) for record in read_records(shared_data / name)]
        assert len(conversations) == count
    assert any(message.get("tool_calls") for c in conversations for message in c.messages)
    assert all(
        conversation.tools for conversation in conversations if any(m["role"] == "tool" for m in conversation.messages)
    )


@pytest.mark.parametrize("key, value", [("images", ["a.png"]), ("image", "a.png"), ("audios", [{"path": "a.wav"}])])
def test_records_with_pictures_or_sounds_are_refused(key: str, value: Any) -> None:
    record = {"question": "<image>What is it?", "answer": "A cat"}
    with pytest.raises(FormatError, match=f"the record has {key}, and texts alone"):
        to_conversation({**record, key: value})
    assert to_conversation({**record, key: []}) and to_conversation({**record, key: None})
