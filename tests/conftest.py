"""Fixtures; and the rule that tests never reach for a hub."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import tiny

# Files that take minutes begin first, so that no core is left with one of them at the end.
LONGEST = (
    "wedlm_example",
    "engines",
    "dpo",
    "launchers",
    "resume",
    "ranks",
    "kill",
    "real_answers",
    "families",
    "freezing",
    "ready_files",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of files; that of tests in a file stays."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def shared_data() -> Path:
    """Folder of public data sets beside the checkout; tests that need it skip where it is absent."""
    if not tiny.SHARED.is_dir():
        pytest.skip(f"no public data at {tiny.SHARED}")
    return tiny.SHARED


@pytest.fixture(autouse=True)
def own_data_cache(tmp_path_factory, monkeypatch) -> None:
    """Each test has a data cache of its own."""
    monkeypatch.setenv("HF_SFT_CACHE", str(tmp_path_factory.mktemp("data_cache")))


@pytest.fixture(autouse=True)
def own_logger_state() -> Iterator[None]:
    """Commands set up the terminal's log for their process; every test begins and ends without it."""
    _quiet_logger()
    yield
    _quiet_logger()


def _quiet_logger() -> None:
    logger = logging.getLogger("hf_sft")
    logger.setLevel(logging.NOTSET)
    logger.handlers, logger.propagate = [], True


@pytest.fixture
def no_engine_starts(monkeypatch) -> Iterator[None]:
    """Settings are built and no process group is; what transformers writes into the environment goes again."""
    pytest.importorskip("deepspeed")
    monkeypatch.setattr("hf_sft.training_arguments.enter_process_group", lambda training: None)
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
