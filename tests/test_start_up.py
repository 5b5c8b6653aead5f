"""What is imported when, and that loading modules costs no garbage collection."""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import runs
import tiny

from hf_sft import imports
from hf_sft.pages import Text
from hf_sft.reports import read_run
from hf_sft.reports.settings import differences, settings_blocks

LIGHT = ("torch", "transformers", "numpy", "pyarrow", "datasets", "peft", "jinja2")
# Packages that a plain run has no use for; none of them may come in at all, by whichever way.
UNUSED = (
    "matplotlib", "sacrebleu", "rouge_score", "nltk", "rapidfuzz", "tensorboard", "trl", "lm_eval", "rich", "wandb", "IPython",
    "bitsandbytes", "deepspeed",
)  # fmt: skip
# And those that transformers, peft and accelerate import wherever they are installed: not by a line of ours.
THEIRS = ("sklearn", "scipy", "pandas", "liger_kernel", "flash_attn", "triton")
WATCHING = """
import gc, json, sys
importers = {}
class Watch:
    def find_spec(self, name, path=None, target=None):
        if "." not in name and name not in importers:
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            importers[name] = frame.f_code.co_filename
sys.meta_path.insert(0, Watch())
"""
TRAIN = (
    WATCHING
    + """
from hf_sft.cli import main
from hf_sft.imports import take_process
take_process()
code = main(["train", *sys.argv[1:]])
loaded = {name for name, module in sys.modules.items() if type(module).__name__ != "_Deferred"}
importers = {name: file for name, file in importers.items() if name in loaded}  # others were only looked for
print("FOUND", json.dumps([code, importers, gc.isenabled(), gc.get_freeze_count()]))
"""
)


def run(code: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300, cwd=runs.ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_is_there_at_once():
    code = f"""
import sys, time
begun = time.perf_counter()
import hf_sft
print(time.perf_counter() - begun, [name for name in {LIGHT} if name in sys.modules])
"""
    seconds, _, loaded = min(run(code).strip().partition(" ") for _ in range(3))
    assert loaded == "[]"
    assert float(seconds) < 0.3  # 0.02 where nothing else runs


def test_help_of_every_command_loads_nothing_heavy():
    code = f"""
import sys
from hf_sft.cli import COMMANDS, main
main(["--help"])
for command in COMMANDS:
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert not end.code, command
print([name for name in {LIGHT} if name in sys.modules])
"""
    assert run(code).splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in a process of its own: its folder, and (exit code, package -> who imported it, whether and how it collects)."""
    folder = tmp_path_factory.mktemp("trained")
    values = runs.arguments(folder, max_steps=1, report_to="none", data_cache_dir=str(folder / "cache"))
    (line,) = [line for line in run(TRAIN, *runs.words(values)).splitlines() if line.startswith("FOUND")]
    return Path(values["output_dir"]), json.loads(line.removeprefix("FOUND"))


@pytest.fixture
def run_folder(trained):
    return trained[0]


def test_a_run_imports_nothing_that_it_does_not_use(trained):
    folder, (code, importers, enabled, frozen) = trained
    assert code == 0 and (folder / "model.safetensors").is_file()
    assert "torch" in importers
    assert [name for name in UNUSED if name in importers] == []
    ours = str(runs.ROOT / "hf_sft")
    assert [name for name in THEIRS if importers.get(name, "").startswith(ours)] == []
    assert enabled and frozen > 100_000  # modules are out of the collector's way, and what training makes is not


def test_a_quantized_run_finds_what_was_deferred(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = tiny.save_tiny(tmp_path / "wide", hidden_size=64, intermediate_size=64)
    values = runs.arguments(tmp_path, model_name_or_path=model, train_mode="qlora", max_steps=1, report_to="none")
    (line,) = [line for line in run(TRAIN, *runs.words(values)).splitlines() if line.startswith("FOUND")]
    code, importers, *_ = json.loads(line.removeprefix("FOUND"))
    assert code == 0 and "bitsandbytes" in importers
    assert (Path(values["output_dir"]) / "adapter_model.safetensors").is_file()


def test_a_report_needs_neither_torch_nor_transformers(run_folder):
    code = """
import sys
from hf_sft.cli import main
assert main(["report", sys.argv[1]]) == 0
print([name for name in ("torch", "transformers", "datasets", "peft") if name in sys.modules])
"""
    assert run(code, str(run_folder)).splitlines()[-1] == "[]"
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert "learning_rate" in page and "5e-05" in page  # beside 0.01, its default


def test_the_recorded_defaults_are_those_of_the_classes(run_folder):
    """The same rows with the group ``defaults`` as without it, of one run and of two."""
    known = read_run(run_folder)
    arguments = {name: values for name, values in known.arguments.items() if name != "defaults"}
    assert known.arguments["defaults"]["learning_rate"] == 5e-5 and "adam_beta1" not in known.arguments["defaults"]
    older = replace(known, arguments=arguments)
    assert [*settings_blocks(known)] == [*settings_blocks(older)]
    assert isinstance(differences([known, older]), Text)  # none: the defaults are no arguments
    lacking = replace(known, name="b", arguments={k: v for k, v in known.arguments.items() if k not in ("ema", "run")})
    today = replace(lacking, arguments={k: v for k, v in lacking.arguments.items() if k != "defaults"})
    assert differences([known, lacking]) == differences([older, today])


@pytest.fixture
def own_process(monkeypatch):
    monkeypatch.setattr(imports, "_own_process", True)
    yield
    gc.unfreeze()


def test_imports_are_not_collected_in_a_process_of_ours(own_process):
    before = gc.get_freeze_count()
    with imports.importing():
        assert not gc.isenabled()
        with imports.importing():
            pass
        assert not gc.isenabled()  # the outer block is not at its end
    assert gc.isenabled() and gc.get_freeze_count() > before
    with pytest.raises(ImportError), imports.importing():
        raise ImportError
    assert gc.isenabled()


def test_garbage_in_the_process_of_others_is_left_to_them():
    before = gc.get_freeze_count()
    with imports.importing():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_who_has_switched_collection_off_finds_it_off(own_process):
    gc.disable()
    try:
        with imports.importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


# ---- libraries that are loaded when they are used ----


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``slow_package`` with a submodule that needs its parent, deferred; every load of it stands in ``loads``."""
    folder = tmp_path / "slow_package"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "import builtins\nbuiltins.loads.append(__name__)\nfrom slow_package import part\nvalue = part.half * 2\n"
    )
    (folder / "part.py").write_text("import builtins, slow_package\nbuiltins.loads.append(__name__)\nhalf = 21\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("builtins.loads", [], raising=False)
    imports.defer("slow_package")
    yield folder
    for name in ("slow_package", "slow_package.part"):
        sys.modules.pop(name, None)
    sys.meta_path.remove(next(finder for finder in sys.meta_path if getattr(finder, "prefix", "") == "slow_package."))


def loads() -> list[str]:
    import builtins

    return builtins.loads  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "use",
    [
        "import slow_package; assert slow_package.value == 42",
        "from slow_package import value; assert value == 42",
        "import slow_package.part; assert slow_package.part.half == 21",
        "from slow_package.part import half; assert half == 21",
        "import importlib; assert importlib.import_module('slow_package').part.half == 21",
    ],
)
def test_a_deferred_package_is_loaded_once_when_it_is_used(package, use):
    import slow_package

    assert importlib.util.find_spec("slow_package") is slow_package.__spec__
    imports.defer("slow_package")
    assert slow_package.__file__ == str(package / "__init__.py") and loads() == []
    exec(use)
    exec(use)
    assert loads() == ["slow_package", "slow_package.part"] and type(slow_package) is ModuleType
    assert slow_package.part is sys.modules["slow_package.part"]
    assert slow_package.part.__spec__.loader.path == str(package / "part.py")
    with pytest.raises(AttributeError):
        _ = slow_package.missing


def test_a_deferred_package_that_fails_is_tried_again(package):
    text = (package / "part.py").read_text()
    (package / "part.py").write_text("import nowhere_at_all\n")
    import slow_package

    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        _ = slow_package.value
    assert "slow_package" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):  # who holds it finds the cause again
        _ = slow_package.value
    (package / "part.py").write_text(text + "# another size\n")
    from slow_package import value

    assert value == 42 and loads()[-2:] == ["slow_package", "slow_package.part"]


def test_what_is_not_installed_or_loaded_is_not_deferred():
    imports.defer("nowhere_at_all")
    assert "nowhere_at_all" not in sys.modules
    imports.defer("json")
    assert sys.modules["json"] is json and json.dumps(1) == "1"


def test_deepspeed_is_not_loaded_to_see_that_a_model_is_not_its_own(own_process, monkeypatch):
    from accelerate.utils import other

    monkeypatch.setattr(other, "is_deepspeed_available", lambda: True)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    imports.spare_deepspeed()
    assert not other.is_deepspeed_available()
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    assert other.is_deepspeed_available()


def test_in_the_process_of_others_accelerate_is_left_alone():
    from accelerate.utils import other

    before = other.is_deepspeed_available
    imports.spare_deepspeed()
    assert other.is_deepspeed_available is before


# ---- the benchmarks ----


@pytest.fixture
def start_up(monkeypatch):
    monkeypatch.syspath_prepend(str(runs.ROOT / "benchmarks"))
    import start_up

    return start_up


def test_starts_are_timed_to_their_line(start_up):
    slow = start_up.Command([sys.executable, "-c", "print('READY'); import time; time.sleep(0.3)"], start_up.READY)
    found = start_up.measure({"slow": slow, "quiet": start_up.Command([sys.executable, "-c", "pass"])}, 1, {})
    (begun,), (quiet,) = found["slow"], found["quiet"]
    assert begun.end > begun.seconds + 0.3 > 0.3
    assert quiet.seconds == quiet.end
    for words in ("raise SystemExit(3)", "pass"):  # a failure, and a line that does not come
        with pytest.raises(RuntimeError, match=r"ended with [03]"):
            start_up.start(start_up.Command([sys.executable, "-c", words], start_up.READY))


def test_the_first_step_is_told_beside_both_yardsticks(start_up, capsys):
    seconds = {start_up.BARE: 1.0, start_up.TRAINER: 3.0, start_up.WARM: 2.5, start_up.PLAIN: 4.0}
    starts = {
        name: [start_up.Start(value + delta, value, value) for delta in (9, 0, 0)] for name, value in seconds.items()
    }
    results = start_up.summary(starts)
    beyond = {start_up.BARE: 1.5, start_up.TRAINER: -0.5, start_up.PLAIN: -1.5}
    assert results["first_step_with_a_warm_cache_beyond"] == {"seconds": beyond, "processor_seconds": beyond}
    start_up.print_beyond(results)
    assert "+1.50" in capsys.readouterr().out


@pytest.mark.parametrize("alone, beyond, count", [(0.29, 1.9, 0), (0.3, 1.9, 1), (0.29, 2.0, 1), (0.5, 5.0, 2)])
def test_what_the_start_misses_is_named(start_up, alone, beyond, count):
    results = {
        "commands": {"import hf_sft": {"seconds": alone}},
        "first_step_with_a_warm_cache_beyond": {"seconds": {start_up.BARE: beyond}},
    }
    assert len(start_up.missed(results)) == count


class NoTurn:
    """Nobody to wait for."""

    begun = ended = 0

    def begin(self):
        self.begun += 1

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("way", ["hf_sft", "Trainer, and fsync"])
def test_checkpoints_are_measured_and_resumed_from(start_up, way, tmp_path, monkeypatch):
    import checkpoints
    import trainers

    monkeypatch.setattr(trainers, "quiet", lambda: None)
    turn, how = NoTurn(), dict(way=way, folder=str(tmp_path), mode="lora", width=32, layers=1)
    parts = checkpoints.saving(turn, 2, **how)
    assert turn.begun == turn.ended == 2 and len(parts) == 2 * len(checkpoints.PARTS)
    verification, fsync, size = parts[-3:]
    assert (verification > 0 and fsync > 0) == (way == checkpoints.OURS)
    (kept,) = tmp_path.glob("checkpoint-*")
    assert kept.name == "checkpoint-3"
    assert size == sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
    assert checkpoints.resuming(turn, 1, **how) == [] and turn.ended == 3
