"""Decode the same held-out prompts one token at a time and in parallel: how many answers are right, and in how many passes.

    python examples/wedlm/compare.py LM WEDLM FILE [--check] [--record PATH]

LM is the ordinary model that WEDLM was trained from. With --check the exit status says whether parallel decoding keeps what the
example promises: at least 2.5 tokens per pass at no more than 2 points of accuracy lost, and with verify more than 1.5 at none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sft import generate_wedlm

MAX_NEW_TOKENS = 128
THRESHOLDS = [0.1, 0.2, 0.4, 0.8]


def load(folder: str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: Any, conversations: list[list[dict[str, str]]]) -> list[list[int]]:
    texts = [tokenizer.apply_chat_template(c[:-1], tokenize=False, add_generation_prompt=True) for c in conversations]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def one_by_one(model: Any, tokenizer: Any, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """Greedy autoregressive decoding by transformers; tokens per pass is 1 by definition."""
    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    mask = getattr(model.config, "mask_token_id", None)
    with torch.no_grad():
        output = model.generate(
            **batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, suppress_tokens=None if mask is None else [mask]
        )
    answers = output[:, batch["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    cut = [answer[: next((i + 1 for i, t in enumerate(answer) if t in ends), len(answer))] for answer in answers]
    return cut, 1.0


def in_parallel(model: Any, **options: Any) -> Callable[[Any, Any, list[list[int]]], tuple[list[list[int]], float]]:
    def decode(_: Any, tokenizer: Any, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
        output = generate_wedlm(model, prompts, max_new_tokens=MAX_NEW_TOKENS, **options)
        return output.sequences, output.tokens_per_forward

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lm")
    parser.add_argument("wedlm")
    parser.add_argument("file", help="JSON lines of conversations; the last turn is the answer to expect")
    parser.add_argument("--batch_size", type=int, default=25)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", help="write the table as JSON")
    options = parser.parse_args()
    with open(options.file, encoding="utf-8") as file:
        conversations = [json.loads(line) for line in file]
    lm, tokenizer = load(options.lm)
    model, own_tokenizer = load(options.wedlm)
    prompts = encode(tokenizer, conversations)

    runs: list[tuple[str, Any, Any, Any]] = [
        ("LM, one by one", lm, tokenizer, one_by_one),
        ("WeDLM, one by one", model, own_tokenizer, one_by_one),
    ]
    for verify in (False, True):
        for threshold in THRESHOLDS:
            name = f"WeDLM, {'verify' if verify else 'parallel'}, threshold {threshold}"
            runs.append((name, model, own_tokenizer, in_parallel(model, entropy_threshold=threshold, verify=verify)))
    rows = []
    print("| decoding | right answers | tokens per pass | seconds |\n|---|---|---|---|")
    greedy: list[list[int]] = []
    for name, network, words, decode in runs:
        answers: list[list[int]] = []
        weighted, start = 0.0, time.perf_counter()
        for first in range(0, len(prompts), options.batch_size):
            found, speed = decode(network, words, prompts[first : first + options.batch_size])
            answers += found
            weighted += sum(map(len, found)) / speed
        seconds = time.perf_counter() - start
        texts = words.batch_decode(answers, skip_special_tokens=True)
        right = sum(
            text == conversation[-1]["content"] for text, conversation in zip(texts, conversations, strict=True)
        )
        greedy = answers if name == "WeDLM, one by one" else greedy
        row = {
            "decoding": name,
            "right": 100 * right / len(prompts),
            "tokens_per_pass": sum(map(len, answers)) / weighted,
            "seconds": seconds,
            "as_one_by_one": sum(a == b for a, b in zip(answers, greedy, strict=True)) if greedy else None,
        }
        rows.append(row)
        print(f"| {name} | {row['right']:.1f} % | {row['tokens_per_pass']:.2f} | {seconds:.1f} |", flush=True)
    if options.record:
        Path(options.record).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if options.check:
        sys.exit(0 if keeps_promise(rows, len(prompts)) else 1)


def keeps_promise(rows: list[dict[str, Any]], prompts: int) -> bool:
    base = max(rows[0]["right"], rows[1]["right"])  # whichever of the two is better one token at a time
    free = any(r["tokens_per_pass"] >= 2.5 and r["right"] >= base - 2 for r in rows if "parallel" in r["decoding"])
    verified = [r for r in rows if "verify" in r["decoding"]]
    exact = all(r["as_one_by_one"] == prompts for r in verified)
    fast = any(r["tokens_per_pass"] > 1.5 and r["right"] >= base for r in verified)
    print(
        f"2.5 tokens per pass within 2 points: {free}; verify above 1.5 at none lost: {fast}, exactly greedy: {exact}"
    )
    return free and fast and exact


if __name__ == "__main__":
    main()
