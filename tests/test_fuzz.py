"""Broken files and records: never a crash or a hang, each record counted once, nothing learned from a bad one."""

from __future__ import annotations

import gzip
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_sft.arguments import DataArguments
from hf_sft.data import json_files
from hf_sft.data.files import BadRecord, content_hash, parts_of, read_records
from hf_sft.data.formats import to_conversation
from hf_sft.data.pipeline import prepare_dataset
from hf_sft.data.preferences import to_preference

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

ENDINGS = ["jsonl", "json", "txt", "csv", "tsv", "parquet", "arrow", "feather", "gz", "jsonl.gz", "csv.gz", "data"]
GOOD = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello é \U0001f600"}]},
    [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}],
    {"question": "Why?", "answer": "So."},
    {"instruction": "Add", "input": "1 1", "output": "2"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
]


def chat(answer: str) -> str:
    """A record as JSON, whose answer is this JSON text."""
    return '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": %s}]}' % answer  # noqa: UP031


def nest(levels: int, inside: str = "") -> str:
    return "[" * levels + inside + "]" * levels


# Lines of a file of JSON lines that must not be learned from.
BAD: dict[str, bytes] = {
    "cut off": chat('"Hello"').encode()[:-7],
    "cut off in a string": b'{"question": "a", "answer": "b',
    "cut off in an escape": b'{"question": "a", "answer": "\\u00',
    "single quotes": b"{'question': 'a', 'answer': 'b'}",
    "trailing comma": b'{"question": "a", "answer": "b",}',
    "two values": b'{"question": "a", "answer": "b"} {"question": "a", "answer": "b"}',
    "CSV": b"question,answer",
    "markup": b"<question>a</question>",
    "a number": b"7",
    "a string": b'"a"',
    "null": b"null",
    "an empty object": b"{}",
    "an empty array": b"[]",
    "wrong types": b'{"messages": {"role": "user", "content": "a"}}',
    "content of the wrong type": chat("7").encode(),
    "content is an object": chat('{"text": "a"}').encode(),
    "role of the wrong type": b'[{"role": ["user"], "content": "a"}, {"role": {"a": 1}, "content": "b"}]',
    "turn of the wrong type": b'{"messages": [7, "a", null]}',
    "no answer": b'[{"role": "user", "content": "a"}]',
    "answer is null": b'{"question": "a", "answer": null}',
    "train of the wrong type": b'[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": "no"}]',
    "tools of the wrong type": b'{"messages": [{"role": "assistant", "content": "b"}], "tools": 7}',
    "calls of the wrong type": b'[{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [7]}]',
    "history of the wrong type": b'{"instruction": "a", "output": "b", "history": [[1]]}',
    "half a surrogate pair": chat('"a \\ud800 b"').encode(),
    "the other half": chat('"\\udc00"').encode(),
    "half a pair, raw": chat('"\xff"').encode().replace("\xff".encode(), b"\xed\xa0\x80"),
    "half a pair in the role": b'[{"role": "us\\udc00er", "content": "a"}, {"role": "assistant", "content": "b"}]',
    "invalid UTF-8": chat('"caf\xe9"').encode("latin-1"),
    "cut off in a character": chat('"\xe9"').encode().replace(b"\xc3\xa9", b"\xc3"),
    "NUL byte": b'{"question": "a", "answer": "b"}\x00',
    "NUL byte in a string": b'{"question": "a\x00", "answer": "b"}',
    "NUL bytes": b"\x00" * 1000,
    "NaN": b'{"question": "a", "answer": "b", "score": NaN}',
    "Infinity": b'{"question": "a", "answer": "b", "score": [-Infinity]}',
    "a number of a million digits": b'{"question": "a", "answer": "b", "n": %s}' % (b"7" * 1_000_000),
    "a key that stands twice": b'{"question": "a", "answer": "b", "answer": "c"}',
    "100,000 open brackets": b"[" * 100_000,
    "100,000 brackets": nest(100_000).encode(),
    "100,000 objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a deep field": b'{"question": "a", "answer": "b", "c": %s}' % nest(50_000).encode(),
    "a deep field that can be parsed": b'{"question": "a", "answer": "b", "c": %s}' % nest(600).encode(),
    "deep content": chat(nest(600, '"a"')).encode(),
    "a key of 1 MB": b'{"%s": 1}' % (b"k" * 1_000_000),
    "a role of 1 MB": b'[{"role": "%s", "content": "a"}]' % (b"r" * 1_000_000),
    "a format of 1 MB": b'{"conversations": [{"from": "%s", "value": "a"}]}' % (b"f" * 1_000_000),
    "many keys": json.dumps({f"key {n}": n for n in range(20_000)}).encode(),
    "BOM inside": b'\xef\xbb\xbf{"question": "a", "answer": "b"}',
    "UTF-16": chat('"a"').encode("utf-16-le"),
    "special token": chat('"a<|im_end|>b"').encode(),
}
# Odd lines that are records like any other.
ODD: dict[str, bytes] = {
    "CR LF": b'{"question": "a", "answer": "b"}\r',
    "spaces": b' \t{"question": "a", "answer": "b"}  ',
    "a key of 1 MB beside": b'{"question": "a", "answer": "b", "%s": 1}' % (b"k" * 1_000_000),
    "NUL as an escape": chat('"a\\u0000b"').encode(),
    "a surrogate pair": chat('"\\ud83d\\ude00"').encode(),
    "a huge exponent": b'{"question": "a", "answer": "b", "n": 1e400}',
    "other separators of lines": chat('"a\u2028b\u0085c"').encode(),
}


def read(path: Path, **settings: Any) -> list[Any]:
    return [record.value for record in read_records(path, **settings)]


def refusal(function: Any, value: Any, **settings: Any) -> str | None:
    """What a function says that refuses a value by a ValueError, and in few words; None if it takes it."""
    try:
        function(value, **settings)
    except ValueError as error:
        return str(error)[:2_000]
    return None


def is_bad(value: Any) -> bool:
    """Whether a record is read neither as a conversation nor as a preference pair."""
    if isinstance(value, BadRecord):
        return True
    refused = [refusal(function, value) for function in (to_conversation, to_preference)]
    assert all(len(reason or "") < 2_000 for reason in refused)
    return None not in refused


# ---- files ----


def look_at(path: Path) -> None:
    """All that is done with a data file; ValueError is the only error."""
    for look, more in (
        (read, {}),
        (read, {"part": "eval"}),
        (read, {"texts": True}),
        (parts_of, {}),
        (content_hash, {}),
    ):
        assert len(refusal(look, path, **more) or "") < 2_000


@relaxed
@given(data=st.binary(max_size=300), name=st.sampled_from(ENDINGS), packed=st.booleans())
def test_random_bytes(tmp_path: Path, data: bytes, name: str, packed: bool) -> None:
    path = tmp_path / f"x.{name}"
    path.write_bytes(gzip.compress(data) if packed else data)
    look_at(path)


def tables() -> Iterator[tuple[str, bytes]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.Table.from_pylist([{"messages": GOOD[1], "n": n, "s": "x" * n} for n in range(30)])
    for compression in ("none", "snappy"):
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink, row_group_size=8, compression=compression)
        yield "parquet", sink.getvalue().to_pybytes()
    for new in (pa.ipc.new_stream, pa.ipc.new_file):
        for compression in (None, "lz4"):
            sink = pa.BufferOutputStream()
            with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
                writer.write_table(table, max_chunksize=8)
            yield "arrow", sink.getvalue().to_pybytes()


def texts() -> Iterator[tuple[str, bytes]]:
    lines = "\n".join(map(json.dumps, GOOD))
    yield "jsonl", lines.encode()
    yield "jsonl.gz", gzip.compress(lines.encode())
    yield "json", json.dumps(GOOD).encode()
    yield "json", json.dumps({"train": GOOD, "validation": GOOD[:2]}, indent=1).encode()
    yield "csv", b'question,answer\n"a, ""b""\nc",d\n1,2\n,\n'


@relaxed
@given(
    source=st.sampled_from([*tables(), *texts()]),
    changes=st.lists(
        st.tuples(st.floats(0, 0.999), st.integers(0, 20), st.binary(max_size=20)), min_size=1, max_size=4
    ),
)
def test_damaged_files(tmp_path: Path, source: tuple[str, bytes], changes: list[tuple[float, int, bytes]]) -> None:
    name, data = source
    for place, removed, added in changes:
        at = int(place * len(data))
        data = data[:at] + added + data[at + removed :]
    path = tmp_path / f"x.{name}"
    path.write_bytes(data)
    look_at(path)


@pytest.mark.parametrize("name", ["jsonl", "csv", "arrow", "parquet", "json.gz"])
def test_each_bad_line_as_a_file(tmp_path: Path, name: str) -> None:
    for data in BAD.values():
        path = tmp_path / f"x.{name}"
        path.write_bytes(gzip.compress(data, 1) if "gz" in name else data)
        look_at(path)


def test_cut_files(tmp_path: Path) -> None:
    for name, data in [*tables(), *texts()]:
        path = tmp_path / f"cut.{name}"
        for end in range(1, len(data), max(len(data) // 40, 1)):
            path.write_bytes(data[:end])
            look_at(path)


# ---- JSON ----

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20)
)
json_values = st.recursive(
    scalars,
    lambda inside: st.one_of(st.lists(inside, max_size=4), st.dictionaries(st.text(max_size=6), inside, max_size=4)),
)


@relaxed
@given(
    items=st.lists(st.dictionaries(st.text(max_size=6), json_values, max_size=4), min_size=1, max_size=6),
    indent=st.sampled_from([None, 0, 1, "\t"]),
    ascii_only=st.booleans(),
    block=st.integers(4, 200),
)
def test_an_array_is_what_it_was(
    tmp_path: Path, items: list, indent: Any, ascii_only: bool, block: int, monkeypatch
) -> None:
    items[0].pop("role", None)
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    monkeypatch.setattr(json_files, "_BLOCK", block)
    if ascii_only:
        assert read(path) == items
    else:  # half a surrogate pair is no UTF-8
        try:
            text.encode()
        except UnicodeEncodeError:
            with pytest.raises(ValueError, match="invalid UTF-8"):
                read(path)
        else:
            assert read(path) == items


@relaxed
@given(lines=st.lists(st.one_of(st.sampled_from([*BAD.values(), *ODD.values(), b"", b" \r"]), st.binary(max_size=60))))
def test_each_line_is_counted_once(tmp_path: Path, lines: list[bytes]) -> None:
    lines = [part for line in lines for part in line.split(b"\n")]
    first = json.dumps(GOOD[0]).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([first, first, *lines]))
    records = list(read_records(path))
    assert [record.number for record in records] == [1, 2, *(n for n, line in enumerate(lines, 3) if line.strip())]
    for record, line in zip(records[2:], (line for line in lines if line.strip()), strict=True):
        if not isinstance(record.value, BadRecord) and "e400" not in str(line[-60:]):
            assert json.loads(line) == record.value


@pytest.mark.parametrize("name", BAD)
def test_bad_lines(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.jsonl"
    good = json.dumps(GOOD[0]).encode()
    path.write_bytes(b"\n".join([good, BAD[name], good]))
    start = time.monotonic()
    values = read(path)
    assert len(values) == 3 and values[0] == values[2] == GOOD[0]
    if name != "special token":
        assert is_bad(values[1])
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ODD)
def test_odd_lines(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([json.dumps(GOOD[0]).encode(), ODD[name]]))
    assert not is_bad(read(path)[1])


@pytest.mark.parametrize(
    "name",
    ["NaN", "Infinity", "a number of a million digits", "a key that stands twice", "100,000 brackets", "a deep field"],
)
def test_bad_items_of_arrays(tmp_path: Path, name: str) -> None:
    """They are JSON of a kind, so the array goes on behind them."""
    path = tmp_path / "x.json"
    good = json.dumps(GOOD[0]).encode()
    path.write_bytes(b"[" + b",\n".join([good, BAD[name], good]) + b"]")
    values = read(path)
    assert len(values) == 3 and values[0] == values[2] == GOOD[0] and isinstance(values[1], BadRecord)


def test_a_huge_exponent_is_no_number_to_learn(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(ODD["a huge exponent"])
    assert read(path)[0]["n"] == math.inf


# ---- from files to rows ----


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


def prepare(path: Path, tokenizer: Any, **settings: Any) -> tuple[list[tuple[list[int], list[int]]], dict[str, Any]]:
    data = DataArguments(train_file=str(path), max_seq_length=4096, **{"bad_records": "skip", **settings})
    prepared = prepare_dataset(str(path), tokenizer, data=data)
    rows = [(list(row["input_ids"]), list(row["labels"])) for row in prepared.rows]
    report = prepared.report
    assert report["records"] == report["kept"] + sum(report["dropped"].values()) + report["bad"]["count"]
    assert report["bad"]["count"] == sum(report["bad"]["reasons"].values())
    assert max(map(len, [*report["bad"]["reasons"], *report["bad"]["examples"]]), default=0) < 2_000
    return rows, report


def test_nothing_is_learned_from_bad_lines(tmp_path: Path, tokenizer) -> None:
    good, mixed = tmp_path / "good.jsonl", tmp_path / "mixed.jsonl"
    lines = [json.dumps(record).encode() for record in GOOD]
    good.write_bytes(b"\n".join(lines))
    bad = list(BAD.values())
    cut = [bad[n :: len(lines)] for n in range(len(lines))]
    mixed.write_bytes(b"\n".join(part for line, some in zip(lines, cut, strict=True) for part in (line, *some)))
    wanted, _ = prepare(good, tokenizer)
    found, report = prepare(mixed, tokenizer)
    assert found == wanted
    assert (report["records"], report["kept"], report["bad"]["count"]) == (len(GOOD) + len(BAD), len(GOOD), len(BAD))
    with pytest.raises(ValueError, match=r"mixed\.jsonl, line 2: no JSON"):
        prepare(mixed, tokenizer, bad_records="error")


@settings(relaxed, max_examples=25)
@given(
    records=st.lists(st.one_of(st.sampled_from(GOOD), json_values), min_size=1, max_size=8),
    texts=st.lists(st.text(max_size=12), min_size=1, max_size=3),
    array=st.booleans(),
)
def test_nothing_is_learned_from_bad_values(
    tmp_path: Path, tokenizer, records: list, texts: list[str], array: bool
) -> None:
    """Records of any shape, among them conversations with any text."""
    records = [GOOD[2], *records, *({"question": text, "answer": text} for text in texts)]
    mixed, good = tmp_path / "mixed.json", tmp_path / "good.jsonl"
    mixed.write_text(json.dumps(records) if array else "\n".join(map(json.dumps, records)))
    usable = [record for record in records if not is_bad(record)]
    good.write_text("\n".join(map(json.dumps, usable)))
    found, report = prepare(mixed, tokenizer)
    assert report["records"] == len(records) and report["bad"]["count"] >= len(records) - len(usable)
    wanted, alone = prepare(good, tokenizer)
    assert found == wanted and alone["kept"] == report["kept"]


def test_raw_texts(tmp_path: Path, tokenizer) -> None:
    lines = [b'{"text": "Once."}', *BAD.values(), b'{"text": "Twice."}']
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows, report = prepare(path, tokenizer, task_type="pretrain")
    as_text = {"a string": "a"}  # the only one of them that is a text
    assert report["bad"]["count"] == len(BAD) - len(as_text)
    end = tokenizer.eos_token_id
    texts = [tokenizer.encode(text) + [end] for text in ("Once.", *as_text.values(), "Twice.")]
    assert [ids for ids, _ in rows] == texts


def test_the_recursion_limit_is_left_alone(tmp_path: Path) -> None:
    limit = sys.getrecursionlimit()
    path = tmp_path / "x.jsonl"
    path.write_bytes(BAD["100,000 objects"] + b"\n" + json.dumps(GOOD[0]).encode())
    assert isinstance(read(path)[0], BadRecord)
    assert sys.getrecursionlimit() == limit
