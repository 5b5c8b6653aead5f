"""``hf-sft`` and the help: quick, and errors reach users as one message."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import hf_sft
from hf_sft import cli
from hf_sft.arguments import DataArguments, LoraArguments, ModelArguments
from hf_sft.commands.options import CommandParser
from hf_sft.parsing import ArgumentsError, parse_args

HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "numpy", "yaml", "rich"}


def run_python(code: str, *words: str) -> tuple[str, float]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, time.perf_counter() - start


SHOW_HEAVY = f"; import sys; print('loaded:', sorted({HEAVY!r} & set(sys.modules)))"


def test_importing_the_package_loads_nothing():
    out, seconds = run_python("import hf_sft; hf_sft.__version__; dir(hf_sft)" + SHOW_HEAVY)
    assert "loaded: []" in out
    assert seconds < 2  # a bare interpreter on a busy machine; the modules above are what would cost seconds


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"], ["train", "-h"]])
def test_help_is_answered_without_heavy_imports(words):
    out, seconds = run_python("from hf_sft.cli import main; import sys; main(sys.argv[1:])" + SHOW_HEAVY, *words)
    assert "loaded: []" in out
    assert seconds < 2


def test_train_help_lists_every_own_field(capsys):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for cls in (ModelArguments, DataArguments, LoraArguments):
        for name in cls.__dataclass_fields__:
            assert f"  --{name} " in out
    assert "--train_mode full|lora|qlora (default: full)" in out
    assert "--lora_dropout NUMBER (default: 0.0)" in out
    assert "--learning_rate" not in out


@pytest.mark.parametrize(
    ("words", "all"), [(["--help"], False), (["-h"], False), (["--help", "all"], True), (["--help=all"], True)]
)
def test_help_of_the_program_lists_commands_and_fields(capsys, words, all):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith(cli.usage())
    assert "usage: hf-sft train [FILE" in out
    for cls in (ModelArguments, DataArguments, LoraArguments):
        assert [f"  --{name} " in out for name in cls.__dataclass_fields__] == [True] * len(cls.__dataclass_fields__)
    assert ("  --learning_rate NUMBER" in out) is all


@pytest.mark.parametrize("words", [["--help", "all"], ["--help=all"]])
def test_help_all_adds_hugging_face(capsys, words):
    with pytest.raises(SystemExit) as left:
        parse_args(words)
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "  --learning_rate NUMBER (default: 5e-05)" in out
    assert "Other values are refused: only data parallelism is available" in out


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_help_keeps_to_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    cli.print_requested_help(["--help"], "train.py")
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if line.startswith("      ")) <= int(columns)


def test_version_and_commands(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-sft {hf_sft.__version__}\n"
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert [name in out for name in cli.COMMANDS] == [True] * len(cli.COMMANDS)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("trian", "did you mean train?"),
        ("xyz", f"choose {' or '.join(cli.COMMANDS)}"),
    ],
)
def test_unknown_command(capsys, word, hint):
    assert cli.main([word]) == 2
    assert capsys.readouterr().err == f"error: hf-sft has no command {word}; {hint}\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generate model --promt a", "hf-sft generate has no option --promt: did you mean --prompt?"),
        (
            "generate model --prompt a --xyz",
            "hf-sft generate has no option --xyz; hf-sft generate --help lists the options",
        ),
        ("generate model more --prompt a", "hf-sft generate has no place for 'more'; hf-sft generate --help lists"),
        ("generate model", "one of the arguments --prompt --file is required; hf-sft generate --help lists"),
        ("chat model --top-k many", "argument --top_k: invalid int value: 'many'; hf-sft chat --help lists"),
        ("merge --ont=original", "hf-sft merge has no option --ont: did you mean --onto?"),
        ("merge", "the following arguments are required: adapter, --output_dir; hf-sft merge --help"),
        ("evaluate model --file f --sampels 3", "hf-sft evaluate has no option --sampels: did you mean --samples?"),
        (
            "inspect --memory --model m --gpu_memroy 8",
            "inspect --memory has no option --gpu_memroy: did you mean --gpu_memory?",
        ),
        ("inspect --memroy --model m", "hf-sft inspect has no option --memroy: did you mean --memory?"),
        ("inspect --model m --file f --htlm=a", "hf-sft inspect has no option --htlm: did you mean --html?"),
        # as train says it, which knows its own arguments best
        ("inspect --memory --model m --lora_rnak 8", "lora_rnak is no argument; did you mean lora_rank?"),
        # an argument of train is none of its options, however near
        ("inspect --memory --model m --train_file f --seed x", "seed is 'x': it must be a whole number"),
        ("generate --model ./m --prompt a", "hf-sft generate takes model as a word of its own, without --model;"),
        ("chat model --temp 1", "hf-sft chat has no option --temp: did you mean --temperature?"),
        # words that only look like options
        ("inspect --model ./model --file ./file", "./model"),
        ("inspect ./html", "there is no file html"),
        ("inspect x.json", "x.json"),
        ("generate ./base --file ./file", "file: no such data file"),
        ("migrate mytable new.yaml", "mytable"),
    ],
)
def test_options_that_are_none(capsys, line, said):
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and "usage:" not in err and "expected one argument" not in err


def test_values_that_look_like_options():
    parser = CommandParser(prog="hf-sft x")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--prompt", nargs="+")
    parser.add_argument("--raw", action="store_true")
    found = parser.options(["--top-k=-3", "--prompt", "--prompt x", "a raw", "..raw"])
    assert (found.top_k, found.prompt, found.raw) == (-3, ["--prompt x", "a raw", "..raw"], False)
    assert parser.options(["--raw", "--", "--promt", "--top-k"]).words == ["--promt", "--top-k"]
    options, rest = parser.options_and_rest(["--raw", "--learning-rate=1e-4", "--no_packing"])
    assert options.raw and rest == ["--learning-rate=1e-4", "--no_packing"]


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_exit_codes(result, code):
    assert cli.run_command(lambda argv: result, []) == code


def test_user_errors_are_messages(capsys, monkeypatch):
    def fail(argv):
        raise ArgumentsError([f"{argv[0]} is wrong", "so is this"])

    assert cli.run_command(fail, ["this"]) == 2
    message = "error: the arguments have 2 problems:\n  - this is wrong\n  - so is this\n"
    assert capsys.readouterr() == ("", message)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.run_command(fail, ["this"]) == 2
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("HF_SFT_TRACEBACK", "1")
    with pytest.raises(ArgumentsError):
        cli.run_command(fail, ["this"])


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError):
        cli.run_command(lambda argv: (_ for _ in ()).throw(RuntimeError("a bug")), [])


def test_a_wrong_file_is_reported_before_anything_heavy():
    code = "from hf_sft.cli import run_command; from hf_sft.parsing import parse_args; import sys; "
    out, seconds = run_python(code + "print(run_command(parse_args, ['nowhere.json']))" + SHOW_HEAVY)
    assert out.startswith("2\n")
    assert "loaded: []" in out
    assert seconds < 2
