"""The flags of a training command in a shell script."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

_ASSIGNMENT = re.compile(r"^(?:export\s+)?([A-Za-z_]\w*)=(\S.*)?$", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|([A-Za-z_]\w*))")
_UNKNOWN = re.compile(r"\$\{?\w+\}?|\$\(|`")  # names alone: a word may hold a secret
_ARGUMENT = re.compile(r"\$(?:\{\d+\}|[\d@*#])")  # a word of the script's own command line
_HEREDOC = re.compile(r"(?<!<)<<-?[ \t]*['\"]?([A-Za-z_]\w*)['\"]?[^\n]*\n.*?^\s*\1[ \t]*$", re.DOTALL | re.MULTILINE)
_LAUNCHER = re.compile(r"(.*/)?(python[\d.]*|torchrun|deepspeed|accelerate(-launch)?)|.*\.py")
_BEFORE = ("exec", "eval", "nohup", "time", "env", "srun", "mpirun", "numactl", "sudo", "uv", "conda", "poetry")
_OPENING = ("{", "(", "!", "if")
_BETWEEN = ("&&", "||", ";", "|", "&", "then", "do", "else")
_OUTPUT = re.compile(r"(\d*|&)>.*", re.DOTALL)
_REST = ("$@", "$*", '"$@"', "${@}")


def flags_of_script(text: str) -> list[str]:
    """The words after the Python script of the one training command in ``text``.

    Variables that the script sets are put in; continued lines are joined.

    Raises:
        ValueError: no such command, several of them, or a flag whose value the script does not tell.
    """
    known: dict[str, str] = {}
    commands: list[list[str]] = []
    for line in _lines(_HEREDOC.sub("", re.sub(r"\\[ \t]*\n", " ", text))):
        words = shlex.split(_put_in(line, known), comments=True)
        if match := _ASSIGNMENT.match(line):
            value = shlex.split(_put_in(match[2] or "", known), comments=True)
            if len(value) <= 1:
                if not _ARGUMENT.search(match[2] or ""):  # an option parser changes what stands above it, or nothing
                    known[match[1]] = value[0] if value else ""
                continue
        for command in _commands(words):
            if (flags := flags_of_command(command)) is not None:
                commands.append(flags)
    if not commands:
        raise ValueError(
            "no command with flags after a Python script (... train.py --key value): give the flags after --"
        )
    if len(commands) > 1:
        raise ValueError(f"{len(commands)} commands with flags: give those of one after --")
    if unknown := [found for word in commands[0] for found in _UNKNOWN.findall(word)]:
        raise ValueError(
            f"the script does not say what {', '.join(unknown)} is: write the values, or give the flags after --"
        )
    return commands[0]


def flags_of_command(words: list[str]) -> list[str] | None:
    """The words after the script (or ``-m module``) that is started; None where none has flags."""
    starts = [n for n, word in enumerate(words) if word.endswith(".py")]
    if not starts:
        starts = [n + 1 for n, word in enumerate(words[:-1]) if word == "-m"]
    flags = words[starts[-1] + 1 :] if starts else []
    return [word for word in flags if word not in _REST] if any(word.startswith("--") for word in flags) else None


def _commands(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line that start Python, each from there on; neither those that print nor patterns of ``case``."""
    command: list[str] = []
    for word in [*words, ";"]:
        launched = bool(command) and _LAUNCHER.fullmatch(command[0]) is not None
        if word not in _BETWEEN and (launched or not word.endswith(";")):
            command.append(word)
            continue
        while command and (_ASSIGNMENT.match(command[0]) or command[0] in _OPENING):
            command.pop(0)
        if command and command[0] in _BEFORE:
            command = next((command[n:] for n, each in enumerate(command) if _LAUNCHER.fullmatch(each)), [])
        if command and _LAUNCHER.fullmatch(command[0]):
            yield command[: next((n for n, each in enumerate(command) if _OUTPUT.fullmatch(each)), None)]
        command = []


def _put_in(text: str, known: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return known.get(name, match[0] if match[2] is None else match[2])

    return _VARIABLE.sub(value, text)


def _lines(text: str) -> Iterator[str]:
    """Lines, those joined whose quotes are closed further down."""
    kept = ""
    for line in text.splitlines():
        kept = f"{kept}\n{line}" if kept else line.strip()
        try:
            words = shlex.split(kept, comments=True)
        except ValueError:  # an open quote
            continue
        if words:
            yield kept
        kept = ""
    if kept:
        lines = kept.count("\n") + 1
        raise ValueError(f"a quote that is opened in the last {lines} lines is never closed")
