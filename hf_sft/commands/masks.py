"""``hf-sft inspect --masks``: who sees whom in a WeDLM batch, or in which order an answer is decoded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hf_sft.commands.options import (
    CommandParser,
    add_decoding_options,
    add_run_options,
    decoding_options,
    parse_data_run,
)

# The built-in example: prompts and answers, tokenised at spaces.
EXAMPLE = [("Capital of France ?", "The capital is Paris . <end>"), ("Say hi !", "Hi ! <end>")]
_EXAMPLE_BLOCK_SIZE, _EXAMPLE_SEED = 4, 4
_MOST_TOKENS = 4000  # in both streams: the picture has the square of it in cells


def main(words: Sequence[str]) -> int:
    """Draw the attention mask of documents, or the order in which an answer to a prompt is decoded. Raises ValueError for
    everything that a user can put right."""
    options, rest = _parser().options_and_rest(words)
    _check(options, rest)
    if options.prompt is not None:
        return _show_order(options)
    from hf_sft.drawing import draw_masks, mask_panel, text_picture

    collator, rows, name, what = _documents(options, rest) if _names_a_run(options) else _example(options)
    tokens = sum(2 * len(row["input_ids"]) for row in rows)
    if tokens > _MOST_TOKENS:
        raise ValueError(
            f"these documents have {tokens} tokens in two streams, more than {_MOST_TOKENS} that can be seen: name shorter ones "
            "with --documents"
        )
    panels = [
        mask_panel(replace(collator, elide=elide)([rows]), name, title)
        for elide, title in ((False, "full"), (True, "elided"))
    ]
    if options.text:
        print("\n\n".join(map(text_picture, panels)))
    if options.output is not None:
        title = f"WeDLM attention mask, blocks of {collator.rule.block_size} tokens{what}"
        print(f"Picture: {draw_masks(panels, options.output, title)}")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="hf-sft inspect --masks",
        description="Draw who sees whom in a WeDLM batch, with the noise of the run: of a built-in example, of the documents of "
        "a run (--train_args_file) or of a file (--model, --file). With --model and --prompt: the order in which a trained "
        "model decodes its answer.",
        epilog="Behind --train_args_file, or --model and --file, every argument of hf-sft train may follow, such as --seed.",
    )
    add_run_options(parser)
    parser.add_argument("--documents", type=int, nargs="+", metavar="N", help="documents to draw, from 0; default: 0 1")
    parser.add_argument("--epoch", type=int, help="epoch whose noise is drawn; default: 0")
    parser.add_argument("--output", help="picture to write (.png, .svg, .pdf); default: masks.png, or order.png")
    parser.add_argument("--overwrite", action="store_true", help="write over the picture")
    parser.add_argument("--text", action="store_true", help="print the picture as text; drawn too if --output is given")
    order = parser.add_argument_group("decoding order")
    order.add_argument("--prompt", help="what the model answers")
    order.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a chat template")
    order.add_argument("--max_new_tokens", type=int, default=128)
    add_decoding_options(order)
    return parser


def _names_a_run(options: argparse.Namespace) -> bool:
    return options.train_args_file is not None or options.file is not None


def _check(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """What fits together, and whether the picture can be written, before anything is loaded."""
    if options.prompt is not None and _names_a_run(options):
        raise ValueError(
            "--prompt asks for a decoding order and --file or --train_args_file for a mask: leave out one of them"
        )
    if options.prompt is not None and options.model is None:
        raise ValueError("--prompt needs a model to answer it: name one with --model")
    if options.train_args_file is not None and (options.model or options.file):
        raise ValueError("--train_args_file names its model and data: leave out --model and --file")
    if options.prompt is None and (options.model is None) != (options.file is None):
        raise ValueError("--model and --file go together for a mask; for a decoding order, --model and --prompt")
    if rest and not _names_a_run(options):
        raise ValueError(f"hf-sft inspect --masks has no argument {rest[0]}; --help lists them")
    if options.output is None and not options.text:
        options.output = "masks.png" if options.prompt is None else "order.png"
    if options.output is not None:
        from hf_sft.drawing import check_picture

        check_picture(options.output, overwrite=options.overwrite)


def _example(options: argparse.Namespace) -> tuple[Any, list[dict[str, Any]], Callable[[int], str], str]:
    """(collator, token rows, text of a token, what they are) of the built-in example."""
    from hf_sft.collators import WeDLMCollator
    from hf_sft.data.chat import IGNORE
    from hf_sft.noise import MaskRule

    if options.documents is not None:
        raise ValueError("--documents chooses from a file: name it with --train_args_file, or --model and --file")
    vocabulary = list(dict.fromkeys(word for pair in EXAMPLE for text in pair for word in text.split()))
    rows = []
    for prompt, answer in EXAMPLE:
        asked, told = ([vocabulary.index(word) for word in text.split()] for text in (prompt, answer))
        rows.append({"input_ids": asked + told, "labels": [IGNORE] * len(asked) + told, "epoch": options.epoch or 0})
    collator = WeDLMCollator(len(vocabulary), MaskRule(_EXAMPLE_BLOCK_SIZE), seed=_EXAMPLE_SEED)
    return collator, rows, lambda token: vocabulary[token], ""


def _documents(
    options: argparse.Namespace, rest: Sequence[str]
) -> tuple[Any, list[dict[str, Any]], Callable[[int], str], str]:
    """The same for documents of a run, as its training sees them."""
    from hf_sft.data.bins import Bins
    from hf_sft.data.pipeline import prepare_dataset
    from hf_sft.drawing import token_text
    from hf_sft.tasks import read_data_side

    words = ["--objective", "wedlm"] if options.train_args_file is None else []
    arguments = parse_data_run(options, rest, *words)
    if arguments.data.objective != "wedlm":
        raise ValueError(f"objective is {arguments.data.objective}, and the masks are WeDLM's: add --objective wedlm")
    tokenizer, objective = read_data_side(arguments, whole_rows=False)
    rules, seed = objective.row_rules(evaluation=False), arguments.training.seed
    prepared = prepare_dataset(arguments.data.train_file, tokenizer, data=arguments.data, rules=rules, seed=seed)
    bins = Bins(prepared.rows, None)
    numbers = options.documents if options.documents is not None else list(range(min(2, len(bins))))
    if wrong := [number for number in numbers if not 0 <= number < len(bins)]:
        raise ValueError(f"--documents names {wrong[0]}, and there are documents 0 to {len(bins) - 1}")
    epoch = options.epoch or 0
    rows = [row for number in numbers for row in bins[epoch, number]]
    collator = objective.collator(True, int(tokenizer.pad_token_id), evaluation=False)
    named = f"document{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}, epoch {epoch}"
    return collator, rows, lambda token: token_text(tokenizer.decode([token])), f" ({named})"


# ---- the decoding order ----


def _show_order(options: argparse.Namespace) -> int:
    from hf_sft.drawing import draw_order, token_text
    from hf_sft.generation import generate_wedlm
    from hf_sft.models.inference import load_for_inference

    model, tokenizer = load_for_inference(options.model)
    decoded = generate_wedlm(
        model,
        [_prompt_ids(options, tokenizer)],
        max_new_tokens=options.max_new_tokens,
        **decoding_options(options),
    )
    order, forwards = decoded.order[0], decoded.forwards[0]
    tokens = [token_text(str(tokenizer.decode([token]))) for token in decoded.sequences[0]]
    kind = "Verified decoding order" if options.verify else "Decoding order"
    title = f"{kind}: {len(tokens)} tokens in {forwards} forward passes, {len(tokens) / forwards:.1f} per pass"
    if options.text:
        print(title)
        for number in sorted(set(order)):
            filled = [f"{place}:{token}" for place, token in enumerate(tokens) if order[place] == number]
            print(f"{number:4}  {'  '.join(filled)}")
    if options.output is not None:
        print(f"Picture: {draw_order(tokens, order, options.output, title)}")
    return 0


def _prompt_ids(options: argparse.Namespace, tokenizer: Any) -> list[int]:
    if options.raw:
        return tokenizer(options.prompt)["input_ids"]
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: add --raw to continue the prompt as it is")
    turns = [{"role": "user", "content": options.prompt}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
