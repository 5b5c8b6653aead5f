"""What can be seen of the Dockerfile without building it: the tests have no Docker."""

from __future__ import annotations

import fnmatch
import json
import re

import runs

ROOT = runs.ROOT
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = (
    """ADD ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK LABEL RUN SHELL STOPSIGNAL USER VOLUME WORKDIR""".split()
)


def instructions() -> list[tuple[str, str]]:
    """(name, the rest) of each, with continued lines joined."""
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a file of the root, or below a folder of it, go to the build: the last line that fits counts."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        heads = ["/".join(path.split("/")[: n + 1]) for n in range(path.count("/") + 1)]
        deep = pattern.removeprefix("**/")
        if any(fnmatch.fnmatch(head, pattern) or fnmatch.fnmatch(head.split("/")[-1], deep) for head in heads):
            sent = line.startswith("!")
    return sent


def test_every_line_is_an_instruction():
    names = [name for name, _ in instructions()]
    assert set(names) <= set(INSTRUCTIONS)
    assert names.count("FROM") == names.count("ENTRYPOINT") == names.count("CMD") == 1
    assert names.index("ARG") < names.index("FROM")


def test_images_have_versions():
    arguments = dict(argument.split("=", 1) for argument in of("ARG"))
    (base,) = of("FROM")
    images = [arguments["BASE"], *re.findall(r"BASE=(\S+:\S+)", TEXT)]
    assert base == "${BASE}"
    for image in images:
        assert re.search(r":[\w.-]*\d", image) and "latest" not in image
    assert "TORCH_INDEX" in arguments


def test_what_is_copied_is_there_and_is_sent():
    for rest in of("COPY"):
        *sources, _ = rest.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert is_sent(source), source
            if (ROOT / source).is_dir():
                assert any(
                    is_sent(str(path.relative_to(ROOT))) for path in (ROOT / source).rglob("*") if path.is_file()
                )
    for path in (".git/config", "output/x", ".venv/bin/python", "tests/tiny.py", "hf_sft/__pycache__/cli.pyc", "a.env"):
        assert not is_sent(path), path
    for path in ("hf_sft/data/chat_templates/plain.jinja", "hf_sft/cli.py", "train_args/deepspeed/zero3.json"):
        assert is_sent(path), path


def test_what_is_installed_is_constrained():
    installs = [part for rest in of("RUN") for part in rest.split("&&") if "pip install" in part]
    assert len(installs) == 2
    assert all("-c constraints.txt" in part for part in installs)
    extras = set(re.findall(r"\[([\w,]+)\]", installs[1])[0].split(","))
    known = re.findall(r'^        "(\w+)":', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert extras <= set(known)
    (system,) = [rest for rest in of("RUN") if "apt-get" in rest]
    assert "--no-install-recommends" in system and "rm -rf /var/lib/apt/lists" in system


def test_it_runs_as_a_user_whose_files_are_on_volumes():
    names = [name for name, _ in instructions()]
    (user,) = of("USER")
    assert user not in ("0", "root")
    assert f"--uid {user} " in " ".join(of("RUN"))
    assert names.index("USER") > max(n for n, name in enumerate(names) if name == "RUN")
    volumes = json.loads(of("VOLUME")[0])
    environment = dict(item.split("=", 1) for rest in of("ENV") for item in rest.split())
    for name in ("HOME", "HF_HOME", "HF_SFT_CACHE"):
        assert environment[name].startswith(volumes[0] + "/")
    assert volumes[1] == f"{of('WORKDIR')[0]}/output"


def test_it_starts_the_command_line():
    assert json.loads(of("ENTRYPOINT")[0]) == ["hf-sft"]
    assert json.loads(of("CMD")[0]) == ["--help"]
    assert "hf-sft = hf_sft.cli:script" in (ROOT / "setup.py").read_text(encoding="utf-8")
    for file in re.findall(r"--train_args_file (\S+)", TEXT):
        assert (ROOT / file).is_file(), file


def test_no_index_or_secret_is_written_into_it():
    assert "://" not in TEXT
    assert not re.search(r"(TOKEN|PASSWORD|SECRET|KEY)=", TEXT)
