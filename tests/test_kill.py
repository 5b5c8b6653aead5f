"""A run that is killed at any point, or whose disk is full, loses nothing but the work since its last checkpoint."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import runs
import torch

from hf_sft.checkpoints import MARKER, checkpoints_in, incomplete, last_complete_checkpoint, resolve_resume


@pytest.mark.slow
def test_killed_anywhere_and_resumed_equals_undisturbed(tmp_path) -> None:
    """In a process of its own, which forks one for each case: 20 named points and 10 random moments."""
    command = [sys.executable, str(Path(__file__).with_name("kill_cases.py")), str(tmp_path)]
    path = os.pathsep.join([str(runs.ROOT), str(runs.ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_SFT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"mode"')]
    assert [case for case in cases if case["wrong"] or not case["killed"]] == []
    named = [case for case in cases if "after the first step" not in case["point"]]
    assert len(named) == 20 and len(cases) == 30
    assert Counter(case["mode"] for case in named) == {"lora": 10, "full": 10}
    assert len({case["from"] for case in cases}) >= 4  # from the start, and from several checkpoints


# ---- damage ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_SFT_CACHE", str(folder / "cache"))
        values = runs.arguments(
            folder, max_steps=6, save_strategy="steps", save_steps=2, train_mode="lora", lora_rank=2,
            eval_file=str(folder / "eval.jsonl"), eval_strategy="steps", eval_steps=2, metric_for_best_model="perplexity",
        )  # fmt: skip
        return runs.train(values)


def test_what_a_checkpoint_holds(trained) -> None:
    assert list(checkpoints_in(trained)) == [6, 4, 2]
    marker = json.loads((trained / "checkpoint-6" / MARKER).read_text())
    held = {path.name: path.stat().st_size for path in (trained / "checkpoint-6").iterdir() if path.name != MARKER}
    assert marker == {"step": 6, "processes": 1, "resumable": True, "files": held}
    assert {"progress.json", "args.json", "trainer_state.json", "adapter_model.safetensors", "optimizer.pt"} <= set(
        held
    )
    progress = json.loads((trained / "checkpoint-6" / "progress.json").read_text())
    assert (progress["epoch"], progress["bins"], progress["global_batch"], progress["processes"]) == (0, 12, 2, 1)
    state = json.loads((trained / "checkpoint-6" / "trainer_state.json").read_text())
    values = {line["step"]: line["eval_perplexity"] for line in state["log_history"] if "eval_perplexity" in line}
    best = f"checkpoint-{min(values, key=values.__getitem__)}"
    assert (os.readlink(trained / "best"), os.readlink(trained / "last")) == (best, "checkpoint-6")
    assert Path(state["best_model_checkpoint"]).name == best
    assert not list(trained.glob(".*"))


@pytest.mark.parametrize("damage", ["removed", "emptied", "truncated"])
def test_each_damaged_file_of_the_newest_leads_to_the_one_before(trained, tmp_path, caplog, damage: str) -> None:
    for number in (4, 6):
        shutil.copytree(trained / f"checkpoint-{number}", tmp_path / f"checkpoint-{number}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    files = sorted(path for path in (tmp_path / "checkpoint-6").iterdir())
    assert len(files) >= 12
    for file in files:
        whole = file.read_bytes()
        if damage == "removed":
            file.unlink()
        else:
            file.write_bytes(b"" if damage == "emptied" else whole[: len(whole) // 2])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert resolve_resume(tmp_path, "auto") == str(tmp_path / "checkpoint-4"), file.name
        assert "checkpoint-6 is skipped: " in caplog.text and file.name in caplog.text
        file.write_bytes(whole)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_a_file_of_the_right_size_that_cannot_be_read(trained, tmp_path) -> None:
    folder = shutil.copytree(trained / "checkpoint-6", tmp_path / "checkpoint-6")
    for name in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(b"\0" * len(whole))
        assert name in str(incomplete(folder))
        (folder / name).write_bytes(whole)
    assert incomplete(folder) is None


# ---- a full disk ----

WRITES = {  # what is larger than the limit, which the run meets at its second checkpoint
    "model.safetensors": {},
    "optimizer.pt": {"train_mode": "lora", "lora_rank": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("file", WRITES)
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, file: str) -> None:
    """The kernel refuses to write beyond a size, in the middle of a file."""
    values = runs.arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=6, **WRITES[file])
    out = tmp_path / "out"
    runs.train({**values, "max_steps": 2})
    before = {path.name: path.read_bytes() for path in (out / "checkpoint-2").iterdir()}
    written = ("args.json", "log.jsonl", "report.html")  # by every run, also by one that fails
    result = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name not in written}
    sizes = {name: len(content) for name, content in before.items()}
    limit = sizes[file] - 100
    assert all(size < limit for name, size in sizes.items() if name not in (file, "optimizer.pt"))
    (tmp_path / "more.json").write_text(json.dumps({**values, "resume_from_checkpoint": "auto"}))
    command = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    command += "from hf_sft.cli import main; sys.exit(main(sys.argv[1:]))"
    done = runs.launch(["-c", command, "train", str(tmp_path / "more.json")])
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr and "checkpoint-4 cannot be written" in done.stderr
    assert ("optimizer.pt: " if file == "optimizer.pt" else "File too large") in done.stderr
    assert "resume_from_checkpoint auto" in done.stderr and "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in (out / "checkpoint-2").iterdir()} == before
    assert result.items() <= {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}.items()
    assert not list(out.glob(".*")) and not (out / "checkpoint-4").exists()
    runs.train({**values, "resume_from_checkpoint": "auto"})
    undisturbed = runs.train({**values, "output_dir": str(tmp_path / "undisturbed")})
    assert all(torch.equal(weight, runs.weights(out)[name]) for name, weight in runs.weights(undisturbed).items())


def test_a_result_that_cannot_be_written_leaves_the_one_before(tmp_path) -> None:
    _, trainer = runs.train_in_memory(runs.arguments(tmp_path, max_steps=2))
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with torch.no_grad():
        next(iter(trainer.model.parameters())).add_(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["model.safetensors"]) - 100, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"out cannot be written .*GiB are free there\): .*as it was"):
            trainer.save_model()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert not list(out.glob(".*"))
    trainer.save_model()
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]
