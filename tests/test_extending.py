"""The examples of docs/extending.md run as they stand, one after the other in one process of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import runs
import tiny

PAGE = runs.ROOT / "docs" / "extending.md"
TITLES = ("A data format", "A chat template", "A model family", "An objective", "A task", "An attention backend")


def examples() -> dict[str, str]:
    """Title -> the example below it."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        section.splitlines()[0]: "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
        for section in sections
    }


def run_all(folder: str) -> None:
    """Each example in a namespace of its own; what went wrong is written beside them."""
    failed = {}
    names = {"MODEL": f"{folder}/model", "FOLDER": folder, "CHATS": tiny.conversations(20)}
    for title, text in examples().items():
        try:
            code = compile(text, f"docs/extending.md, {title}", "exec", dont_inherit=True)
            exec(code, {"__name__": "__main__", **names})
        except Exception:
            failed[title] = traceback.format_exc()
    Path(folder, "failed.json").write_text(json.dumps(failed))


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("extending")
    tiny.save_tiny(folder / "model")
    command = [sys.executable, "-c", "import sys, test_extending; test_extending.run_all(sys.argv[1])", str(folder)]
    process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads((folder / "failed.json").read_text())


def test_the_page_has_its_sections():
    assert tuple(examples()) == TITLES


@pytest.mark.parametrize("title", TITLES)
def test_an_example_runs(title: str, failed):
    assert examples()[title], "there is an example"
    assert title not in failed, failed.get(title)


def test_the_files_that_are_named_are_there():
    for name in re.findall(r"`((?:hf_sft|tests|docs|benchmarks)/[\w./]*)`", PAGE.read_text(encoding="utf-8")):
        assert "NAME" in name or (runs.ROOT / name).exists(), name
    text = PAGE.read_text(encoding="utf-8")
    for file, word in (
        ("hf_sft/data/formats.py", "DATA_FORMATS"),
        ("hf_sft/data/templates.py", "_NEEDED_TOKENS"),
        ("hf_sft/sources.py", "FIELDS"),
        ("hf_sft/attention/backends.py", "_ELSEWHERE"),
        ("hf_sft/objectives.py", "build_objective"),
        ("tests/tiny.py", "FAMILIES"),
        ("tests/test_tree.py", "FLOORS"),
        ("benchmarks/memory.py", "SHAPES"),
    ):
        assert f"`{word}`" in text and word in (runs.ROOT / file).read_text(encoding="utf-8"), (file, word)
