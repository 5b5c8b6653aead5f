"""The shape of the repository: imports point down, exports are exact, files stay short, configurations parse."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
from pathlib import Path

import pytest

import hf_sft
from hf_sft.parsing import parse_args

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(ROOT.glob("hf_sft/**/*.py"))
SOURCES = [*MODULES, *sorted(ROOT.glob("*.py"))]
ENGINE_FILES = [
    ROOT / "train_args" / engine for engine in ("deepspeed", "fsdp")
]  # tests/test_engine_files.py reads them
CONFIGS = sorted(
    path
    for path in ROOT.glob("train_args/**/*")
    if path.suffix in (".json", ".yaml", ".yml") and path.parent not in ENGINE_FILES
)

# Imports go down, or from left to right within a floor (a module may import those before it).
FLOORS: list[list[str]] = [
    [
        "arguments",
        "imports",
        "conversion",
        "sources",
        "locks",
        "legacy.rules",
        "legacy.",
        "legacy",
        "text_checks",
        "checks",
        "evaluation_checks",
        "engines",
        "launchers",
        "training_arguments",
        "help",
        "parsing",
    ],
    [
        "data.",
        "final_answers",
        "answer_metrics",
        "tensor_files",
        "products",
        "losses",
        "preference_losses",
        "jumps",
        "metrics",
        "attention.layout",
        "attention",
        "noise",
        "streams",
    ],
    [
        "models.wrappers",
        "models.",
        "models",
        "attention.",
        "collators",
        "data.rows",
        "data.prepared",
        "data.pipeline",
        "data.live",
        "objectives",
        "checkpoints.",
        "checkpoints",
    ],
    [
        "merging.folders",
        "merging.",
        "merging",
        "converting",
        "exporting",
        "decoding.",
        "decoding",
        "generation",
        "prompts",
        "answering",
        "evaluation",
        "drawing",
        "inspection.",
        "inspection",
        "terminal",
        "pages",
        "inspection.page",
        "reports.",
        "reports",
        "memory.counting",
        "memory.states",
        "memory.activations",
        "memory.plan",
        "memory.advice",
        "memory",
        "training.callbacks",
        "training",
    ],
    [
        "training.setup",
        "training.workers",
        "training.bin_trainer",
        "training.recomputing",
        "training.thawing",
        "training.preemption",
        "training.together",
        "training.sharded_trainer",
        "training.failures",
        "training.resuming_trainer",
        "training.checkpoint_trainer",
        "training.averaging_trainer",
        "training.early_stopping",
        "training.divergence",
        "training.profiling",
        "training.monitoring",
        "training.answering_trainer",
        "training.trainer",
        "training.reference",
        "training.dpo",
    ],
    ["tasks", "commands", "commands.options", "commands.train", "commands."],
    ["cli"],
]
LAZY = {"", "cli"}  # the package's exports and the dispatcher of commands


def module_name(path: Path) -> str:
    """ "data.chat" for hf_sft/data/chat.py, "data" for its __init__, "" for the package itself."""
    parts = path.relative_to(ROOT / "hf_sft").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def floor_of(name: str) -> int:
    """The exact name decides, then the package that an entry with a dot at its end stands for."""
    for level, names in enumerate(FLOORS):
        if name in names:
            return level
    for level, names in enumerate(FLOORS):
        if any(entry.endswith(".") and (name + ".").startswith(entry) for entry in names):
            return level
    raise AssertionError(f"hf_sft.{name} has no floor: add it to FLOORS")


def imports_of(path: Path) -> set[str]:
    """Modules of the project that a file imports, inside functions too; not those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else node.module or ""
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    known = {f"hf_sft.{module_name(module)}".rstrip(".") for module in MODULES}
    return {name.removeprefix("hf_sft").removeprefix(".") for name in found & known} - {""}


GRAPH = {module_name(path): imports_of(path) for path in MODULES}


@pytest.mark.parametrize("name", sorted(set(GRAPH) - LAZY))
def test_imports_point_down(name):
    above = {other for other in GRAPH[name] - {name} if floor_of(other) > floor_of(name)}
    assert above == set(), f"hf_sft.{name} imports from a floor above its own"


@pytest.mark.parametrize("level", range(len(FLOORS)))
def test_named_modules_import_from_left_to_right(level):
    order = {name: index for index, name in enumerate(FLOORS[level]) if not name.endswith(".")}
    for name in order.keys() & GRAPH.keys():
        wrong = {other for other in GRAPH[name] & order.keys() if order[other] > order[name]}
        assert wrong == set(), f"hf_sft.{name} imports a module to its right"


def test_no_import_cycles():
    graph = {name: imports - LAZY for name, imports in GRAPH.items() if name not in LAZY}
    while graph:
        leaves = {name for name, imports in graph.items() if not (imports & graph.keys()) - {name}}
        assert leaves, f"a cycle runs through {sorted(graph)}"
        graph = {name: imports for name, imports in graph.items() if name not in leaves}


def test_every_module_stands_on_a_floor():
    for name in GRAPH.keys() - {""}:
        floor_of(name)


def test_floor_zero_and_pure_modules_import_no_argument_objects():
    for name in GRAPH:
        if name not in LAZY and floor_of(name) == 1:
            assert GRAPH[name] & {"arguments", "training_arguments", "parsing"} == set()


# --- exports ----------------------------------------------------------------------------------------------------------


def test_all_is_exact_and_sorted():
    assert hf_sft.__all__ == sorted([*hf_sft._EXPORTS, "__version__"])
    assert set(dir(hf_sft)) >= set(hf_sft.__all__)


@pytest.mark.parametrize("name", sorted(hf_sft._EXPORTS))
def test_every_export_can_be_imported(name):
    value = getattr(hf_sft, name)
    assert value is getattr(importlib.import_module(hf_sft._EXPORTS[name]), name)


def test_unknown_export():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_sft.nothing


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 70, node.name


def test_readme_comes_to_the_point():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 200
    fences = [number for number, line in enumerate(lines, start=1) if line.startswith("```")]
    assert fences
    assert fences[0] <= 30, "the first command comes within 30 lines"


def text_files() -> list[Path]:
    """Tracked files and new ones that are not ignored; where there is no git, everything that is text by its ending."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    paths = [ROOT / name for name in names] or [*SOURCES, *ROOT.glob("tests/*.py"), *ROOT.glob("*.md")]
    return [path for path in paths if path.is_file()]


def test_no_paths_of_one_machine():
    pattern = re.compile(r"/(home|Users|root|work)/\w+")
    for path in text_files():
        if path.suffix in (".py", ".md", ".json", ".yaml", ".toml", ".txt", ".sh", ""):
            found = pattern.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path.relative_to(ROOT)}: {found and found.group()}"


def test_there_are_configurations():
    assert CONFIGS, "train_args/ holds no configuration"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configurations_parse(path, no_engine_starts):
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    words = [str(path), "--use_cpu"]  # bf16 is refused on a machine that has neither GPU nor use_cpu
    arguments = parse_args(words)
    assert arguments.data.train_file
    old = [note for note in arguments.notes if " is now " in note or " is no longer used" in note]
    assert old == [], "shipped configurations use today's names"
