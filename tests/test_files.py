"""Reading data files."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from hf_sft.data import json_files
from hf_sft.data.cache import hash_files
from hf_sft.data.files import BadRecord, Record, check_file, content_hash, parts_of, read_records, shorten
from hf_sft.data.formats import FormatError, to_conversation

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
RECORDS = [{"question": "1+1", "answer": "2"}, {"messages": TURNS}]


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def values(path: Path | str, **settings: Any) -> list:
    return [record.value for record in read_records(path, **settings)]


def numbered(count: int, name: str = "row") -> list[dict]:
    return [{"question": f"{name} {n}", "answer": str(n)} for n in range(count)]


# ---- JSON ----


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


def test_an_array_without_a_comma_is_not_read_line_by_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.json", '[{"question": "a", "answer": "b"},\n{"question": "c", "answer": "d"}\n{"question": "e"}]'
    )
    with pytest.raises(ValueError, match=r"x\.json, line 3: .*JSON array"):
        values(path)


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


@pytest.mark.parametrize("tail", ["", "]", '{"a": }]', '{"a": 1}\n{"a": 2}]'])
def test_a_broken_array_names_its_line(tmp_path: Path, tail: str) -> None:
    path = write(tmp_path / "x.json", '[\n  {"question": "a", "answer": "b"},\n' + tail)
    with pytest.raises(ValueError, match=r"x\.json, line [2-4]: .*JSON array"):  # Python 3.13 blames the comma
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
        "takes? it out of the folder|Take it out of the folder": tmp_path,
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


def test_values_that_cannot_be_used_are_bad_records(tmp_path: Path) -> None:
    lines = {
        '{"a": 1, "a": 2}': "the key 'a' stands twice in one object",
        '{"a": {"b": 1, "c": 2, "b": 3}}': "the key 'b' stands twice",
        '{"a": NaN}': "NaN is no JSON value",
        f'{{"a": {"7" * 5000}}}': "no JSON: .*digits",
        '{"a": ' + "[" * 101 + "]" * 101 + "}": "nested too deeply: more than 100",
        '{"a": ' + "[" * 99_999 + "]" * 99_999 + "}": "nested too deeply: more than 100",
    }
    good = json.dumps(RECORDS[0])
    text = ",\n".join([good, *lines, good])
    as_lines = values(write(tmp_path / "x.jsonl", text.replace(",\n", "\n")))
    as_array = values(write(tmp_path / "x.json", f"[{text}]"))
    assert [as_lines[0], as_lines[-1]] == [as_array[0], as_array[-1]] == [RECORDS[0]] * 2
    for found in (as_lines, as_array):
        for value, reason in zip(found[1:-1], lines.values(), strict=True):
            with pytest.raises(FormatError, match=reason):
                to_conversation(value)
    assert values(write(tmp_path / "y.jsonl", '{"a": ' + "[" * 98 + "]" * 98 + "}"))[0]["a"]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_in_blocks(tmp_path: Path, indent: int | None, monkeypatch) -> None:
    items = [
        *RECORDS,
        -1.5e-07,
        '\\"\u00e9\U0001f600',
        123456,
        [],
        {},
        [[1, 2.5], {"a": None}],
        True,
        None,
        "x" * 99,
        1e30,
    ]
    text = json.dumps(items, indent=indent, ensure_ascii=bool(indent))
    path = write(tmp_path / "x.json", codecs.BOM_UTF8 + text.encode())
    for block in (4, 5, 7, 8, 64):
        monkeypatch.setattr(json_files, "_BLOCK", block)
        assert values(path) == items


def test_a_line_longer_than_a_block(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(json_files, "_BLOCK", 16)
    lines = "\n".join(map(json.dumps, RECORDS))
    assert values(write(tmp_path / "lines.jsonl", lines)) == RECORDS
    assert values(write(tmp_path / "one.jsonl", json.dumps(TURNS))) == [TURNS]
    assert values(write(tmp_path / "turns.jsonl", f"{json.dumps(TURNS)}\n{json.dumps(TURNS)}")) == [TURNS, TURNS]
    assert values(write(tmp_path / "array.json", json.dumps(RECORDS))) == RECORDS
    assert values(write(tmp_path / "lists.json", json.dumps({"train": RECORDS}))) == RECORDS
    broken = values(write(tmp_path / "broken.jsonl", f'{{"question": "a long text", "answer"\n{lines}'))
    assert isinstance(broken[0], BadRecord) and broken[1:] == RECORDS


def test_lines_and_columns_of_errors_count_over_blocks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(json_files, "_BLOCK", 16)
    path = write(tmp_path / "x.json", "[\n" + "".join(f'  {{"a": {n}}},\n' for n in range(100)) + '  {"a": 1} x]')
    with pytest.raises(ValueError, match=r"line 102: .* column 12"):
        values(path)
    path = write(tmp_path / "y.json", b'[\n{"a": "' + b"x" * 50 + b'\n\xff"}]')
    with pytest.raises(ValueError, match=r"line [23]: "):
        values(path)
    with pytest.raises(ValueError, match=r"line 3: invalid UTF-8 in a JSON array"):
        values(write(tmp_path / "z.json", b'[\n1,\n"\xff"]'))
    with pytest.raises(ValueError, match=r"line 2: .*Extra data"):
        values(write(tmp_path / "w.json", '[{"a":\n1}] {}'))


@pytest.mark.parametrize(
    "tail", ['"abc', '{"a": "b" "c": 1}', "[" * 5000, '"\\x"'], ids=["string", "comma", "deep", "escape"]
)
def test_a_huge_broken_item_is_parsed_a_few_times(tmp_path: Path, tail: str, monkeypatch) -> None:
    monkeypatch.setattr(json_files, "_BLOCK", 1024)
    calls: list[int] = []
    parse = json_files.decoder.raw_decode

    class Counted:
        def raw_decode(self, text: str, at: int) -> Any:
            calls.append(len(text) - at)
            return parse(text, at)

    monkeypatch.setattr(json_files, "decoder", Counted())
    body = '{"a": "' + "y" * 500_000 + '", "b": ' + tail + "\n1" * 200_000
    with pytest.raises(ValueError, match="begins as a JSON array"):
        values(write(tmp_path / "x.json", "[" + body))
    assert sum(calls) < 8 * (len(body) + 1024)  # its first item is looked at to know the file, and then read


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    record = {"question": "What is it? " * 20, "answer": "It is. " * 60}
    peaks: dict[str, list[int]] = {"array": [], "pretty": [], "lines": [], "packed": [], "csv": []}
    for count in (3_000, 30_000):
        line = json.dumps(record)
        cells = f"{record['question']},{record['answer']}\n"
        files = {
            "array": write(tmp_path / "a.json", "[" + ", ".join([line] * count) + "]"),
            "pretty": write(tmp_path / "p.json", "[" + ", ".join([json.dumps(record, indent=2)] * count) + "]"),
            "lines": write(tmp_path / "l.jsonl", f"{line}\n" * count),
            "packed": write(tmp_path / "g.jsonl.gz", gzip.compress(f"{line}\n".encode() * count, 1)),
            "csv": write(tmp_path / "c.csv", "question,answer\n" + cells * count),
        }
        assert files["array"].stat().st_size > 650 * count
        for name, path in files.items():
            tracemalloc.start()
            assert sum(1 for _ in read_records(path)) == count
            peaks[name].append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    for name, (small, large) in peaks.items():
        assert large < small + 1_000_000, (name, small, large)
        assert large < 4_000_000, (name, large)


# ---- an object with lists ----


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "eval", "test"])
def test_an_object_with_lists(tmp_path: Path, indent: int | None, name: str) -> None:
    content = {"version": "1", name: RECORDS[1:], "about": {"train": 1}, "train": RECORDS}
    path = write(tmp_path / "x.json", codecs.BOM_UTF8 + json.dumps(content, indent=indent).encode())
    expected = [Record(n, record, "train record") for n, record in enumerate(RECORDS, 1)]
    assert list(read_records(path)) == list(read_records(path, part="train")) == expected
    assert list(read_records(path, part="eval")) == [Record(1, RECORDS[1], f"{name} record")]
    assert list(read_records(path, split=name)) == list(read_records(path, part="eval"))
    assert parts_of(path) == {"train", "eval"}
    with pytest.raises(ValueError, match=f"has no split 'other'; it has {name}, train"):
        values(path, split="other")


def test_which_list_is_for_evaluation(tmp_path: Path) -> None:
    content = {"train": RECORDS, "test": RECORDS[:1], "validation": RECORDS[1:], "dev": []}
    assert values(write(tmp_path / "a.json", json.dumps(content)), part="eval") == RECORDS[1:]
    only = write(tmp_path / "b.json", json.dumps({"validation": RECORDS, "dev": None}, indent=1))
    assert values(only, part="eval") == RECORDS and parts_of(only) == frozenset()
    with pytest.raises(ValueError, match="has no list 'train'; it has validation"):
        values(only)
    train = write(tmp_path / "c.json", json.dumps({"train": RECORDS}))
    assert values(train, part="eval") == RECORDS and parts_of(train) == frozenset()
    empty = write(tmp_path / "d.json", json.dumps({"train": RECORDS, "validation": []}))
    assert values(empty) == RECORDS and parts_of(empty) == frozenset()
    with pytest.raises(ValueError, match="holds no record"):
        values(empty, part="eval")
    wrong = write(tmp_path / "e.json", json.dumps({"train": RECORDS, "validation": {"a": 1}}))
    with pytest.raises(ValueError, match="its 'validation' is no list"):
        values(wrong)
    plain = write(tmp_path / "f.jsonl", "\n".join(map(json.dumps, RECORDS)))
    assert values(plain, part="eval") == RECORDS and parts_of(plain) == frozenset()
    with pytest.raises(ValueError, match="is one list and has no split 'test'"):
        values(plain, split="test")
    with pytest.raises(ValueError, match="part is 'test'; it is train, eval or None"):
        values(plain, part="test")


@pytest.mark.parametrize(
    "text",
    [
        '{"question": "a", "answer": "b", "test": ["assert f(1)"]}',
        '{"messages": [1], "validation": []}',
        '{"a": 1}\n{"train": [1]}',
        '{"train": [1]}\n{"train": [2]}',
        '{"test": ["x"], "a": "\n{"question": "a"}',
    ],
)
def test_records_that_are_no_object_with_lists(tmp_path: Path, text: str) -> None:
    records = list(read_records(write(tmp_path / "x.jsonl", text)))
    assert [record.unit for record in records] == ["line"] * len(text.splitlines())


def test_a_broken_object_with_lists(tmp_path: Path) -> None:
    text = json.dumps({"train": RECORDS, "validation": RECORDS}, indent=1)
    for broken in (text[:-30], text.replace('"answer"', "answer"), text + "}"):
        path = write(tmp_path / "x.json", broken)
        for look in (values, parts_of):
            with pytest.raises(
                ValueError, match=r"line \d+: the file begins as a JSON object with lists|begins with a JSON object"
            ):
                look(path)


# ---- compressed files ----


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz", "x.JSONL.GZ", "x.jsonl", "x", "x.gz"])
def test_gzip(tmp_path: Path, name: str) -> None:
    lines = "\n".join(map(json.dumps, RECORDS)).encode()
    assert values(write(tmp_path / name, gzip.compress(codecs.BOM_UTF8 + lines))) == RECORDS
    two = gzip.compress(lines + b"\n") + gzip.compress(lines)
    assert values(write(tmp_path / name, two)) == RECORDS * 2
    assert values(write(tmp_path / name, gzip.compress(json.dumps(RECORDS, indent=1).encode()))) == RECORDS
    content = {"train": RECORDS[:1], "dev": RECORDS[1:]}
    path = write(tmp_path / name, gzip.compress(json.dumps(content).encode()))
    assert values(path, part="eval") == RECORDS[1:] and parts_of(path) == {"train", "eval"}


def test_damaged_gzip(tmp_path: Path) -> None:
    data = gzip.compress(b"\n".join(json.dumps(row).encode() for row in numbered(1000)))
    for broken in (data[:-100], data[:200] + b"\xff\x00" + data[202:], data + b"more", data[:5]):
        path = write(tmp_path / "x.jsonl.gz", broken)
        with pytest.raises(ValueError, match=r"x\.jsonl\.gz is compressed by gzip and damaged: .*Make it again"):
            values(path)
    with pytest.raises(ValueError, match="holds no record"):
        values(write(tmp_path / "empty.gz", gzip.compress(b"")))


def test_what_else_is_compressed_is_refused_by_name(tmp_path: Path) -> None:
    import bz2
    import lzma
    import zipfile

    data = json.dumps(RECORDS[0]).encode()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.jsonl", data)
    cases = {
        "a zip archive": (tmp_path / "x.zip").read_bytes(),
        "compressed by xz; unpack it": lzma.compress(data),
        "compressed by bzip2; unpack it": bz2.compress(data),
        "compressed by zstd; unpack it": b"\x28\xb5\x2f\xfd" + data,
        "a pickle, which": gzip.compress(pickle.dumps(RECORDS)),
        r"a \.parquet file compressed by gzip, .* unpack it with gunzip": gzip.compress(b"PAR1...."),
        "a pointer of Git LFS.*git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    }
    for kind, content in cases.items():
        with pytest.raises(ValueError, match=f"x.jsonl is {kind}"):
            values(write(tmp_path / "x.jsonl", content))
    for name, kind in {"x.tar.gz": "an archive", "x.jsonl.zst": "compressed by zstd", "m.pt": "a pickle"}.items():
        with pytest.raises(ValueError, match=f"is {kind}"):
            values(write(tmp_path / name, data))


# ---- texts ----


def test_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", codecs.BOM_UTF8 + b'Once.\r\n\nTwice.\n{"a": 1}\n')
    assert list(read_records(path, texts=True)) == [Record(1, 'Once.\r\n\nTwice.\n{"a": 1}\n', "document")]
    assert values(write(tmp_path / "x.txt.gz", gzip.compress(b"Once.")), texts=True) == ["Once."]
    assert values(write(tmp_path / "x.jsonl", '{"text": "a"}\n'), texts=True) == [{"text": "a"}]
    assert values(write(tmp_path / "y.jsonl", '"a"\n"b"\n'), texts=True) == ["a", "b"]
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        values(write(tmp_path / "y.txt", b"caf\xe9"), texts=True)
    with pytest.raises(ValueError, match=r"holds no JSON: it begins with 'Once.'"):
        values(path)


def test_real_files(shared_data: Path) -> None:
    counts = {"gsm8k/train.jsonl": 7473, "gsm8k/test.jsonl": 1319, "alpaca/instruction-data.json": 1100}
    counts |= {"multiturn/dummy_conversation.json": 500, "toolcall/glaive_toolcall_en_demo.json": 300}
    counts |= {"preference/dpo_en_demo.json": 300}
    for name, count in counts.items():
        found = values(shared_data / name)
        text = (shared_data / name).read_text(encoding="utf-8")
        assert found == (json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()])
        assert len(found) == count
    shakespeare = shared_data / "text" / "tinyshakespeare.txt"
    assert values(shakespeare, texts=True) == [shakespeare.read_text()]


# ---- CSV ----


@pytest.mark.parametrize(("name", "delimiter"), [("x.csv", ","), ("x.tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv(tmp_path: Path, name: str, delimiter: str, end: str) -> None:
    rows = [["007", "1.50"], ["", "NA"], ["null", "true"], ['say "hi", or\n\nleave', "a\tb, c"], [" x ", "\U0001f600é"]]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows([["question", "answer"], *rows])
    data = codecs.BOM_UTF8 + text.getvalue().encode()
    expected = [{"question": question, "answer": answer} for question, answer in rows]
    records = list(read_records(write(tmp_path / name, data)))
    assert [record.value for record in records] == expected
    assert [(record.number, record.unit) for record in records] == [(n, "line") for n in (2, 3, 4, 5, 8)]
    assert values(write(tmp_path / f"{name}.gz", gzip.compress(data))) == expected


def test_bad_rows_of_csv(tmp_path: Path) -> None:
    text = b'q,a\n1,2\n3\n\n1,2,3\n"x"y,2\ncaf\xe9,2\n"two\nlines" z,2\na"b,"c\n\xffd"\n5,6\n'
    found = {record.number: record.value for record in read_records(write(tmp_path / "x.csv", text))}
    reasons = {
        3: "the row has 1 cell, but the header has 2",
        5: "the row has 3 cells, but the header has 2",
        6: "no CSV: .*expected after",
        7: "invalid UTF-8: byte 0xe9 at position 3 of a line",
        8: "no CSV in lines 8 to 9: ",
        10: "invalid UTF-8: byte 0xff",
    }
    assert found.keys() == reasons.keys() | {2, 12}
    assert (found[2], found[12]) == ({"q": "1", "a": "2"}, {"q": "5", "a": "6"})
    for number, reason in reasons.items():
        with pytest.raises(FormatError, match=reason):
            to_conversation(found[number])
    assert values(write(tmp_path / "y.csv", f"q,a\n1,{'x' * 1_000_000}\n"))[0]["a"] == "x" * 1_000_000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "", "is empty"),
        ("x.csv", "q,a\n", "holds no record"),
        ("x.csv", "\n\n", "holds no record"),
        ("x.csv", 'q,a\n1,2\n3,"4\n5,6\n', "line 3: a quote that is opened here or soon after is not closed"),
        ("x.csv", 'q,"a\n1,2\n', "line 1: a quote"),
        ("x.csv", '"q"x,a\n1,2\n', "the header cannot be read"),
        ("x.csv", "q,a,q\n1,2,3\n", "the header names 'q' twice"),
        ("x.csv", "q;a\n1;2\n", "seem to be separated by ';'. Save the file with ','"),
        ("x.csv", "q\ta\n1\t2\n", "or name it .tsv"),
        ("x.tsv", "q,a\n1,2\n", "seem to be separated by ','"),
        ("x.csv", '{"question": "a"}\n', "holds JSON, not a table.*Name it .jsonl"),
        ("x.csv", '[\n{"question": "a"}]', "holds JSON, not a table"),
    ],
)
def test_files_that_are_no_csv(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        values(write(tmp_path / name, text))


# ---- Parquet and Arrow ----


def save(path: Path, rows: Any, **settings: Any) -> Path:
    """A table in the format of the path's ending: .parquet, .arrow (stream), .feather (file)."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, **settings)
        return path
    new = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, **settings)
    return path


TABLES = ("x.parquet", "x.arrow", "x.feather")


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path: Path, name: str) -> None:
    rows = [{"messages": TURNS, "id": n, "tags": None if n % 2 else ["a", str(n)], "s": "007"} for n in range(700)]
    records = list(read_records(save(tmp_path / name, rows)))
    assert records == [Record(n, row, "row") for n, row in enumerate(rows, 1)]
    other = tmp_path / "data"
    (tmp_path / name).rename(other)  # known by its first bytes
    assert values(other) == rows
    assert values(other, part="eval") == rows and parts_of(other) == frozenset()
    with pytest.raises(ValueError, match="has no split"):
        values(other, split="train")


@pytest.mark.parametrize("name", TABLES)
def test_damaged_tables(tmp_path: Path, name: str) -> None:
    data = save(tmp_path / name, numbered(500)).read_bytes()
    with pytest.raises(ValueError, match=r"is no (Parquet|Arrow) file that can be read: .*Make it again"):
        values(write(tmp_path / name, data[: len(data) // 2]))
    with pytest.raises(ValueError, match=r"is no (Parquet|Arrow) file that can be read"):
        values(write(tmp_path / name, b'{"question": "a", "answer": "b"}\n'))


@pytest.mark.parametrize("name", TABLES[:2])
def test_tables_hold_one_piece_in_memory(tmp_path: Path, name: str) -> None:
    import pyarrow as pa

    row = {"question": "What is it? " * 20, "answer": "It is. " * 60}
    peaks = []
    for count in (3_000, 30_000):
        size = {"row_group_size": 1000, "use_dictionary": False} if name == "x.parquet" else {"max_chunksize": 1000}
        path = save(tmp_path / name, [row] * count, **size)
        before, peak = pa.total_allocated_bytes(), 0
        for record in read_records(path):
            if record.number % 50 == 0:
                peak = max(peak, pa.total_allocated_bytes() - before)
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 1_000_000


def test_values_of_tables(tmp_path: Path) -> None:
    import pyarrow as pa

    texts = pa.array(["good", "x"], pa.string())
    bad_text = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"good", b"\xff"], pa.binary()).buffers()[1:]])
    path = save(tmp_path / "x.feather", pa.table({"a": texts, "b": bad_text}))
    with pytest.raises(ValueError, match="Invalid UTF8"):
        values(path)
    many = pa.table([texts, texts], names=["a", "a"])
    with pytest.raises(ValueError, match="two columns are called 'a'"):
        values(save(tmp_path / "y.feather", many))
    if not hasattr(pa, "json_"):
        pytest.skip("this pyarrow has no JSON type")
    cells = pa.array(['{"x": [1]}', None, "{"]).cast(pa.json_())
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 2, 3], pa.int32()), cells)
    found = values(save(tmp_path / "z.feather", pa.table({"j": cells, "l": lists})))
    assert found[:2] == [{"j": {"x": [1]}, "l": [{"x": [1]}, None]}, {"j": None, "l": []}]
    assert isinstance(found[2], BadRecord) and "no JSON" in found[2].reason


# ---- data sets of the library datasets ----


def test_saved_data_sets(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = [{"messages": TURNS, "n": n} for n in range(600)]
    one, split = tmp_path / "one", tmp_path / "split"
    Dataset.from_list(rows).save_to_disk(one, num_shards=3)
    few = Dataset.from_list(rows).shuffle(seed=0).select(range(7))
    DatasetDict({"train": Dataset.from_list(rows), "test": few}).save_to_disk(split)
    assert list(read_records(one)) == [Record(n, row, "row") for n, row in enumerate(rows, 1)]
    assert values(one, part="eval") == rows and parts_of(one) == frozenset()
    assert next(read_records(split)) == Record(1, rows[0], "train row")
    assert values(split) == rows and parts_of(split) == {"train", "eval"}
    assert values(split, part="eval") == values(split, split="test") == few.to_list()
    assert parts_of(split, split="test") == frozenset()
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, test"):
        values(split, split="dev")
    assert content_hash(one) == content_hash(one) != content_hash(split)
    copy = tmp_path / "copy"
    Dataset.from_list([*rows[1:], rows[0]]).save_to_disk(copy)
    assert content_hash(copy) != content_hash(one)
    shard = next(one.glob("*.arrow"))
    write(shard, shard.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"looks like a data set of save_to_disk|is no data set that can be read"):
        values(one)


def test_the_hub(tmp_path: Path, monkeypatch) -> None:
    import datasets

    rows = datasets.Dataset.from_list(numbered(3))
    asked = []

    def load_dataset(name, config, *, split, revision, streaming):
        asked.append((name, config, split, revision))
        if streaming:
            return datasets.IterableDatasetDict({"train": rows.to_iterable_dataset()})
        if name != "own/data":
            raise FileNotFoundError(f"Couldn't find any data at {name}.")
        return rows if split else datasets.DatasetDict({"train": rows, "validation": rows.select([1])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert values("own/data") == numbered(3)
    assert values("own/data", part="eval") == numbered(3)[1:2]
    assert parts_of("own/data") == {"train", "eval"}
    assert values("own/data", config="main", split="train[:50%]", revision="v1") == numbered(3)
    assert asked == [("own/data", None, None, None), ("own/data", "main", "train[:50%]", "v1")]  # loaded once each
    assert content_hash("own/data") == content_hash("own/data") != content_hash("own/data", split="train")
    for _ in range(2):  # a stream begins anew
        assert [record.value for record in read_records("own/data", streaming=True)] == numbered(3)
    assert content_hash("own/data", streaming=True) == content_hash("own/data", streaming=True)
    with pytest.raises(
        ValueError,
        match=r"no/data: no such file or folder under .*no data set of the hub .* by that name, revision v2: FileNotFoundError: "
        "Couldn't find any data .*download the data set elsewhere",
    ):
        values("no/data", revision="v2")
    for missing in ("data", "own/data.jsonl", "own/data.csv.gz", "/own/data", "own/data/x", "own/data.pkl"):
        with pytest.raises(ValueError, match=r"no such data file. Check the path"):
            values(missing)
    write(tmp_path / "own" / "data" / "a.jsonl", json.dumps(RECORDS[0]))
    assert values("own/data") == RECORDS[:1]  # a folder of that name counts
    with pytest.raises(ValueError, match="config is 'main', which is for data sets of the hub"):
        values("own/data", config="main")


def test_a_stream_is_known_by_size_and_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(RECORDS[0]))
    os.utime(path, (1e9, 1e9))
    before, read = content_hash(path, streaming=True), content_hash(path)
    assert content_hash(path, streaming=True) == before != read
    os.utime(path, (2e9, 2e9))
    assert content_hash(path, streaming=True) != before and content_hash(path) == read


def test_the_hub_out_of_reach() -> None:
    with pytest.raises(ValueError, match=r"nobody/has-this: no such file or folder under .*Check the name"):
        values("nobody/has-this")


# ---- folders ----


def test_folders(tmp_path: Path, caplog) -> None:
    from_csv = [{"question": "c", "answer": "1"}]
    write(tmp_path / "b.jsonl", json.dumps(RECORDS[0]))
    write(tmp_path / "a" / "z.csv.gz", gzip.compress(b"question,answer\nc,1\n"))
    save(tmp_path / "a" / "deep" / "y.parquet", numbered(2))
    write(tmp_path / "c.json", json.dumps(RECORDS))
    write(tmp_path / ".hidden.jsonl", "{broken")
    write(tmp_path / ".git" / "x.jsonl", "{broken")
    write(tmp_path / "empty.jsonl", "")
    records = list(read_records(tmp_path))
    assert caplog.text == ""
    files = ["a/deep/y.parquet"] * 2 + ["a/z.csv.gz", "b.jsonl", "c.json", "c.json"]
    assert [(record.file, record.value) for record in records] == list(
        zip(files, [*numbered(2), *from_csv, RECORDS[0], *RECORDS], strict=True)
    )
    assert [record.number for record in records] == [1, 2, 2, 1, 1, 2]
    assert parts_of(tmp_path) == frozenset() and values(tmp_path, part="eval") == values(tmp_path)
    before = content_hash(tmp_path)
    write(tmp_path / "README.md", "# About")
    write(tmp_path / "dataset_info.json", "{}")
    with caplog.at_level(logging.WARNING):
        assert content_hash(tmp_path) == before and len(values(tmp_path)) == 6
    assert caplog.text.count("2 files of other kinds are not read: README.md, dataset_info.json") == 1
    (tmp_path / "b.jsonl").rename(tmp_path / "d.jsonl")
    assert content_hash(tmp_path) != before
    with pytest.raises(ValueError, match="are one list, and there is no split 'train'"):
        values(tmp_path, split="train")


def test_folders_of_texts(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "One.")
    write(tmp_path / "b" / "a.txt", "Two.")
    write(tmp_path / "c.jsonl", '{"text": "Three."}')
    assert list(read_records(tmp_path, texts=True)) == [
        Record(1, "One.", "document", "a.txt"),
        Record(1, "Two.", "document", "b/a.txt"),
        Record(1, {"text": "Three."}, "line", "c.jsonl"),
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"),
        ("my_train.jsonl", "my_dev.jsonl"),
        ("train/a.jsonl", "val/train-a.x.jsonl", "val/b.jsonl")[::2],
        ("Train_sft.jsonl.gz", "eval/x.jsonl.gz"),
    ],
)
def test_files_named_for_training_and_evaluation(tmp_path: Path, names: tuple[str, str], caplog) -> None:
    for name, record in zip(names, RECORDS, strict=True):
        write(tmp_path / name, json.dumps(record))
    assert values(tmp_path) == RECORDS[:1] and values(tmp_path, part="eval") == RECORDS[1:]
    assert parts_of(tmp_path) == {"train", "eval"}
    (record,) = read_records(tmp_path)
    assert (record.unit, record.file) == ("train line", names[0])
    assert caplog.text == ""


def test_folders_of_which_some_files_are_named_for_evaluation(tmp_path: Path, caplog) -> None:
    for name in ("data.jsonl", "unit-test.jsonl", "testing.jsonl"):
        write(tmp_path / name, json.dumps(RECORDS[0]))
    with caplog.at_level(logging.WARNING):
        assert len(values(tmp_path)) == 3 and parts_of(tmp_path) == frozenset()
    assert caplog.text.count("all 3 files are read as one list, also unit-test.jsonl. If") == 1


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no data file. Name a folder with files that end in .jsonl"):
        values(write(tmp_path / "none" / "README.md", "x").parent)
    for name, kind in {"x.pkl": "a pickle", "x.jsonl.zst": "compressed by zstd", "x.zip": "an archive"}.items():
        folder = write(tmp_path / kind / "a.jsonl", json.dumps(RECORDS[0])).parent
        with pytest.raises(ValueError, match=f"{name} is {kind}.*Take it out of the folder"):
            values(write(folder / name, "x").parent)
    lists = write(tmp_path / "lists" / "a.json", json.dumps({"train": RECORDS, "test": RECORDS})).parent
    with pytest.raises(ValueError, match=r"a\.json holds several lists; in a folder each file is one"):
        values(lists)
    broken = tmp_path / "broken"
    write(broken / "a.jsonl", json.dumps(RECORDS[0]))
    (broken / "b.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"b\.jsonl is a link to nothing"):
        values(broken)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "real" / "a.jsonl", json.dumps(RECORDS[0]))
    data = write(tmp_path / "data" / "b.jsonl", json.dumps(RECORDS[1])).parent
    (data / "link").symlink_to(tmp_path / "real")
    (data / "loop").symlink_to(data)
    assert [record.file for record in read_records(data)] == ["b.jsonl", "link/a.jsonl"]


# ---- hashes, checks, words ----


def test_the_hash_follows_the_contents(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", json.dumps(RECORDS[0]))
    assert content_hash(path) == content_hash(str(path)) == hash_files([path])
    same = content_hash(write(tmp_path / "y.jsonl", json.dumps(RECORDS[0])))
    assert same == content_hash(path) != content_hash(write(tmp_path / "z.jsonl", json.dumps(RECORDS[1])))
    with pytest.raises(ValueError, match="no such data file"):
        content_hash(tmp_path / "none.jsonl")


def test_files_are_checked(tmp_path: Path, monkeypatch) -> None:
    assert check_file(str(write(tmp_path / "x.jsonl", "{}"))) == tmp_path / "x.jsonl"
    with pytest.raises(ValueError, match="is a folder, but a data file is wanted"):
        check_file(tmp_path)
    with pytest.raises(ValueError, match="the path of the data is empty"):
        values("")

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    for look in (values, parts_of, content_hash):
        with pytest.raises(ValueError, match=r"x\.jsonl cannot be read: Permission denied. Check the path"):
            look(tmp_path / "x.jsonl")


def test_shorten() -> None:
    assert shorten("a \n b") == "a b" and shorten({"a": 1}) == "{'a': 1}"
    assert shorten("x" * 61) == "x" * 57 + "..." and shorten("x" * 60) == "x" * 60
    assert shorten("x" * 10_000_000) == "x" * 57 + "..."
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shorten(deep) == "list that cannot be shown"
