"""Reading files, and recognising conversations."""

from __future__ import annotations

import codecs
import json
import pickle
from pathlib import Path

import pytest

from hf_sft.data.files import BadRecord, Record, read_records
from hf_sft.data.formats import FormatError, check_template_kwargs, to_conversation

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
RECORDS = [{"question": "1+1", "answer": "2"}, {"messages": TURNS}]


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# ---- files ----


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.txt"])
@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
def test_json_lines(tmp_path: Path, name: str, bom: bytes) -> None:
    text = "\n" + json.dumps(RECORDS[0]) + "\r\n  \n" + json.dumps(RECORDS[1])
    records = list(read_records(write(tmp_path / name, bom + text.encode())))
    assert records == [Record(2, RECORDS[0]), Record(4, RECORDS[1])]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("items", [RECORDS, [TURNS, TURNS]], ids=["objects", "arrays"])
def test_a_json_array(tmp_path: Path, indent: int | None, bom: bytes, items: list) -> None:
    path = write(tmp_path / "data.json", bom + b"\n" + json.dumps(items, indent=indent).encode() + b"\n")
    assert list(read_records(path)) == [Record(n, item, "record") for n, item in enumerate(items, 1)]


def test_lines_that_are_arrays_of_messages(tmp_path: Path) -> None:
    line = json.dumps(TURNS)
    assert [r.value for r in read_records(write(tmp_path / "one.jsonl", line))] == [TURNS]
    assert [r.value for r in read_records(write(tmp_path / "two.jsonl", f"{line}\n{line}\n"))] == [TURNS, TURNS]
    broken = list(read_records(write(tmp_path / "broken.jsonl", f"{line[:-1]}\n{line}\n")))
    assert isinstance(broken[0].value, BadRecord)
    assert broken[1].value == TURNS


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "caf\xe9", "answer": ""}', "invalid UTF-8: byte 0xe9 at position 17"),
        (b"{'question': 1}", "no JSON: Expecting property name .* column 2"),
        (b'{"question": NaN}', "NaN is no JSON value"),
        (b'{"question": -Infinity}', "-Infinity is no JSON value"),
        (b'{"question": "a"', "no JSON"),
        (b"question,answer", "no JSON"),
        (b"[" * 100_000, "nested too deeply|no JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, reason: str) -> None:
    good = json.dumps(RECORDS[0]).encode()
    records = list(read_records(write(tmp_path / "x.jsonl", b"\n".join([good, line, good]))))
    assert [record.number for record in records] == [1, 2, 3]
    assert records[0].value == records[2].value == RECORDS[0]
    assert isinstance(records[1].value, BadRecord)
    with pytest.raises(FormatError, match=reason):
        to_conversation(records[1].value)


@pytest.mark.parametrize("tail", ["", "]", '{"a": }]'])
def test_a_broken_array_names_its_line(tmp_path: Path, tail: str) -> None:
    path = write(tmp_path / "x.json", '[\n  {"question": "a", "answer": "b"},\n' + tail)
    with pytest.raises(ValueError, match=r"x\.json, line [23]: .*JSON array"):  # Python 3.13 blames the comma
        list(read_records(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            json.dumps(RECORDS[0], indent=2),
            r"x\.json is one JSON object over several lines.*JSON lines or a JSON array",
        ),
        ("\ufeff\n" + json.dumps(RECORDS[0], indent=2) * 2, "begins with a JSON object over several lines"),
        ("question,answer\n1+1,2\n2+2,4\n", r"holds no JSON: it begins with 'question,answer', like CSV.*JSON lines"),
        ("just text", "holds no JSON: it begins with 'just text'"),
        ("caf\xe9;\n\n", "holds no JSON"),
    ],
)
def test_files_of_another_shape_are_named_once(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_records(write(tmp_path / "x.json", text)))


@pytest.mark.parametrize("first", ["question,answer", '{"question": "a"', '{"question": NaN}', '{"a": "caf\udce9"}'])
def test_one_broken_line_is_not_the_whole_file(tmp_path: Path, first: str) -> None:
    data = f"{first}\n{json.dumps(RECORDS[0])}\n".encode(errors="surrogateescape")
    bad, good = list(read_records(write(tmp_path / "x.jsonl", data)))
    assert isinstance(bad.value, BadRecord)
    assert good.value == RECORDS[0]


def test_files_that_hold_no_records(tmp_path: Path) -> None:
    cases = {
        "no such data file": tmp_path / "missing.jsonl",
        "is a folder": tmp_path,
        r"is empty \(0 bytes\)": write(tmp_path / "empty.jsonl", b""),
        "holds no record": write(tmp_path / "blank.jsonl", b" \n\n"),
        "holds no record.*": write(tmp_path / "none.json", b"[]"),
        "pickle, which can run code": write(tmp_path / "data.jsonl", pickle.dumps(RECORDS)),
        "is a pickle": write(tmp_path / "data.pkl", b"x"),
        "UTF-16": write(tmp_path / "wide.jsonl", json.dumps(RECORDS[0]).encode("utf-16")),
        "Parquet": write(tmp_path / "x.parquet", b"PAR1...."),
        "gzip": write(tmp_path / "x.jsonl.gz", b"\x1f\x8b\x08\x00"),
    }
    for message, path in cases.items():
        with pytest.raises(ValueError, match=message):
            list(read_records(path))


def test_unpickling_never_happens(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    with pytest.raises(ValueError, match="pickle"):
        list(read_records(write(tmp_path / "data.json", pickle.dumps(Trap()))))
    assert not (tmp_path / "run").exists()


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
        (with_turn(content=[{"type": "text", "text": "a"}]), "content of message 1 is list"),
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


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"chosen": "a", "rejected": "b"}, "preference pair"),
        ({"text": "once upon a time"}, "plain text"),
    ],
)
def test_formats_of_other_projects_are_named(record: dict, name: str) -> None:
    with pytest.raises(FormatError, match=f"{name}.*not read in this version"):
        to_conversation(record)


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
