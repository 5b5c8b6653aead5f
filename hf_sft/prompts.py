"""Prompts of files and of users: read, checked as training data are, and as the token ids that a model goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_sft.data.chat import any_of, forbidden_tokens
from hf_sft.data.files import BadRecord, read_records
from hf_sft.data.formats import FormatError, check_messages, to_conversation

_ANSWER = {"role": "assistant", "content": "..."}  # the checks are those of training data, which ends in an answer


@dataclass
class Request:
    """One prompt: what it says (a text or messages), the answer to expect, where the record has one, and where it stands."""

    prompt: str | list[dict[str, Any]]
    reference: Any = None
    extras: dict[str, Any] = field(default_factory=dict)
    where: str = ""  # file and line

    @property
    def last(self) -> str:
        """The text that the answer is to."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content"))


def read_requests(path: str | Path, raw: bool = False) -> list[Request]:
    """The prompts of a file: ``messages``, ``prompt`` (text or messages) or ``question``; a last answer is the reference.

    Args:
        raw: the prompts are texts to go on with, not conversations.

    Raises:
        ValueError: a record that is no prompt, with its line; a file without any.
    """
    requests = list(_read(Path(path), raw))
    if not requests:
        raise ValueError(
            f"{str(path)!r} holds no prompts; write one JSON object per line, with prompt, question or messages"
        )
    return requests


def _read(path: Path, raw: bool) -> Iterator[Request]:
    for record in read_records(path):
        where = record.where(path)
        if isinstance(record.value, BadRecord):
            raise ValueError(f"{where}: {record.value.reason}")
        try:
            request = _request(record.value)
            if raw and not isinstance(request.prompt, str):
                raise FormatError("raw continues texts, and this record holds messages; leave out raw")
        except FormatError as error:
            raise ValueError(f"{where}: {error}") from error
        request.where = where
        yield request


def _request(record: Any) -> Request:
    """The prompt of a record: ``messages``, ``prompt`` (text or messages) or ``question``, or the bare messages or text."""
    fields = record if isinstance(record, dict) else {"prompt": record}
    found = next((key for key in ("messages", "prompt", "question") if fields.get(key) is not None), None)
    if found is None:
        raise FormatError(
            f"the record has {', '.join(fields) or 'no keys'}; a prompt, a question or messages are needed"
        )
    given = {key: fields.get(key) for key in ("tools", "chat_template_kwargs")}
    checked = to_conversation({"messages": [_ANSWER], **given})
    extras = {"tools": checked.tools, "chat_template_kwargs": checked.template_kwargs}
    prompt = fields[found]
    if isinstance(prompt, str) and found != "messages":
        answers = ("answer",) if found == "question" else ("completion", "generation")
        return Request(prompt, next((fields[key] for key in answers if fields.get(key) is not None), None), extras)
    if not isinstance(prompt, list) or not prompt:
        raise FormatError(
            f"{found} is {prompt!r}; it must be {'' if found == 'messages' else 'a text or '}a list of messages"
        )
    reference = None
    turns = prompt
    if isinstance(prompt[-1], dict) and prompt[-1].get("role") == "assistant":
        turns, reference = prompt[:-1], prompt[-1].get("content")
    if not turns:
        raise FormatError("the conversation is an answer alone; put the user's message before it")
    messages = check_messages([*turns, _ANSWER])[:-1]
    return Request([{k: v for k, v in turn.items() if k != "train"} for turn in messages], reference, extras)


def encode_request(request: Request, tokenizer: Any, *, system: str | None = None, raw: bool = False) -> list[int]:
    """Token ids of the prompt, up to where the model begins to write.

    Args:
        system: system message put before the conversation.
        raw: the text as it is, without a chat template.

    Raises:
        ValueError: no chat template, or one that refuses the conversation; special tokens in a message; a second system
            message; no tokens. It says where the prompt stands.
    """
    if not raw and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; save one with it, or continue plain texts with raw")
    try:
        return _ids(request, tokenizer, system, raw)
    except ValueError as error:
        raise ValueError(f"{request.where}: {error}" if request.where else str(error)) from error


def _ids(request: Request, tokenizer: Any, system: str | None, raw: bool) -> list[int]:
    if raw:
        text = str(request.prompt)
        ids = tokenizer(text, verbose=False)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
            ids = ids[:-1]  # some tokenizers close each text
    else:
        ids = tokenizer(_render(request, tokenizer, system), add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError(f"the prompt {request.prompt!r} has no tokens; write something for the model to go on from")
    return list(ids)


def _render(request: Request, tokenizer: Any, system: str | None) -> str:
    """The conversation under the tokenizer's template, with the generation prompt."""
    turns = [{"role": "user", "content": request.prompt}] if isinstance(request.prompt, str) else request.prompt
    if system is not None:
        if turns[0]["role"] in ("system", "developer"):
            raise ValueError(
                f"the conversation that begins with {turns[0]['content']!r} has a system message; leave out system"
            )
        turns = [{"role": "system", "content": system}, *turns]
    forbidden = any_of(forbidden_tokens(tokenizer, str(tokenizer.chat_template)))
    for turn in turns:
        for text in turn.values():
            if found := forbidden.search(str(text)):
                raise ValueError(
                    f"the {turn['role']} message holds {found[0]!r}, which the tokenizer reads as a special token; remove "
                    "it, or give the whole text as the prompt with raw"
                )
    try:
        return tokenizer.apply_chat_template(
            turns,
            tools=request.extras.get("tools"),
            add_generation_prompt=True,
            tokenize=False,
            **(request.extras.get("chat_template_kwargs") or {}),
        )
    except Exception as error:  # a template is code: it may raise whatever it likes
        raise ValueError(f"the chat template refuses the conversation: {type(error).__name__}: {error}") from error
