"""``hf-sft generate``: answers of a trained model, in parallel if it was trained as WeDLM."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_sft.commands.options import (
    CommandParser,
    add_answer_options,
    add_model_options,
    answer_options,
    check_answer_options,
    load_model_of,
)
from hf_sft.imports import importing

if TYPE_CHECKING:
    from hf_sft.answering import Answer
    from hf_sft.commands.answer_file import AnswerFile
    from hf_sft.prompts import Request

_INTERRUPTED = 130  # exit code, as of a process that Ctrl-C has ended


def main(argv: Sequence[str]) -> int:
    """Generate as ``argv`` says; returns the exit code. Raises ValueError for everything that a user can put right."""
    options = _parser().options(argv)
    if options.batch_size < 1:
        raise ValueError(f"batch_size is {options.batch_size}; at least one prompt has to be decoded at a time")
    if options.raw and options.system is not None:
        raise ValueError(
            "raw continues texts without a chat template, and system belongs into one; leave out one of them"
        )
    check_answer_options(options)
    with importing():
        from hf_sft.answering import Answerer
        from hf_sft.prompts import Request, encode_request, read_requests

    requests = [Request(text) for text in options.prompt or ()] or read_requests(options.file, options.raw)
    output = None if options.output is None else _output(options, requests)
    if output is not None and output.is_complete:
        print(f"{options.output} has its {len(requests)} answers already; nothing was generated", file=sys.stderr)
        return 0
    model, tokenizer = load_model_of(options)
    answerer = Answerer(model, tokenizer, **answer_options(options))
    rows = [encode_request(request, tokenizer, system=options.system, raw=options.raw) for request in requests]
    _check_rooms(requests, rows, answerer)
    try:
        _report(_generate(answerer, requests, rows, options.batch_size, output))
    except KeyboardInterrupt:
        begun = output is not None and output.partial.is_file()
        kept = (
            ""
            if output is None or not begun
            else f"; what is answered stands in {output.partial}, and the same command goes on"
        )
        print(f"\nstopped{kept}", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="hf-sft generate", description="Answer prompts with a trained model.")
    add_model_options(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or several prompts")
    asked.add_argument("--file", help="JSON lines with prompt, question or messages; a last answer is the reference")
    parser.add_argument(
        "--output",
        help="file for the answers, as JSON lines; one that the same command left unfinished is gone on with",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message put before each conversation")
    parser.add_argument("--raw", action="store_true", help="continue the prompts as they are, without a chat template")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts that are decoded together")
    add_answer_options(parser)
    return parser


def _generate(
    answerer: Any, requests: list[Request], rows: list[list[int]], batch_size: int, output: AnswerFile | None
) -> list[Answer]:
    """Answer what is not answered yet; written if there is a file, and shown unless that holds more than a batch."""
    from tqdm import tqdm

    done = 0 if output is None else output.done
    if done:
        print(f"{done} of {len(requests)} answers are there already; going on behind them", file=sys.stderr)
    answerer.batches = done // batch_size  # the draws of a batch go by its number
    answers: list[Answer] = []
    few = len(requests) <= batch_size
    with tqdm(total=len(requests), initial=done, unit=" answers", disable=True if few else None) as bar:
        for start in range(done, len(requests), batch_size):
            batch = slice(start, start + batch_size)
            found = answerer(rows[batch])
            texts = [answerer.text(answer) for answer in found]
            if output is not None:
                output.append(map(_record, requests[batch], texts, found))
            if few or output is None:
                with bar.external_write_mode(file=sys.stdout):
                    for request, text in zip(requests[batch], texts, strict=True):
                        _show(request, text, alone=len(requests) == 1)
            answers += found
            bar.update(len(found))
    if output is not None:
        output.complete()
    return answers


def _output(options: argparse.Namespace, requests: list[Request]) -> AnswerFile:
    """The file of answers, which is this command's: of the same model, options and prompts."""
    from hf_sft.commands.answer_file import AnswerFile
    from hf_sft.models.inference import files_key, find_model

    model = find_model(options.model, options.checkpoint)
    prompts = json.dumps([[request.prompt, request.extras] for request in requests], ensure_ascii=False)
    apart = ("output", "prompt", "file", "batch_size", "model", "checkpoint", "trust_remote_code")
    run = {
        "model": model,
        "the model's files": files_key(model),
        "the base's files": _base_files(model, options.base),
        "number of prompts": len(requests),
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
        **{name: value for name, value in vars(options).items() if name not in apart},
    }
    drawn_in_batches = options.seed is not None
    if drawn_in_batches:
        run["batch_size"] = options.batch_size
    return AnswerFile(options.output, run, step=options.batch_size if drawn_in_batches else 1)


def _base_files(model: str, base: str | None) -> str | None:
    """The key of the files below an adapter."""
    from hf_sft.models.inference import base_arguments, files_key, is_adapter

    name = base_arguments(model, base).model_name_or_path if is_adapter(model) else base
    return None if name is None else files_key(name)


def _check_rooms(requests: list[Request], rows: list[list[int]], answerer: Any) -> None:
    """Raise ValueError for a prompt that leaves no position for an answer; say how many answers have to be shorter."""
    positions = answerer.positions
    if positions is None:
        return
    for number, (request, row) in enumerate(zip(requests, rows, strict=True), start=1):
        if len(row) >= positions:
            raise ValueError(
                f"{request.where or f'prompt {number}'}: the prompt has {len(row)} tokens, and the model was made for "
                f"{positions} positions, which leaves none for an answer; shorten it"
            )
    if short := sum(len(row) + answerer.max_new_tokens > positions for row in rows):
        print(
            f"the model was made for {positions} positions: {short} of {len(rows)} prompts leave room for fewer than "
            f"{answerer.max_new_tokens} new tokens",
            file=sys.stderr,
        )


def _show(request: Request, text: str, alone: bool) -> None:
    if not alone:
        print(f"> {request.last}")
    print(text, flush=True)


def _record(request: Request, text: str, answer: Answer) -> dict[str, Any]:
    record = {"prompt": request.prompt, "answer": text}
    if request.reference is not None:
        record["reference"] = request.reference
    return {**record, "tokens": len(answer.tokens), "forwards": answer.forwards, "stopped": answer.stopped}


def _report(answers: list[Answer]) -> None:
    tokens, forwards = sum(len(answer.tokens) for answer in answers), sum(answer.forwards for answer in answers)
    processed = sum(answer.processed for answer in answers)
    rate = (
        f": {tokens / forwards:.2f} tokens per forward, prefix cacheability {tokens / processed:.2f}" if tokens else ""
    )
    print(f"{len(answers)} answer{'s' * (len(answers) != 1)}, {tokens} new tokens{rate}", file=sys.stderr)
