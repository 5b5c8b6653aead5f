"""The WeDLM example's parts: data that cannot be remembered, and a model that decodes in parallel what it has learned."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import runs

EXAMPLE = runs.ROOT / "examples" / "wedlm"


def test_held_out_people_are_new_and_answers_complete(tmp_path) -> None:
    for folder in ("a", "b"):
        command = [sys.executable, EXAMPLE / "make_records.py", tmp_path / folder, "--records", "400"]
        subprocess.run(command, check=True, timeout=120)
    files = {name: (tmp_path / "a" / f"{name}.jsonl").read_text() for name in ("train", "eval")}
    assert files["train"] == (tmp_path / "b" / "train.jsonl").read_text()
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}
    assert len(rows["train"]) == 400 and len(rows["eval"]) == 200
    answers = {name: {answer["content"] for _, answer in found} for name, found in rows.items()}
    assert not answers["train"] & answers["eval"]
    for question, answer in rows["train"] + rows["eval"]:
        person = json.loads(answer["content"])
        assert list(person) == ["name", "town", "trade", "pet"] and all(
            v in question["content"] for v in person.values()
        )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_example_keeps_its_promise(tmp_path) -> None:
    """2.5 tokens per pass within 2 points of accuracy; with verify more than 1.5, exactly as one by one. After two of the
    example's three epochs that is a matter of luck: 100 % or 93.5 % at 3.6 tokens per pass, by the rounding of a machine."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(runs.ROOT)}
    process = subprocess.run([EXAMPLE / "run", tmp_path / "out"], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stdout + process.stderr[-3000:]
