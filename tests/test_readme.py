"""The commands that README.md shows are accepted as they stand."""

from __future__ import annotations

import re
import shlex

import pytest
import runs

from hf_sft.parsing import parse_args


def commands() -> list[str]:
    text = (runs.ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [line for line in lines if re.match(r"(python|torchrun)\b.* ?train\.py\b|hf-sft train\b", line)]


def test_there_are_commands() -> None:
    assert len(commands()) >= 5


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_is_accepted(command: str, monkeypatch) -> None:
    monkeypatch.chdir(runs.ROOT)
    words = shlex.split(command, comments=True)
    words = words[words.index("train.py" if "train.py" in words else "train") + 1 :]
    if "--help" not in words:
        assert parse_args(words).data.train_file
