"""The terminal view loses no character of a record, and obeys none."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from test_inspection import END, IM_START, SOUND, TOKENIZER, bad, chat, look, sound, unlearn

from hf_sft import terminal
from hf_sft.inspection import Inspection


def printed(
    inspection: Inspection, *, width: int = 100, colour: bool = False, tokens: bool = False, encoding: str = "utf-8"
) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace", newline="\n")
    console = Console(
        file=file,
        width=width,
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        legacy_windows=False,
    )
    terminal.show(inspection, console, tokens=tokens)
    file.flush()
    return file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_what_is_learned_stands_between_brackets() -> None:
    out = printed(look([chat("Hi", "Hello", "And?", "Bye"), *SOUND], rows={"train": [0]}, packing=False))
    sample = out[out.index("asked for: row 0, record 1 of train.jsonl") :].split("\n", 1)[1]
    assert re.findall("\u27e6(.*?)\u27e7", sample, re.S) == ["Hello<|im_end|>", "Bye<|im_end|>"]
    assert sample.replace("\u27e6", "").replace("\u27e7", "").rstrip("\n") == TOKENIZER.decode(
        chat("Hi", "Hello", "And?", "Bye")["input_ids"]
    ).rstrip("\n")


def test_colours_in_place_of_brackets() -> None:
    out = printed(look([chat("Hi", "Hello"), *SOUND], rows={"train": [0]}), colour=True)
    assert "\u27e6" not in out
    assert "\x1b[32mHello\x1b[0m\x1b[1;4;35m<|im_end|>\x1b[0m" in out


def test_a_terminal_without_unicode() -> None:
    out = printed(look([chat("Hi", "H\u00e9"), *SOUND], rows={"train": [0]}), encoding="ascii")
    assert "[[H\\xe9<|im_end|>]]" in out and "# " in out and out.isascii()


HOSTILE = "\x1b[2J\x1b]0;title\x07 [red]x[/red] [bold :smile: a\rb \u202eevil\u202c \x9b31m \x00 \u27e6fake\u27e7 \ud7ff\u200b"


@pytest.mark.parametrize("colour", [False, True])
def test_a_record_cannot_drive_the_terminal(colour) -> None:
    report = {
        **bad(1),
        "sources": [{"source": HOSTILE}],
        "formats": {HOSTILE: 41},
        "special_tokens_in_text": {HOSTILE: 1},
    }
    report["bad"] = {"count": 1, "reasons": {HOSTILE: 1}, "examples": [HOSTILE]}
    inspection = look([chat(HOSTILE, HOSTILE), *SOUND], report=report, rows={"train": [0]})
    for tokens in (False, True):
        out = printed(inspection, colour=colour, tokens=tokens, width=300)
        assert set(re.findall(r"\x1b[^m]*m", out)) == set(re.findall(r"\x1b\[[0-9;]*m", out))
        assert not re.search("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b]", out)
        assert colour or "\x1b" not in out
        if not tokens:
            assert "\u241b[2J" in out and "[red]x[/red]" in out and ":smile:" in out and "<U+202E>evil" in out
            assert "a\u240db" in out and "\u2400" in out


def test_faked_brackets_are_written_by_number() -> None:
    out = printed(look([chat("\u27e6Hi\u27e7", "Hello"), *SOUND], rows={"train": [0]}, packing=False))
    assert "<U+27E6>Hi<U+27E7>" in out and "\u27e6Hello<|im_end|>\u27e7" in out


def test_each_token_on_request() -> None:
    out = printed(look([chat("Hi \U0001f642", "Yes"), *SOUND], rows={"train": [0]}, packing=False), tokens=True)
    lines = [line.split(maxsplit=3) for line in out.splitlines()]
    smile = " ".join(map(str, TOKENIZER.backend_tokenizer.encode("\U0001f642").ids))
    assert any(line[:1] == ["0"] and line[1:3] == [str(IM_START), "-100"] and "special" in line[3] for line in lines)
    assert f"{smile}  -100" in out and "'\U0001f642'" in out
    yes = TOKENIZER.backend_tokenizer.encode("Y").ids[0]
    assert any(line[1:3] == [str(yes), str(yes)] for line in lines if len(line) == 4)


def test_cuts_are_told() -> None:
    out = printed(look([chat("a" * 500, "b" * 700)], most_tokens=100))
    assert re.search(r"a \.\.\. 1,\d\d\d tokens \.\.\. \n\u27e6b", out)


def test_figures_and_findings_are_printed() -> None:
    out = printed(look([unlearn(SOUND[0], END), *SOUND[1:]], sound(9, seed=1), report=bad(3)), width=70)
    assert (
        "ERROR  train: 3 of 43 records (7.0 %) cannot be used" in out and "findings: 1 error, 1 warning, 1 note" in out
    )
    assert "WARNING  train: 1 of 40 documents (2.5 %)" in out and "an object with no known keys" in out
    assert "train, packed: bin 0 of" in out and "document 1: row" in out
    assert max(map(len, out.splitlines())) <= 70
    assert "findings: nothing that usually goes wrong" in printed(look(SOUND))
