"""``hf-sft chat``: a conversation in the terminal with a trained model, under the template of its training."""

from __future__ import annotations

import argparse
import difflib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hf_sft.commands.options import (
    CommandParser,
    add_answer_options,
    add_model_options,
    answer_options,
    check_answer_options,
    load_model_of,
)
from hf_sft.imports import importing

_HELP = """\
/help         show this
/reset        begin a new conversation; the system message stays
/system TEXT  set the system message; without TEXT, remove it
/undo         take back the last message and its answer
/retry        answer the last message again
/save FILE    write the conversation as JSON lines, in the format of training data
/quit         leave, as Ctrl-D and Ctrl-C do
A line that ends in a backslash goes on in the next one. A message that begins with a slash begins with two of them.
Ctrl-C stops an answer."""
_COMMANDS = tuple(line.split()[0] for line in _HELP.splitlines() if line.startswith("/"))
# Escape sequences of an answer would move the cursor, or worse.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_CONTROLS[ord("\r")] = ""


def main(argv: Sequence[str]) -> int:
    """Chat as ``argv`` says; returns 0. Raises ValueError for everything that a user can put right."""
    options = _parser().options(argv)
    check_answer_options(options)
    with importing():
        from hf_sft.answering import Answerer

    try:
        model, tokenizer = load_model_of(options)
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, and a chat needs one; save one with it, or continue plain texts with "
                "hf-sft generate --raw"
            )
        name = options.model if options.checkpoint is None else f"{options.model} ({options.checkpoint})"
        chat = Chat(Answerer(model, tokenizer, **answer_options(options)), options.system, name)
        chat.run(_lines())
    except KeyboardInterrupt:
        print()
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="hf-sft chat",
        description="Chat with a trained model. Where the input is no terminal, each of its lines is a message.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    add_answer_options(parser)
    return parser


def _lines() -> Iterator[str]:
    """What the user writes, lines that end in a backslash joined with the next; ends with the input."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401 (gives input() its history)
    held: list[str] = []
    while True:
        try:
            line = input(("... " if held else "> ") if interactive else "")
        except EOFError:
            if interactive:
                print()
            if held:
                yield "\n".join(held)
            return
        if line.endswith("\\"):
            held.append(line[:-1])
            continue
        yield "\n".join([*held, line])
        held = []


class Chat:
    """One conversation after the other with one model. Answers go to stdout, all else to stderr.

    Args:
        system: the system message.
        name: of the model.

    Attributes:
        turns: of the conversation so far, without the system message.
    """

    def __init__(self, answerer: Any, system: str | None = None, name: str = "") -> None:
        from rich.console import Console

        self.answerer, self.system, self.name = answerer, system, name
        self.turns: list[dict[str, str]] = []
        self._left_out = 0  # turns that were too many
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    def run(self, lines: Iterator[str]) -> None:
        """Answer messages and follow commands until the lines end.

        Raises:
            ValueError: a message that cannot be answered, where nobody sits at the terminal to write another one.
        """
        if sys.stdin.isatty():
            self._note(f"{self.name}: /help shows the commands, Ctrl-D leaves")
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda rest: self._note(_HELP),
            "/reset": self._reset,
            "/system": self._set_system,
            "/undo": self._undo,
            "/retry": self._retry,
            "/save": self._save,
        }
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            if word == "/quit":
                return
            try:
                if word.startswith("/") and not word.startswith("//"):
                    commands.get(word, self._unknown(word))(rest.strip())
                elif line.strip():
                    self._answer(line[1:] if line.startswith("//") else line)
            except ValueError as error:
                if not sys.stdin.isatty():
                    raise
                self._note(f"error: {error}", "red")

    # ---- answers ----

    def _answer(self, message: str) -> None:
        """Answer a message; both join the conversation, unless nothing was answered."""
        if any("\ud800" <= letter <= "\udfff" for letter in message):  # bytes that the terminal could not decode
            raise ValueError("the message is not valid UTF-8; set the terminal to UTF-8 and write it again")
        self.turns.append({"role": "user", "content": message})
        try:
            text = self._stream(self._prompt())
        except ValueError:
            self.turns.pop()
            raise
        if text is not None:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns.pop()
            self._note("nothing was answered, and the message is taken back")

    def _stream(self, prompt: list[int]) -> str | None:
        """Write the answer as it comes, and what it has cost. Ctrl-C ends it before its time; None: before it began."""
        from hf_sft.decoding.texts import StreamedText

        text, pieces, began, stopped_by_user = StreamedText(self.answerer.tokenizer), [""], time.monotonic(), False
        try:
            with _interrupts() as asked:
                for new in self.answerer.stream(prompt):
                    pieces.append(text.add(new[:-1] if self.answerer.streamed.stopped else new))
                    self._write(pieces[-1])
                    if asked:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            stopped_by_user = True
        pieces.append(text.add([], last=True))
        self._write(pieces[-1] + "\n")
        self._tell_cost(time.monotonic() - began, stopped_by_user, len(prompt))
        return None if stopped_by_user and not any(pieces) else "".join(pieces)

    def _tell_cost(self, seconds: float, stopped_by_user: bool, prompt: int) -> None:
        answer, positions = self.answerer.streamed, self.answerer.positions
        parts = [f"{len(answer.tokens)} tokens"]
        if self.answerer.is_parallel and answer.forwards:
            parts.append(f"{len(answer.tokens) / answer.forwards:.2f} tokens per forward")
        parts.append(f"{seconds:.1f} s")
        if stopped_by_user:
            parts.append("stopped")
        elif not answer.stopped:
            at_end = positions is not None and prompt + len(answer.tokens) >= positions
            parts.append(f"cut off at {'the last position' if at_end else 'max_new_tokens'}")
        self._note(", ".join(parts))

    def _prompt(self) -> list[int]:
        """Token ids of the conversation; the oldest turns are left out where it no longer fits, and this is said.

        Raises:
            ValueError: the message alone does not fit, or cannot be written under the template.
        """
        positions, left_out = self.answerer.positions, min(self._left_out, len(self.turns) - 1)
        ids = self._encoded(left_out)
        if positions is not None:
            wanted = min(self.answerer.max_new_tokens, positions // 2)
            while len(ids) + wanted > positions and left_out < len(self.turns) - 1:
                left_out += 2
                ids = self._encoded(left_out)
            if len(ids) >= positions:
                raise ValueError(
                    f"the message has {len(ids)} tokens under the template, and the model was made for {positions} positions; "
                    "write a shorter one"
                )
        if left_out > self._left_out:
            self._note(
                f"the conversation no longer fits into the model's {positions} positions: its first {left_out} messages are "
                "left out"
            )
        self._left_out = left_out
        return ids

    def _encoded(self, left_out: int) -> list[int]:
        from hf_sft.prompts import Request, encode_request

        return encode_request(Request(self.turns[left_out:]), self.answerer.tokenizer, system=self.system)

    # ---- commands ----

    def _unknown(self, word: str) -> Callable[[str], None]:
        close = difflib.get_close_matches(word, _COMMANDS, n=1)
        return lambda rest: self._note(
            f"there is no {word}; {f'did you mean {close[0]}?' if close else '/help shows what there is'}"
        )

    def _reset(self, rest: str = "") -> None:
        self.turns, self._left_out = [], 0
        self._note("a new conversation")

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self._note("the system message is set" if text else "there is no system message")

    def _undo(self, rest: str) -> None:
        if not self.turns:
            self._note("there is nothing to take back")
            return
        self._note(f"taken back: {self._take_back()}")

    def _retry(self, rest: str) -> None:
        if not self.turns:
            self._note("there is no message to answer again")
            return
        self._answer(self._take_back())

    def _take_back(self) -> str:
        """Remove the last message and its answer; returns the message."""
        message = self.turns[-2]["content"]
        self.turns = self.turns[:-2]
        self._left_out = 0  # what was left out may fit again
        return message

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs the name of a new file")
        if not self.turns:
            raise ValueError("the conversation is empty, and nothing is saved")
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        path = Path(name).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": [*system, *self.turns]}, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise ValueError(f"{name!r} exists, and nothing is overwritten; name a new file") from None
        except OSError as error:
            raise ValueError(f"{name!r} cannot be written: {error}") from error
        self._note(f"saved to {path}")

    # ---- terminal ----

    def _write(self, text: str) -> None:
        sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def _note(self, text: str, style: str = "dim") -> None:
        sys.stdout.flush()
        self._console.print(text, style=style, markup=False)


@contextmanager
def _interrupts() -> Iterator[list[bool]]:
    """Not empty once Ctrl-C was pressed, which raises KeyboardInterrupt as ever: a callback or a finalizer that it meets would
    swallow it."""
    asked: list[bool] = []

    def note(*_: object) -> None:
        asked.append(True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
