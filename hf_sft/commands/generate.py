"""``hf-sft generate``: answers of a trained model, in parallel if it was trained as WeDLM."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hf_sft.commands.options import add_decoding_options, decoding_options

_ANSWER = {"role": "assistant", "content": "..."}  # the checks are those of training data, which ends in an answer


@dataclass
class Request:
    """One prompt: what it says (a text or messages), the answer to expect, where the record has one, and where it stands."""

    prompt: str | list[dict[str, Any]]
    reference: Any = None
    extras: dict[str, Any] = field(default_factory=dict)
    where: str = ""  # file and line


@dataclass
class Answer:
    """New tokens, end of turn included, and what they cost; see ``generation.WeDLMOutput``."""

    tokens: list[int]
    forwards: int
    processed: int


def main(argv: Sequence[str]) -> int:
    """Generate as ``argv`` says; returns 0. Raises ValueError for everything that a user can put right."""
    options = _parser().parse_args(argv)
    _check(options)
    requests = [Request(text) for text in options.prompt or ()] or list(_read(Path(options.file), options.raw))

    from hf_sft.generation import check_sampling
    from hf_sft.models.inference import load_for_inference

    check_sampling(options.temperature, options.top_p, options.top_k, options.seed)
    model, tokenizer = load_for_inference(
        options.model, base=options.base, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    if not options.raw and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; save one with it, or continue plain texts with raw")
    decode = _decoder(model, tokenizer, options)
    rows = [_encode(request, tokenizer, options) for request in requests]
    stops = _stop_tokens(model)
    answers: list[Answer] = []
    with _output(options.output) as file:
        for start in range(0, len(requests), options.batch_size):
            batch = slice(start, start + options.batch_size)
            for request, answer in zip(requests[batch], decode(rows[batch]), strict=True):
                stopped = bool(answer.tokens) and answer.tokens[-1] in stops
                written = answer.tokens[:-1] if stopped else answer.tokens
                text = str(tokenizer.decode(written, skip_special_tokens=True))
                answers.append(answer)
                _show(request, text, alone=len(requests) == 1)
                if file is not None:
                    print(json.dumps(_record(request, text, answer, stopped), ensure_ascii=False), file=file)
    _report(answers)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-sft generate", description="Answer prompts with a trained model.")
    parser.add_argument("model", help="folder (or hub name) of a model, or folder of an adapter")
    parser.add_argument("--base", help="the adapter's base; default: what the adapter names")
    parser.add_argument("--dtype", help="type of the weights: float32, bfloat16 or float16; default: the model's own")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that the model brings along")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or several prompts")
    asked.add_argument("--file", help="JSON lines with prompt, question or messages; a last answer is the reference")
    parser.add_argument("--output", help="new file for the answers, as JSON lines")
    parser.add_argument("--system", metavar="TEXT", help="system message put before each conversation")
    parser.add_argument("--raw", action="store_true", help="continue the prompts as they are, without a chat template")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8, help="prompts that are decoded together")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--seed", type=int, help="of the draws at a temperature above 0")
    parallel = parser.add_argument_group("models trained as WeDLM")
    add_decoding_options(parallel)
    parallel.add_argument("--autoregressive", action="store_true", help="decode token by token")
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.batch_size < 1:
        raise ValueError(f"batch_size is {options.batch_size}; at least one prompt has to be decoded at a time")
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {options.max_new_tokens}; it must be at least 1")
    if options.output is not None and Path(options.output).exists():
        raise ValueError(f"output {options.output!r} exists, and nothing is overwritten; name a new file, or remove it")
    if options.raw and options.system is not None:
        raise ValueError(
            "raw continues texts without a chat template, and system belongs into one; leave out one of them"
        )
    if options.autoregressive and (named := _named(options)):
        raise ValueError(f"{named} decodes in parallel, and autoregressive does not; leave out one of them")


def _named(options: argparse.Namespace) -> str:
    """The options of parallel decoding that were given."""
    return ", ".join(decoding_options(options))


def _read(path: Path, raw: bool) -> Iterator[Request]:
    from hf_sft.data.files import BadRecord, read_records
    from hf_sft.data.formats import FormatError

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
    from hf_sft.data.formats import FormatError, check_messages, to_conversation

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


def _encode(request: Request, tokenizer: Any, options: argparse.Namespace) -> list[int]:
    """Token ids of the prompt, up to where the model begins to write; errors say where it stands."""
    try:
        return _ids(request, tokenizer, options)
    except ValueError as error:
        raise ValueError(f"{request.where}: {error}" if request.where else str(error)) from error


def _ids(request: Request, tokenizer: Any, options: argparse.Namespace) -> list[int]:
    if options.raw:
        text = str(request.prompt)
        ids = tokenizer(text)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
            ids = ids[:-1]  # some tokenizers close each text
    else:
        ids = tokenizer(_render(request, tokenizer, options.system), add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the prompt {request.prompt!r} has no tokens; write something for the model to go on from")
    return ids


def _render(request: Request, tokenizer: Any, system: str | None) -> str:
    """The conversation under the tokenizer's template, with the generation prompt."""
    from hf_sft.data.chat import any_of, forbidden_tokens

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


def _decoder(model: Any, tokenizer: Any, options: argparse.Namespace) -> Callable[[list[list[int]]], list[Answer]]:
    """How a batch of prompts is decoded."""
    from hf_sft.models.mask_token import recorded_mask_token

    mask = recorded_mask_token(model)
    if mask is None and (named := _named(options)):
        raise ValueError(
            f"{options.model!r} names no mask token, so it was not trained as WeDLM and is decoded token by token; leave out "
            f"{named}"
        )
    if mask is None or options.autoregressive:
        return _autoregressive(model, tokenizer, mask, options)
    return _parallel(model, options)


def _parallel(model: Any, options: argparse.Namespace) -> Callable[[list[list[int]]], list[Answer]]:
    import torch

    from hf_sft.decoding.passes import input_device
    from hf_sft.generation import generate_wedlm
    from hf_sft.models.wrappers import base_model

    named = decoding_options(options)
    shared = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    generator = None
    if options.seed is not None:  # one for all batches: none repeats the draws of another
        generator = torch.Generator(input_device(base_model(model))).manual_seed(options.seed)

    def decode(rows: list[list[int]]) -> list[Answer]:
        output = generate_wedlm(model, rows, generator=generator, **shared, **named)
        return [Answer(*parts) for parts in zip(output.sequences, output.forwards, output.processed, strict=True)]

    return decode


def _autoregressive(
    model: Any, tokenizer: Any, mask: int | None, options: argparse.Namespace
) -> Callable[[list[list[int]]], list[Answer]]:
    """Through ``model.generate``; a mask token is never written."""
    import torch
    from transformers import GenerationConfig, set_seed

    from hf_sft.decoding.passes import input_device
    from hf_sft.models.wrappers import base_model

    draws: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        draws = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k")} | {"do_sample": True}
    if options.seed is not None:
        set_seed(options.seed)
    stops, device, pad = _stop_tokens(model), input_device(base_model(model)), tokenizer.pad_token_id
    # The options alone say how: what the model's own config names (a repetition penalty, say) would change greedy decoding.
    base_model(model).generation_config = GenerationConfig(
        eos_token_id=list(stops) or None,
        pad_token_id=pad,
        suppress_tokens=None if mask is None else [mask],
        max_new_tokens=options.max_new_tokens,
        **draws,
    )

    def decode(rows: list[list[int]]) -> list[Answer]:
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        output = model.generate(input_ids=ids, attention_mask=seen)
        answers = []
        for new in output[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(new) if token in stops), len(new))
            answers.append(Answer(new[:end], end, end))
        return answers

    return decode


def _stop_tokens(model: Any) -> tuple[int, ...]:
    from hf_sft.generation import stop_tokens
    from hf_sft.models.wrappers import base_model

    return stop_tokens(base_model(model))


def _show(request: Request, text: str, alone: bool) -> None:
    if not alone:
        last = request.prompt if isinstance(request.prompt, str) else request.prompt[-1].get("content")
        print(f"> {last}")
    print(text, flush=True)


def _record(request: Request, text: str, answer: Answer, stopped: bool) -> dict[str, Any]:
    record = {"prompt": request.prompt, "answer": text}
    if request.reference is not None:
        record["reference"] = request.reference
    return {**record, "tokens": len(answer.tokens), "forwards": answer.forwards, "stopped": stopped}


def _report(answers: list[Answer]) -> None:
    tokens, forwards = sum(len(answer.tokens) for answer in answers), sum(answer.forwards for answer in answers)
    processed = sum(answer.processed for answer in answers)
    print(
        f"{len(answers)} answers, {tokens} new tokens: {tokens / forwards:.2f} tokens per forward, "
        f"prefix cacheability {tokens / processed:.2f}",
        file=sys.stderr,
    )


@contextmanager
def _output(path: str | None) -> Iterator[IO[str] | None]:
    """A file that stands at ``path`` once all is written."""
    if path is None:
        yield None
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        written = Path(beside) / target.name
        with written.open("w", encoding="utf-8") as file:
            yield file
        if target.exists():
            raise ValueError(
                f"output {path!r} has come into being meanwhile, and nothing is overwritten; name a new file"
            )
        os.replace(written, target)
