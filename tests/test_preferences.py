"""Preference pairs: the prompt, the answer that was chosen and the one that was rejected."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft.data.formats import to_conversation
from hf_sft.data.messages import FormatError
from hf_sft.data.preferences import PreferencePair, to_preference
from hf_sft.data.records import BadRecord


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER, CHOSEN, REJECTED = turn("user", "Hi"), turn("assistant", "Hello"), turn("assistant", "Go away")
PAST = [turn("user", "a"), turn("assistant", "b")]
SYSTEM = turn("system", "s")
SIDES = {"chosen": "Hello", "rejected": "Go away"}
LISTS = {"chosen": [CHOSEN], "rejected": [REJECTED]}
WHOLE = {"chosen": [*PAST, USER, CHOSEN], "rejected": [*PAST, USER, REJECTED]}
GPT = {"chosen": {"from": "gpt", "value": "Hello"}, "rejected": {"from": "gpt", "value": "Go away"}}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Who is\n\nthere?\n\nHuman: Me: you\n\nAssistant: Hello",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Who is\n\nthere?\n\nHuman: Me: you\n\nAssistant: Go away",
}


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "Hi", **SIDES}, [USER]),
        ({"prompt": [*PAST, USER], **SIDES}, [*PAST, USER]),
        ({"prompt": [SYSTEM, USER], **LISTS}, [SYSTEM, USER]),
        ({"prompt": "Hi", "system": "s", **LISTS}, [SYSTEM, USER]),
        ({"question": "Hi", **SIDES, "system": ""}, [USER]),
        ({"instruction": "Hi", "input": "", **SIDES}, [USER]),
        ({"instruction": "Add", "input": "1 1", "history": [["a", "b"]], **SIDES}, [*PAST, turn("user", "Add\n1 1")]),
        (WHOLE, [*PAST, USER]),
        ({**WHOLE, "system": "s"}, [SYSTEM, *PAST, USER]),
        ({**WHOLE, "prompt": "Hi"}, [*PAST, USER]),
        ({**WHOLE, "prompt": "a", "messages": WHOLE["chosen"]}, [*PAST, USER]),  # UltraFeedback's columns
        ({**WHOLE, "prompt": [*PAST, USER]}, [*PAST, USER]),
        ({**WHOLE, "messages": WHOLE["chosen"]}, [*PAST, USER]),
        ({"messages": [*PAST, USER], **LISTS}, [*PAST, USER]),
        ({"messages": json.dumps([USER]), "chosen": CHOSEN, "rejected": REJECTED}, [USER]),
        ({"conversations": [{"from": "human", "value": "Hi"}], **GPT}, [USER]),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "Hi"}], **GPT}, [SYSTEM, USER]),
        ({"conversations": np.array([{"from": "human", "value": "Hi"}]), **GPT, "prompt": None}, [USER]),
        ({key: np.array(value, dtype=object) for key, value in WHOLE.items()}, [*PAST, USER]),
        ({"prompt": "Hi", "chosen": [GPT["chosen"]], "rejected": [GPT["rejected"]]}, [USER]),
        (HH, [USER, turn("assistant", "Who is\n\nthere?"), turn("user", "Me: you")]),
    ],
)  # fmt: skip
def test_shapes_of_pairs(record: dict[str, Any], prompt: list) -> None:
    pair = to_preference(record)
    assert pair == PreferencePair(prompt, [CHOSEN], [REJECTED])
    assert to_preference(pair) is pair
    conversation = to_conversation(record)
    assert conversation == to_conversation(record, "preference")
    assert conversation.format == "preference"
    past = [{**message, "train": False} if message["role"] == "assistant" else message for message in prompt]
    assert conversation.messages == [*past, CHOSEN]


def test_an_answer_of_several_turns() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    chosen = [turn("assistant", None, tool_calls=[call]), turn("tool", "2"), turn("assistant", "It is 2")]
    record = {"chosen": [USER, *chosen], "rejected": [USER, REJECTED], "tools": json.dumps(tools)}
    pair = to_preference({**record, "chat_template_kwargs": {"thinking": True}})
    assert pair == PreferencePair([USER], chosen, [REJECTED], tools, {"thinking": True})
    parted_late = {**record, "rejected": [USER, *chosen[:2], REJECTED]}
    assert to_preference(parted_late) == PreferencePair([USER, *chosen[:2]], chosen[2:], [REJECTED], tools)


def test_a_prompt_that_is_a_dialogue_up_to_the_answer() -> None:
    prompt = HH["chosen"].removesuffix(" Hello")
    assert to_preference({"prompt": prompt, **SIDES}).prompt == to_preference(HH).prompt


def test_text_with_a_dialogue_is_a_text_where_the_prompt_stands_beside_it() -> None:
    pair = to_preference({"prompt": "Write a dialogue", **HH})
    assert pair.chosen == [turn("assistant", HH["chosen"])]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (BadRecord("no JSON: x"), "no JSON: x"),
        (7, "7 is no preference pair"),
        ({"messages": [USER, CHOSEN]}, "chosen and rejected are missing: the record has 'messages'"),
        ({"prompt": "Hi", "chosen": "a"}, "^rejected is missing: .*'prompt', 'chosen'; write both"),
        ({"prompt": "Hi", "chosen": None, "rejected": "a"}, "^chosen is missing"),
        (SIDES, "without its prompt .*'chosen', 'rejected'"),
        ({"prompt": "", **SIDES}, "without its prompt"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"chosen": WHOLE["chosen"], "rejected": WHOLE["chosen"]}, "chosen and rejected are the same"),
        ({"prompt": "Hi", "chosen": "", "rejected": "a"}, "the answer of chosen is empty"),
        ({"prompt": "Hi", "chosen": "a", "rejected": " \n"}, "the answer of rejected is empty"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}, "rejected is empty"),
        ({**HH, "rejected": "\n\nHuman: b\n\nAssistant: a"}, "prompts of .* differ, in message 0"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "b"}, "without its prompt"),
        ({**WHOLE, "rejected": [USER, REJECTED]}, r"prompts of chosen and rejected differ, in message 0 \(user\)"),
        ({**WHOLE, "rejected": [REJECTED]}, "chosen begins with the prompt, and rejected with the answer"),
        ({**WHOLE, "rejected": WHOLE["chosen"][:2]}, "the beginning of the other"),
        ({**WHOLE, "rejected": [*PAST, turn("user", "b"), REJECTED]}, r"differ, in message 2 \(user\)"),
        ({**WHOLE, "prompt": "other"}, r"the prompt beside chosen and rejected \(other\) differs .*\(Hi\)"),
        ({**WHOLE, "messages": [USER]}, r"the prompt beside chosen and rejected \(Hi\) differs"),
        ({"chosen": [SYSTEM, CHOSEN], "rejected": [SYSTEM, REJECTED]}, "the prompt ends with a message of the role system"),
        ({"prompt": PAST, **SIDES}, "the prompt ends with a message of the role assistant"),
        ({"prompt": "Hi", "chosen": [CHOSEN, USER], "rejected": "a"}, "chosen ends with a message of the role user"),
        ({"prompt": "Hi", "chosen": [], "rejected": "a"}, "the conversation of chosen has no messages"),
        ({"prompt": "Hi", "chosen": 7, "rejected": "a"}, "chosen is 7, but it must be a list of turns"),
        ({"prompt": "Hi", "chosen": ["a"], "rejected": "b"}, "turn 0 of chosen is a, but it must be an object"),
        ({"prompt": "Hi", "chosen": "\ud800", "rejected": "b"}, "chosen holds half of a surrogate pair"),
        ({"prompt": "Hi", "chosen": {"role": "gpt", "content": "a"}, "rejected": "b"}, "message 0 of chosen has the role 'gpt'"),
        ({"prompt": [SYSTEM, USER], "system": "t", **SIDES}, "begin with another system prompt"),
        ({"prompt": 7, **SIDES}, "prompt is 7, but it must be a list of turns"),
        ({"prompt": "Hi", **SIDES, "tools": "["}, "tools is a string that is no JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(record: Any, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        to_preference(record)


def test_half_a_pair_is_no_conversation() -> None:
    with pytest.raises(FormatError, match="with chosen and without rejected; write both"):
        to_conversation({"prompt": "Hi", "chosen": "a"})
    with pytest.raises(FormatError, match=r"^rejected is null, but chosen/rejected needs"):
        to_conversation({"prompt": "Hi", "chosen": "a", "rejected": None})
    both_null = {"messages": [USER, CHOSEN], "chosen": None, "rejected": None}
    assert to_conversation(both_null).format == "messages"


_SIDE = st.one_of(
    st.none(), st.integers(), st.text(max_size=4), st.sampled_from([HH["chosen"], CHOSEN, REJECTED, GPT["chosen"]]),
    st.lists(st.sampled_from([USER, CHOSEN, REJECTED, SYSTEM, {"role": "user"}, "a", turn("tool", "2")]), max_size=4),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from("chosen rejected prompt messages conversations system question".split()), _SIDE))
def test_any_record_is_read_or_refused(record: dict[str, Any]) -> None:
    try:
        pair = to_preference(record)
    except FormatError as error:
        reason = str(error)
        assert len(reason.encode("utf-8")) < 1500
        return
    assert pair.chosen != pair.rejected
    assert pair.prompt[-1]["role"] in ("user", "tool")
    for answer in (pair.chosen, pair.rejected):
        assert answer[0]["role"] == answer[-1]["role"] == "assistant"
        assert answer[-1]["content"].strip()


def test_a_real_file(shared_data) -> None:
    records = json.loads((shared_data / "preference/dpo_en_demo.json").read_text(encoding="utf-8"))
    pairs = [to_preference(record) for record in records]
    assert len(pairs) == 300
    for record, pair in zip(records, pairs, strict=True):
        assert len(pair.prompt) == len(record["conversations"])
        assert pair.chosen == [turn("assistant", record["chosen"]["value"])]
        assert pair.rejected == [turn("assistant", record["rejected"]["value"])]
        assert to_conversation(record).messages[-1] == pair.chosen[0]
