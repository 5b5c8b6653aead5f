"""Ask a trained model the prompts of a file, greedily, and count the answers that are exactly right.

python examples/quickstart/ask.py MODEL FILE [--show 5] [--at_least 90]
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("file", help="JSON lines of conversations; the last turn is the answer to expect")
    parser.add_argument("--show", type=int, default=5)
    parser.add_argument("--at_least", type=float, default=0.0, help="fail if fewer per cent of the answers are right")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    with open(options.file, encoding="utf-8") as file:
        conversations = [json.loads(line) for line in file]
    prompts = [tokenizer.apply_chat_template(c[:-1], tokenize=False, add_generation_prompt=True) for c in conversations]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [answer == conversation[-1]["content"] for answer, conversation in zip(answers, conversations, strict=True)]
    for conversation, answer, ok in list(zip(conversations, answers, right, strict=True))[: options.show]:
        print(f"  {conversation[-2]['content']:<34} -> {answer:<16} {'right' if ok else 'wrong'}")
    share = 100 * sum(right) / len(right)
    print(f"{sum(right)} of {len(right)} answers to held-out prompts are right ({share:.1f} %)")
    sys.exit(0 if share >= options.at_least else 1)


if __name__ == "__main__":
    main()
