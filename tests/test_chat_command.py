"""``hf-sft chat``: in a terminal of its own, as a process, and as a script that reads its messages."""

from __future__ import annotations

import io
import json
import os
import random
import re
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import torch
from runs import ROOT

from hf_sft.answering import Answerer
from hf_sft.commands.chat import _interrupts, main
from hf_sft.data.formats import to_conversation
from hf_sft.decoding.texts import StreamedText
from hf_sft.models.inference import load_for_inference
from hf_sft.models.mask_token import record_mask_token

MASK = 200


def save_model(folder: Path, mask: int | None = None, **overrides) -> str:
    """A random model that writes nothing but small letters, and never stops."""
    model = tiny.tiny_model("qwen3", tie_word_embeddings=False, **overrides)
    tokenizer = tiny.tiny_tokenizer()
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
        model.lm_head.weight[[row for row in range(259) if row not in letters]] = 0
    if mask is not None:
        record_mask_token(model, mask)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("causal"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def wedlm(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("wedlm"), MASK)


def turns_of(folder: str, messages: list[str], system: str | None = None, **options) -> list[dict[str, str]]:
    """The conversation as it must go."""
    model, tokenizer = load_for_inference(folder)
    answerer = Answerer(model, tokenizer, **options)
    turns = [] if system is None else [{"role": "system", "content": system}]
    for message in messages:
        turns.append({"role": "user", "content": message})
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        turns.append({"role": "assistant", "content": answerer.text(answerer([ids])[0])})
    return turns


def answers(turns: list[dict[str, str]]) -> list[str]:
    return [turn["content"] for turn in turns if turn["role"] == "assistant"]


def chat(monkeypatch, lines: list[str], *words: str) -> int:
    """Run the command with these lines as its input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return main(list(words))


# ---- a terminal ----


class Terminal:
    """``hf-sft chat`` as the only process of a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        pty = pytest.importorskip("pty")
        self.process, self.screen = pty.fork()
        if self.process == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background has ignored it, and hands that on
            os.chdir(ROOT)
            os.environ |= {"TERM": "dumb", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
            os.execv(sys.executable, [sys.executable, "-m", "hf_sft.cli", "chat", *words])
        self.chunks: list[bytes] = []

    def read(self, until: str = r"\n> $", seconds: float = 60) -> str:
        """What is written until this pattern is found, without carriage returns."""
        held, deadline = b"", time.monotonic() + seconds
        self.chunks = []
        while not re.search(until, held.decode(errors="replace").replace("\r", "")):
            assert time.monotonic() < deadline, held
            if select.select([self.screen], [], [], 0.2)[0]:
                self.chunks.append(os.read(self.screen, 65536))
                held += self.chunks[-1]
        return held.decode(errors="replace").replace("\r", "")

    def write(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def end(self, key: str = "") -> tuple[int, str]:
        """The exit code and the last words. ``key`` is pressed once more after a while: Python's readline misses a Ctrl-C between
        its prompt and its first look at the keyboard (7 of 136,392 on a busy machine)."""
        held, began = b"", time.monotonic()
        while True:
            assert time.monotonic() < began + 90, held
            if select.select([self.screen], [], [], 0.2)[0]:
                try:
                    held += os.read(self.screen, 65536)
                except OSError:  # Linux: the other side is closed
                    break
            elif key and time.monotonic() > began + 20:
                self.write(key)
                key = ""
        _, status = os.waitpid(self.process, 0)
        return os.waitstatus_to_exitcode(status), held.decode(errors="replace")

    def kill(self) -> None:
        try:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.screen)


@pytest.fixture
def terminals(causal):
    """Two chats that start at the same time."""
    both = [Terminal(causal, "--max_new_tokens", count, "--system", "Be kind.") for count in ("50", "3500")]
    yield both
    for terminal in both:
        terminal.kill()


def test_chats_in_a_terminal(causal, tmp_path, terminals) -> None:
    first, second = terminals
    messages = ["Hello", "How are you?", "Tell me\nmore"]
    turns = turns_of(causal, messages, "Be kind.", max_new_tokens=50)
    assert "/help shows the commands" in first.read()
    for message, answer in zip(messages, answers(turns), strict=True):
        first.write(message.replace("\n", "\\\n") + "\n")
        assert f"\n{answer}\n50 tokens, " in first.read(), "the answer, then what it has cost"
        assert len([chunk for chunk in first.chunks if chunk.isalpha()]) > 1, "the answer comes in pieces"
    first.write("\x04")

    second.read()
    second.write("Go on\n")
    second.read(r"Go on\n[a-z]")  # the answer has begun
    second.write("\x03")
    assert second.read().endswith(" s, stopped\n> ")
    second.write(f"/save {tmp_path / 'saved.jsonl'}\n")
    assert "saved to" in second.read()
    second.write("\x03")
    *asked, answer = json.loads((tmp_path / "saved.jsonl").read_text())["messages"]
    assert asked == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Go on"}]
    text = answer["content"]
    assert 0 < len(text) < 3500
    assert text == turns_of(causal, ["Go on"], "Be kind.", max_new_tokens=len(text))[-1]["content"]
    for terminal, key in ((first, ""), (second, "\x03")):
        code, last = terminal.end(key)
        assert code == 0 and "Traceback" not in last and not last.replace("^C", "").strip()


# ---- a script ----


def test_lines_of_a_script_are_messages(wedlm, monkeypatch, capsys) -> None:
    words = [wedlm, "--max_new_tokens", "12", "--entropy_threshold", "2", "--system", "Be kind."]
    assert chat(monkeypatch, ["Hello", "", "You\\", "there"], *words) == 0
    out, err = capsys.readouterr()
    turns = turns_of(wedlm, ["Hello", "You\nthere"], "Be kind.", max_new_tokens=12, parallel={"entropy_threshold": 2.0})
    assert out.splitlines() == answers(turns)
    assert err.count("tokens per forward") == 2 and "12 tokens, " in err
    assert chat(monkeypatch, ["Hello"], wedlm, "--max_new_tokens", "12", "--autoregressive") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == answers(turns_of(wedlm, ["Hello"], max_new_tokens=12, autoregressive=True))


def test_commands(causal, monkeypatch, capsys, tmp_path) -> None:
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lines = [
        "/undo", "/retry", "Hello", "Two", "/undo", "Three", "/retry", f"/save {file}", "/system Be kind.", "/reset", "/nothing",
        "/rest", "/help", "//slash", f"/save {other}", "/system", "/quit", "never read",
    ]  # fmt: skip
    assert chat(monkeypatch, lines, causal, "--max_new_tokens", "8") == 0
    out, err = capsys.readouterr()
    long = turns_of(causal, ["Hello", "Three"], max_new_tokens=8)
    short = turns_of(causal, ["/slash"], "Be kind.", max_new_tokens=8)
    second = answers(turns_of(causal, ["Hello", "Two"], max_new_tokens=8))[1]
    hello, three = answers(long)
    assert out.splitlines() == [hello, second, three, three, *answers(short)]
    for path, turns in ((file, long), (other, short)):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record == {"messages": turns} and to_conversation(record).messages
    for said in ("nothing to take back", "no message to answer again", "taken back: Two", "a new conversation", "/save FILE",
                 "there is no /nothing", "did you mean /reset?", "the system message is set", "there is no system"):  # fmt: skip
        assert said in err
    for line, message in (
        (f"/save {file}", "conversation is empty"),
        ("/save", "needs the name"),
        ("say <|im_end|>", "the user message holds"),
    ):
        with pytest.raises(ValueError, match=message):
            chat(monkeypatch, [line], causal)
    before = file.read_bytes()
    for name, message in (
        (str(file), "exists, and nothing is overwritten"),
        (str(tmp_path), "cannot be written|exists"),
    ):
        with pytest.raises(ValueError, match=message):
            chat(monkeypatch, ["a", f"/save {name}"], causal, "--max_new_tokens", "2")
    assert file.read_bytes() == before


def test_draws_of_a_chat(causal, monkeypatch, capsys) -> None:
    words = [causal, "--max_new_tokens", "12", "--temperature", "3", "--top_k", "9", "--seed"]
    outputs = []
    for seed in ("1", "1", "2"):
        assert chat(monkeypatch, ["Hello", "/retry"], *words, seed) == 0
        outputs.append(capsys.readouterr().out.splitlines())
    assert outputs[0] == outputs[1] != outputs[2] and outputs[0][0] != outputs[0][1]


def test_history_that_no_longer_fits_is_left_out(tmp_path, monkeypatch, capsys) -> None:
    folder, prompts = save_model(tmp_path / "model", max_position_embeddings=120), []
    stream = Answerer.stream
    monkeypatch.setattr(Answerer, "stream", lambda self, prompt: prompts.append(prompt) or stream(self, prompt))
    messages = ["a" * 20, "b" * 20, "c" * 20, "d" * 70]
    assert chat(monkeypatch, messages, folder, "--max_new_tokens", "10", "--system", "kind") == 0
    out, err = capsys.readouterr()
    texts = [tiny.tiny_tokenizer().decode(prompt) for prompt in prompts]
    assert ["a" * 20 in texts[2], "b" * 20 in texts[2], "c" * 20 in texts[2]] == [False, True, True]
    assert ["c" * 20 in texts[3], "d" * 70 in texts[3]] == [False, True]
    assert all("system\nkind" in text and len(prompt) <= 110 for text, prompt in zip(texts, prompts, strict=True))
    assert [len(line) for line in out.splitlines()] == [10] * 4
    for count in (2, 6):
        assert f"no longer fits into the model's 120 positions: its first {count} messages are left out" in err
    with pytest.raises(
        ValueError, match=r"the message has \d+ tokens under the template, and the model .* 120 positions"
    ):
        chat(monkeypatch, ["a" * 120], folder)
    assert chat(monkeypatch, ["a" * 80], folder, "--max_new_tokens", "90") == 0
    assert "cut off at the last position" in capsys.readouterr().err


def test_interrupts(causal, monkeypatch, capsys) -> None:
    stream, after = Answerer.stream, [0, 3]

    def interrupted(self, prompt):
        pieces, count = stream(self, prompt), after.pop(0) if after else 99
        for number, piece in enumerate(pieces):
            if number == count:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Answerer, "stream", interrupted)
    assert chat(monkeypatch, ["Hello", "Hello", "You"], causal, "--max_new_tokens", "9") == 0
    out, err = capsys.readouterr()
    whole = answers(turns_of(causal, ["Hello"], max_new_tokens=9))[0]
    assert out.splitlines()[:2] == ["", whole[:3]] and len(out.splitlines()[2]) == 9
    assert err.count(" s, stopped") == 2 and err.count("nothing was answered, and the message is taken back") == 1

    def leave(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", leave)
    assert main([causal]) == 0


def test_control_characters_do_not_reach_the_terminal(causal, monkeypatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    answer = "a\tb\r\n\x1b[2Jc\x9b1md\x07\x7f é"
    monkeypatch.setattr(Answerer, "stream", lambda self, prompt: iter([tiny.tiny_tokenizer()(answer)["input_ids"]]))
    shown = {}
    for kind in (Screen, io.StringIO):
        monkeypatch.setattr(sys, "stdout", kind())
        assert chat(monkeypatch, ["Hello"], causal) == 0
        shown[kind] = sys.stdout.getvalue()
    assert shown == {Screen: "a\tb\n\ufffd[2Jc\ufffd1md\ufffd\ufffd é\n", io.StringIO: answer + "\n"}


def test_wrong_options(causal, tmp_path) -> None:
    for words, message in (
        (["--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--top_k", "3"], "temperature 0 draws nothing"),
        (["--window", "3"], "was not trained as WeDLM"),
        (["--window", "3", "--autoregressive"], "leave out one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            main([causal, *words])
    model, tokenizer = load_for_inference(causal)
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has no chat template, and a chat needs one"):
        main([str(tmp_path)])


# ---- texts ----


def pieces(tokenizer, tokens: list[int], rng: random.Random) -> list[str]:
    text, found = StreamedText(tokenizer), []
    while tokens:
        count = rng.randint(1, 3)
        found.append(text.add(tokens[:count]))
        tokens = tokens[count:]
    return [*found, text.add([], last=True)]


@pytest.mark.parametrize("real", [False, True], ids=["bytes", "stories260k"])
def test_no_character_is_shown_half(real, request) -> None:
    if real:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("shared_data") / "models" / "stories260k")
    else:
        tokenizer = tiny.tiny_tokenizer()
    rng = random.Random(0)
    for text in (
        "plain words, and more",
        "日本語の文章です。",
        "naïve 🙂👍🏽 café",
        "🙂",
        " led by  spaces\n\n and lines ",
    ):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        for _ in range(20):
            found = pieces(tokenizer, tokens, rng)
            assert "".join(found) == tokenizer.decode(tokens, skip_special_tokens=True)
            assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)
    if not real:
        for _ in range(50):  # bytes that are no text
            tokens = [rng.randrange(259) for _ in range(rng.randint(1, 30))]
            assert "".join(pieces(tokenizer, tokens, rng)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_bytes_that_are_no_text_are_refused() -> None:
    from hf_sft.commands.chat import Chat

    chat = Chat(None)
    with pytest.raises(ValueError, match="the message is not valid UTF-8"):
        chat._answer(b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert chat.turns == []


def test_ctrl_c_is_remembered_where_its_exception_is_swallowed() -> None:
    before = signal.getsignal(signal.SIGINT)
    with _interrupts() as asked:
        assert not asked
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert asked
    assert signal.getsignal(signal.SIGINT) is before
