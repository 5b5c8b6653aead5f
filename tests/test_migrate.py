"""hf-sft migrate: a new file with comments that says what the old one said."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import old_runs
import pytest

from hf_sft import cli
from hf_sft.conversion import is_secret
from hf_sft.legacy.shell import flags_of_script
from hf_sft.legacy.table import page
from hf_sft.parsing import parse_args

SECRET = "s3cr3t-0123456789"
DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return old_runs.make_folder(tmp_path_factory.mktemp("old"))


@pytest.fixture(autouse=True)
def here(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def said(arguments: Any) -> dict[str, Any]:
    """Everything that arguments say but secrets."""
    groups = ("model", "data", "lora", "wedlm", "dpo", "engine")
    environment = {key: value for key, value in arguments.environment.items() if not is_secret(key)}
    training = {key: value for key, value in arguments.training.to_dict().items() if key != "logging_dir"}
    return {name: asdict(getattr(arguments, name)) for name in groups} | {
        "training": training, "given": arguments.given, "environment": environment,
    }  # fmt: skip


@pytest.mark.parametrize("ending", ["yaml", "json"])
@pytest.mark.parametrize("path", old_runs.SAMPLES, ids=lambda path: path.name)
def test_new_file_says_the_same_without_a_line(path, ending, tmp_path, capfd):
    if "deepspeed" in path.name:
        pytest.importorskip("deepspeed")
    new = tmp_path / f"new.{ending}"
    assert cli.main(["migrate", str(path), str(new)]) == 0
    out, err = capfd.readouterr()
    assert SECRET not in new.read_text() + out + err
    old_words = old_runs.words(path)
    if "deepspeed" in path.name:  # not in this process: it would enter a process group
        from hf_sft.commands.migrate import migrate
        from hf_sft.parsing import read_config

        assert read_config(new) == migrate(read_config(path), {}).values
        return
    after = parse_args([str(new)])
    assert after.notes == []
    assert said(after) == said(parse_args(old_words))


def test_comments_say_what_was_and_what_is_gone(tmp_path):
    new = tmp_path / "new.yaml"
    assert cli.main(["migrate", str(old_runs.sample("wedlm.yaml")), str(new)]) == 0
    text = new.read_text()
    assert "# was model_path: 'models/qwen3'\nmodel_name_or_path: models/qwen3\n" in text
    assert "# was wandb_team: 'a-team'\nwandb_entity: a-team\n" in text
    assert "objective: wedlm\n" in text
    gone = text.split("# No longer used:\n")[1]
    assert "#   mask_eps: 1e-08  (no mask is drawn with a ratio of 0" in gone
    assert "#   deepspeed_zero_stage: 2  (use_deepspeed is false)\n" in gone
    assert "wandb_api_key: run wandb login" in gone


def test_comments_of_json_are_printed(tmp_path, capsys):
    new = tmp_path / "new.json"
    assert cli.main(["migrate", str(old_runs.sample("firefly.json")), str(new)]) == 0
    assert "chat_template" in json.loads(new.read_text())
    out = capsys.readouterr().out
    assert "firefly.json: template_name is now chat_template ('chatml')" in out
    assert "firefly.json: use_unsloth is no longer used" in out


@pytest.mark.parametrize(
    "command", [[], ["torchrun", "--nproc_per_node", "2", "finetune.py"], ["python", "-m", "finetune"]]
)
def test_flags_of_a_command(command, tmp_path, capsys):
    new = tmp_path / "new.yaml"
    flags = ["--model_path", "m", "--data_path", "a.json", "--use_lora", "True", "--lora_r", "64", "--learning_rate", "1e-5",
             "--gradient_checkpointing", "--bf16", "--report_to", "wandb"]  # fmt: skip
    assert cli.main(["migrate", str(new), "--", *command, *flags]) == 0
    lines = [line for line in new.read_text().splitlines() if not line.startswith("#")]
    assert lines == [
        "model_name_or_path: m",
        "train_file: a.json",
        "train_mode: lora",
        "lora_rank: 64",
        "learning_rate: 1e-05",
        "activation_checkpointing: true",
        "bf16: true",
        "report_to: wandb",
    ]  # fmt: skip
    assert "8 arguments, 5 of them under new names; 0 old keys have no counterpart" in capsys.readouterr().out


def test_every_problem_of_an_old_file_is_told_at_once(tmp_path, capsys):
    old = tmp_path / "old.yaml"
    old.write_text(
        f"model: m\ndata_path: d\nema_decay: 2\nadd_eos_token_when_response_end: false\nlr0: fast\nnum_bits: 3\n"
        f"report_to: nobody\nzero_stage: 7\nwandb_key: {SECRET}\n"
    )
    new = tmp_path / "new.yaml"
    assert cli.main(["migrate", str(old), str(new)]) == 2
    err = capsys.readouterr().err
    for sentence in (
        "ema_decay is 2",
        "add_eos_token_when_response_end is False: a model that is not taught to end its answers never stops",
        "learning_rate is 'fast': it must be a finite number",
        "num_bits is no argument",
        "zero_stage is 7",
    ):
        assert sentence in err
    assert SECRET not in err
    assert not new.exists()


def test_files_that_are_in_the_way(tmp_path, capsys):
    old = str(old_runs.sample("firefly.json"))
    there = tmp_path / "there.yaml"
    there.write_text("mine")
    for words, sentence in (
        ([old, str(there)], "exists already, and nothing is written over"),
        ([old, str(tmp_path / "new.toml")], "no ending that says its format"),
        ([old], "the old file and the new one are wanted"),
        ([str(tmp_path / "nowhere.json"), str(tmp_path / "new.yaml")], "there is no file"),
        ([str(tmp_path / "nowhere.sh"), str(tmp_path / "new.yaml")], "cannot be read"),
    ):
        assert cli.main(["migrate", *words]) == 2
        assert sentence in capsys.readouterr().err
    assert there.read_text() == "mine"


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo hello\n", "no command with flags"),
        ("python a.py --lr 1\npython b.py --lr 2\n", "2 commands with flags"),
        ("case $1 in\n  -m | --model ) shift; DATA=$1 ;;\nesac\npython a.py --data_path $DATA\n", "say what $DATA is"),
        ("echo 'python a.py --lr 1'\necho python a.py --lr 1\n", "no command with flags"),
        ("python a.py --data_path x$DATA\n", "the script does not say what $DATA is"),
        (f"python a.py --lr '1\n--wandb_key {SECRET}", "a quote that is opened in the last 2 lines is never closed"),
    ],
)
def test_scripts_that_say_too_little(script, sentence, tmp_path, capsys):
    old = tmp_path / "old.sh"
    old.write_text(script)
    assert cli.main(["migrate", str(old), str(tmp_path / "new.yaml")]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert SECRET not in err


@pytest.mark.parametrize(
    "script",
    [
        "CUDA_VISIBLE_DEVICES=0 nohup python3.11 a.py --lr 1 > log.txt 2>&1 &\n",
        "cd there && exec torchrun --nproc_per_node 2 a.py --lr 1 | tee log\n",
        "cd there; /opt/bin/python -m a --lr 1\n",
        'if [ -z "$1" ]; then srun -n 2 python a.py --lr 1 "$@" ; fi\n',
        "LAUNCHER='accelerate launch'\nenv A=1 $LAUNCHER a.py --lr 1\n",
        "cat <<'END'\nit's: python b.py --lr 2\nEND\n./a.py --lr 1\n",
        "LR=1\nwhile [[ $1 ]]; do\ncase $1 in\n-l | --lr )\nshift\nLR=$1\n;;\nesac\nshift\ndone\ndeepspeed a.py --lr $LR\n",
        "if ! uv run a.py --lr 1 ; then exit 1; fi\n",
        "LR=${1:-1}\npython a.py --lr $LR\n",
    ],
)
def test_commands_of_scripts(script):
    assert flags_of_script(script) == ["--lr", "1"]


def test_what_old_scripts_did_without_a_key_is_a_comment(tmp_path):
    new = tmp_path / "new.yaml"
    assert cli.main(["migrate", str(old_runs.sample("llama-factory-sft.yaml")), str(new)]) == 0
    text = new.read_text()
    assert (
        "# packing: a batch is of records there; packing true takes several documents per row and trains faster" in text
    )
    assert "\npacking: false\n" in text
    assert "# overlength: records that are longer are cut, as there\noverlength: truncate\n" in text
    assert '(as dataset_info.json says)\ntrain_file: ["data/train.json", "data/train.jsonl"]\n' in text


def test_words_that_yaml_would_read_otherwise_are_quoted(tmp_path):
    from hf_sft.commands.migrate import Migrated, as_yaml
    from hf_sft.parsing import read_config

    values = {"a": "null", "b": "1e-5", "c": "yes", "d": "x: y # z", "e": ["q", "1"], "f": {"k": None}, "g": 1e-05, "h": "",
              "i": "...", "j": ".5", "k": "a\nb\"'", "l": "./x/y.json", "m": "~", "n": "no", "o": 1.0, "p": True}  # fmt: skip
    file = tmp_path / "a.yaml"
    file.write_text(as_yaml(Migrated(values, [], []), "nowhere"), encoding="utf-8")
    assert read_config(file) == values


def test_page_is_up_to_date(capsys):
    assert cli.main(["migrate", "--table"]) == 0
    assert capsys.readouterr().out == page()
    assert (DOCS / "migrating.md").read_text(encoding="utf-8") == page(), (
        "the table has changed: hf-sft migrate --table > docs/migrating.md"
    )
