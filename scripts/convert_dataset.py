"""Convert a public data set to JSON lines that hf_sft reads.

    python scripts/convert_dataset.py tatsu-lab/alpaca --output alpaca.jsonl
    python scripts/convert_dataset.py OpenAssistant/oasst1 --split validation --output oasst1-validation.jsonl
    python scripts/convert_dataset.py GAIR/lima --file downloaded/train.jsonl --output lima.jsonl
    python scripts/convert_dataset.py --file some/folder --output all.jsonl
    python scripts/convert_dataset.py --list

A line is {"messages": [...]}, for preferences {"prompt": [...], "chosen": [...], "rejected": [...]}, for raw texts
{"text": "..."}. Data sets in ``KNOWN`` have a function that knows their shape, which is the one on their cards on the hub; all
others must be in a format that hf_sft reads by itself. With ``--file`` nothing is downloaded: the name only says which function
converts the file or folder. Records that cannot be used are left out and counted by reason.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_sft.cli import run_command
from hf_sft.data.files import BadRecord, Record, read_records
from hf_sft.data.formats import FORMATS, to_conversation
from hf_sft.data.preferences import to_preference
from hf_sft.data.texts import to_text

Converted = dict[str, Any]


# ---- what a record becomes ----


def by_format(record: Any) -> Converted:
    """A record in one of hf_sft's own formats: a preference pair, a conversation or a text."""
    name = next((row.name for row in FORMATS if row.matches(record)), None)
    if name == "preference":
        return preference(record)
    if name == "text" or isinstance(record, str):
        return {"text": to_text(record)}
    conversation = to_conversation(record)
    if not _last_answer(conversation.messages):
        raise ValueError("the last answer is empty")
    extras = {"tools": conversation.tools, "chat_template_kwargs": conversation.template_kwargs}
    return {"messages": conversation.messages, **{key: value for key, value in extras.items() if value is not None}}


def preference(record: Any) -> Converted:
    """The prompt and its two answers; dialogues of hh-rlhf ("\\n\\nHuman: ...\\n\\nAssistant: ...") are taken apart."""
    found = to_preference(record)
    return {"prompt": found.prompt, "chosen": found.chosen, "rejected": found.rejected}


def alternating(record: dict[str, Any]) -> Converted:
    """``conversations``: texts of user and assistant in turns. A last question without an answer is left out."""
    texts = record["conversations"]
    if not isinstance(texts, list) or len(texts) < 2:
        raise ValueError("a question without an answer")
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return by_format({"messages": messages[: len(messages) // 2 * 2]})


def fields(
    question: str, answer: str, *, context: str | None = None, system: str | None = None
) -> Callable[[Any], Converted]:
    """A function for records with the question, what it is about, the answer and a system prompt under these keys."""

    def convert(record: dict[str, Any]) -> Converted:
        known = {"instruction": record[question], "output": record[answer]}
        known |= {"input": record[context]} if context else {}
        return by_format(known | ({"system": record[system]} if system else {}))

    return convert


def best_path(tree: list[dict[str, Any]]) -> Converted:
    """The rows of a message tree: from its root always on to the reply that was ranked best, up to the last answer."""
    replies: dict[str | None, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in tree:
        if not row.get("deleted"):
            replies[row.get("parent_id")].append(row)
    path: list[dict[str, Any]] = []
    while found := replies.pop(path[-1]["message_id"] if path else None, None):
        path.append(min(found, key=lambda row: float("inf") if row.get("rank") is None else row["rank"]))
    roles = {"prompter": "user", "assistant": "assistant"}
    messages = [{"role": roles.get(row["role"], row["role"]), "content": row["text"]} for row in path]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError("a question without an answer")
    return by_format({"messages": messages})


def trees(records: Iterable[Record]) -> Iterator[Record]:
    """Rows of messages, gathered by the tree that they belong to; this holds the data set in memory."""
    found: dict[Any, list[Any]] = {}
    for record in records:
        if isinstance(record.value, dict) and record.value.get("message_tree_id") is not None:
            found.setdefault(record.value["message_tree_id"], []).append(record.value)
        elif isinstance(record.value, BadRecord):
            yield record
        else:
            yield record._replace(value=BadRecord("a message without message_tree_id"))
    yield from (Record(number, rows, "tree") for number, rows in enumerate(found.values(), 1))


def _last_answer(messages: list[dict[str, Any]]) -> bool:
    """Whether there is something to learn in the last answer."""
    last = next(message for message in reversed(messages) if message["role"] == "assistant")
    return bool((last.get("content") or "").strip() or last.get("tool_calls"))


# ---- the data sets ----


class Known(NamedTuple):
    """A data set of the hub: what converts a record, and where its training records are."""

    convert: Callable[[Any], Converted]
    split: str | None = None  # None: train
    config: str | None = None
    gather: Callable[[Iterable[Record]], Iterator[Record]] | None = None


KNOWN: dict[str, Known] = {
    "tatsu-lab/alpaca": Known(fields("instruction", "output", context="input")),
    "yahma/alpaca-cleaned": Known(fields("instruction", "output", context="input")),
    "GAIR/lima": Known(alternating),
    "databricks/databricks-dolly-15k": Known(fields("instruction", "response", context="context")),
    "OpenAssistant/oasst1": Known(best_path, gather=trees),
    "HuggingFaceH4/ultrachat_200k": Known(by_format, split="train_sft"),
    "HuggingFaceH4/no_robots": Known(by_format),
    "Open-Orca/OpenOrca": Known(fields("question", "response", system="system_prompt")),
    "Open-Orca/SlimOrca": Known(by_format),
    "WizardLMTeam/WizardLM_evol_instruct_V2_196k": Known(by_format),
    "meta-math/MetaMathQA": Known(fields("query", "response")),
    "openai/gsm8k": Known(by_format, config="main"),
    "Anthropic/hh-rlhf": Known(preference),
    "HuggingFaceH4/ultrafeedback_binarized": Known(preference, split="train_prefs"),
    "BelleGroup/train_0.5M_CN": Known(fields("instruction", "output", context="input")),
    "YeungNLP/firefly-train-1.1M": Known(fields("input", "target")),
}


# ---- the work ----


class Counts(NamedTuple):
    read: int
    written: int
    skipped: collections.Counter[str]


def convert(records: Iterable[Record], function: Callable[[Any], Converted], output: Path) -> Counts:
    """Write what ``function`` makes of the records; the file appears when it is complete.

    Raises:
        ValueError: nothing was left to write.
    """
    read = written = 0
    skipped: collections.Counter[str] = collections.Counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for record in records:
                read += 1
                try:
                    line = _line(record.value, function)
                except ValueError as error:
                    skipped[str(error)] += 1
                    continue
                file.write(line + "\n")
                written += 1
        if not written:
            raise ValueError(
                f"none of {read} records could be converted, and {output} is not written.{_reasons(skipped)}"
            )
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return Counts(read, written, skipped)


def _line(value: Any, function: Callable[[Any], Converted]) -> str:
    if isinstance(value, BadRecord):
        raise ValueError(value.reason)
    try:
        converted = function(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"another shape than that of the data set ({type(error).__name__}: {error})") from error
    return json.dumps(converted, ensure_ascii=False, allow_nan=False)


def _reasons(skipped: collections.Counter[str]) -> str:
    lines = [f"\n  {count} skipped: {reason}" for reason, count in skipped.most_common(10)]
    more = [f"\n  {len(skipped) - 10} more reasons"] if len(skipped) > 10 else []
    return "".join([*lines, *more])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="convert_dataset.py", description=summary)
    parser.add_argument("name", nargs="?", help="data set of the hub; with --file the one whose shape the file has")
    parser.add_argument("--file", help="a file or folder to read in place of the hub")
    parser.add_argument("--output", "-o", type=Path, help="the file of JSON lines to write")
    parser.add_argument("--overwrite", action="store_true", help="take the place of an output that is there")
    parser.add_argument("--limit", type=int, help="convert the first N records")
    parser.add_argument("--config", help="configuration of the data set")
    parser.add_argument("--split", help="split of the data set; the default is its training split")
    parser.add_argument("--revision", help="branch, tag or commit of the data set")
    parser.add_argument("--list", action="store_true", help="list the data sets whose shape is known")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    if options.list:
        print("\n".join(KNOWN))
        return
    if not (options.name or options.file) or options.output is None:
        raise ValueError("name a data set of the hub or a --file, and an --output; --list shows the known data sets")
    if options.output.exists() and not options.overwrite:
        raise ValueError(f"{options.output} exists, and nothing is overwritten; name a new file, or add --overwrite")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit is {options.limit}: convert at least 1 record, or leave it out for all")
    known = KNOWN.get(options.name or "", Known(by_format))
    if options.name and options.name not in KNOWN:
        print(f"{options.name} is not among the known data sets (--list): its records must be in a format of hf_sft")
    if options.file:
        records = read_records(options.file, split=options.split)
    else:
        config, split = options.config or known.config, options.split or known.split
        records = read_records(options.name, config=config, split=split, revision=options.revision)
    if known.gather is not None:
        records = known.gather(records)
    counts = convert(itertools.islice(records, options.limit), known.convert, options.output)
    print(f"{options.output}: read {counts.read}, wrote {counts.written}.{_reasons(counts.skipped)}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
