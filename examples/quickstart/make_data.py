"""Write everything that the quickstart trains on: conversations, a tokenizer and the config of a small model. Offline, seeded.

    python examples/quickstart/make_data.py FOLDER [--records 18000] [--seed 0]

The task: the user names a few digits, the assistant puts them in order, upwards or downwards. Every fifth set of digits is held
out of training whole, so that an answer to a held-out prompt cannot be remembered.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = {
    False: ["Sort {}.", "Put {} in order.", "{}: smallest first?"],
    True: ["Sort {} backwards.", "{}: largest first?"],
}


def record(rng: random.Random, held_out: bool) -> list[dict[str, str]]:
    """One conversation, in or out of the held-out sets of digits."""
    while True:
        digits = rng.sample(range(10), rng.randint(3, 5))
        if (sum(2**digit for digit in digits) % 5 == 0) == held_out:
            break
    downwards = rng.random() < 0.5
    question = rng.choice(ASK[downwards]).format(" ".join(map(str, digits)))
    answer = " ".join(map(str, sorted(digits, reverse=downwards)))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_records(path: Path, records: Iterable[list[dict[str, str]]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and ChatML's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_model(folder: Path) -> None:
    """The tokenizer, and the config of a Qwen3 of 0.8 million parameters."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(folder)


def main(description: str, record: Callable[[random.Random, bool], list[dict[str, str]]], records: int) -> None:
    """Write train.jsonl, eval.jsonl (200 held-out records) and model/ to the folder on the command line."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=records)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    write_records(options.folder / "train.jsonl", (record(rng, False) for _ in range(options.records)))
    write_records(options.folder / "eval.jsonl", (record(rng, True) for _ in range(200)))
    write_model(options.folder / "model")
    print(f"{options.records} conversations, tokenizer and config in {options.folder}")


if __name__ == "__main__":
    main(__doc__, record, 18_000)
