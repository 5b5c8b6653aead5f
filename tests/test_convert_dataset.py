"""scripts/convert_dataset.py: each known data set by hand-written records in its shape, and the script on files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_sft.data.files import read_records
from hf_sft.data.formats import to_conversation
from hf_sft.data.preferences import to_preference

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "convert_dataset.py"


def load():
    spec = importlib.util.spec_from_file_location("convert_dataset", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()


def chat(*texts: str, system: str | None = None) -> list[dict]:
    turns = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts, strict=False)
    ]
    return ([{"role": "system", "content": system}] if system else []) + turns


def row(identity: str, parent: str | None, text: str, rank: int | None = None, tree: str = "t", **more) -> dict:
    role = "prompter" if identity.startswith("p") else "assistant"
    return {
        "message_id": identity, "parent_id": parent, "text": text, "role": role, "rank": rank, "message_tree_id": tree,
        "lang": "en", "deleted": False, **more,
    }  # fmt: skip


HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant: "
SHAPES = {
    "tatsu-lab/alpaca": (
        {"instruction": "Add", "input": "1 1", "output": "2", "text": "Below is an instruction ... 2"},
        chat("Add\n1 1", "2"),
    ),
    "yahma/alpaca-cleaned": ({"instruction": "Hi", "input": "", "output": "Hello"}, chat("Hi", "Hello")),
    "GAIR/lima": ({"conversations": ["a", "b", "c", "d"], "source": "multi_turn"}, chat("a", "b", "c", "d")),
    "databricks/databricks-dolly-15k": (
        {"instruction": "When?", "context": "In 1999.", "response": "1999", "category": "closed_qa"},
        chat("When?\nIn 1999.", "1999"),
    ),
    "HuggingFaceH4/ultrachat_200k": (
        {"prompt": "a", "prompt_id": "0f", "messages": chat("a", "b", "c", "d")},
        chat("a", "b", "c", "d"),
    ),
    "HuggingFaceH4/no_robots": (
        {"prompt": "a", "prompt_id": "0f", "messages": chat("a", "b", system="s"), "category": "Chat"},
        chat("a", "b", system="s"),
    ),
    "Open-Orca/OpenOrca": (
        {"id": "niv.1", "system_prompt": "s", "question": "a", "response": "b"},
        chat("a", "b", system="s"),
    ),
    "Open-Orca/SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "s", "weight": None},
                {"from": "human", "value": "a", "weight": 0.0},
                {"from": "gpt", "value": "b", "weight": 1.0},
            ]
        },
        chat("a", "b", system="s"),
    ),
    "WizardLMTeam/WizardLM_evol_instruct_V2_196k": (
        {"idx": "x", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        chat("a", "b"),
    ),
    "meta-math/MetaMathQA": (
        {"type": "MATH_AnsAug", "query": "1+1", "original_question": "1+1?", "response": "2"},
        chat("1+1", "2"),
    ),
    "openai/gsm8k": ({"question": "1+1", "answer": "1+1=2\n#### 2"}, chat("1+1", "1+1=2\n#### 2")),
    "BelleGroup/train_0.5M_CN": ({"instruction": "你好", "input": "", "output": "您好"}, chat("你好", "您好")),
    "YeungNLP/firefly-train-1.1M": ({"kind": "NLI", "input": "你好", "target": "您好"}, chat("你好", "您好")),
}
PAIRS = {
    "Anthropic/hh-rlhf": ({"chosen": HH + "So.", "rejected": HH + "No."}, chat("Hi", "Yes?", "Why")),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {"prompt": "Why", "prompt_id": "0f", "chosen": chat("Why", "So."), "rejected": chat("Why", "No."),
         "messages": chat("Why", "So."), "score_chosen": 8.0, "score_rejected": 6.5},
        chat("Why"),
    ),
}  # fmt: skip


def test_each_known_data_set_has_a_test() -> None:
    assert script.KNOWN.keys() == SHAPES.keys() | PAIRS.keys() | {"OpenAssistant/oasst1"}


@pytest.mark.parametrize("name", SHAPES)
def test_conversations(name: str) -> None:
    record, messages = SHAPES[name]
    converted = script.KNOWN[name].convert(record)
    assert converted == {"messages": messages}
    assert to_conversation(converted).messages == messages


@pytest.mark.parametrize("name", PAIRS)
def test_preferences(name: str) -> None:
    record, prompt = PAIRS[name]
    converted = script.KNOWN[name].convert(record)
    answers = [[{"role": "assistant", "content": text}] for text in ("So.", "No.")]
    assert converted == {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    pair = to_preference(converted)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, *answers)


def test_message_trees() -> None:
    tree = [
        row("p1", None, "Hi"),
        row("a1", "p1", "worse", 1),
        row("a2", "p1", "best", 0),
        row("a3", "p1", "not ranked"),
        row("a4", "p1", "deleted", 0, deleted=True),
        row("p2", "a2", "Why", 0),
        row("p3", "a2", "What", 1),
        row("a5", "p2", "So"),
        row("p4", "a5", "never answered"),
        row("a6", "a1", "on the worse path"),
    ]
    other = [row("p9", None, "Bye", tree="u"), row("a9", "p9", "See you", 0, tree="u")]
    lonely = [row("p8", None, "Anyone?", tree="v")]
    mixed = [row for rows in zip(tree[:2], other, strict=True) for row in rows] + tree[2:] + lonely
    records = script.trees(script.Record(n, value) for n, value in enumerate(mixed, 1))
    best, second, third = [record.value for record in records]
    assert script.best_path(best) == {"messages": chat("Hi", "best", "Why", "So")}
    assert script.best_path(second) == {"messages": chat("Bye", "See you")}
    with pytest.raises(ValueError, match="a question without an answer"):
        script.best_path(third)


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("GAIR/lima", {"conversations": ["only a question"]}, "a question without an answer"),
        ("tatsu-lab/alpaca", {"instruction": "Hi", "input": "", "output": " "}, "the last answer is empty"),
        ("tatsu-lab/alpaca", {"question": "Hi", "answer": "Hello"}, r"another shape.*KeyError: 'instruction'"),
        ("tatsu-lab/alpaca", ["Hi"], "another shape"),
        ("Anthropic/hh-rlhf", {"chosen": HH + "So.", "rejected": HH + "So."}, "same"),
        ("Open-Orca/SlimOrca", {"story": "x"}, "no known format"),
    ],
)
def test_what_cannot_be_converted(name: str, record, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        script._line(record, script.KNOWN[name].convert)


def test_records_of_no_known_data_set() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert script.by_format({"messages": chat("a", "b"), "tools": tools}) == {
        "messages": chat("a", "b"),
        "tools": tools,
    }
    assert script.by_format({"text": "once", "id": 7}) == script.by_format("once") == {"text": "once"}
    assert script.by_format({"instruction": "a", "output": "b", "text": "ab"}) == {"messages": chat("a", "b")}


def test_the_script(tmp_path: Path, shared_data: Path) -> None:
    counts = {"alpaca/instruction-data.json": (1100, 1100), "multiturn/dummy_conversation.json": (500, 500)}
    counts |= {"gsm8k/test.jsonl": (1319, 1319), "preference/dpo_en_demo.json": (300, 300)}
    for file, (read, written) in counts.items():
        output = tmp_path / Path(file).with_suffix(".out.jsonl").name
        script.main(["--file", str(shared_data / file), "--output", str(output)])
        lines = output.read_text(encoding="utf-8").splitlines()
        assert len(lines) == written, file
        source = [to_conversation(record.value).messages for record in read_records(shared_data / file)]
        assert [to_conversation(json.loads(line)).messages for line in lines] == source
        assert len(source) == read


def test_known_shape_from_a_file(tmp_path: Path, capsys) -> None:
    rows = [
        {"conversations": ["a", "b"]},
        {"conversations": ["a"]},
        {"conversations": []},
        {"conversations": ["c", "d"]},
    ]
    source, output = tmp_path / "lima.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("\n".join([*map(json.dumps, rows), "{broken"]))
    script.main(["GAIR/lima", "--file", str(source), "-o", str(output)])
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"messages": chat("a", "b")},
        {"messages": chat("c", "d")},
    ]
    told = capsys.readouterr().out
    assert (
        "read 5, wrote 2" in told and "2 skipped: a question without an answer" in told and "1 skipped: no JSON" in told
    )
    with pytest.raises(ValueError, match="exists, and nothing is overwritten"):
        script.main(["GAIR/lima", "--file", str(source), "-o", str(output)])
    script.main(["GAIR/lima", "--file", str(source), "-o", str(output), "--overwrite", "--limit", "1"])
    assert len(output.read_text().splitlines()) == 1
    source.write_text('{"conversations": ["a"]}\n')
    with pytest.raises(ValueError, match=r"none of 1 records .*\n  1 skipped: a question without"):
        script.main(["GAIR/lima", "--file", str(source), "-o", str(tmp_path / "none.jsonl")])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["lima.jsonl", "new", "out.jsonl"]


def test_from_the_hub(tmp_path: Path, monkeypatch, capsys) -> None:
    import datasets

    asked = []

    def load_dataset(name, config, *, split, revision, streaming):
        asked.append((name, config, split, revision))
        rows = datasets.Dataset.from_list([{"question": "1+1", "answer": "2"}] * 3)
        return rows if split else datasets.DatasetDict({"train": rows, "test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    script.main(["openai/gsm8k", "-o", str(tmp_path / "a.jsonl"), "--revision", "v1"])
    script.main(["openai/gsm8k", "-o", str(tmp_path / "b.jsonl"), "--split", "test"])
    script.main(["my/own", "-o", str(tmp_path / "c.jsonl")])
    assert asked == [
        ("openai/gsm8k", "main", None, "v1"),
        ("openai/gsm8k", "main", "test", None),
        ("my/own", None, None, None),
    ]
    assert "my/own is not among the known data sets" in capsys.readouterr().out
    assert (tmp_path / "b.jsonl").read_text().splitlines() == [json.dumps({"messages": chat("1+1", "2")})] * 3


def test_wrong_options(tmp_path: Path) -> None:
    for words in ([], ["a/b"], ["--output", "x"], ["a/b", "-o", str(tmp_path / "x"), "--limit", "0"]):
        with pytest.raises(ValueError, match=r"name a data set|at least 1 record"):
            script.main(words)


def test_as_a_process(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT, "--file", str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "x.jsonl")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "no such data file" in result.stderr
