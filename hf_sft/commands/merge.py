"""``hf-sft merge``: write an adapter and its base as one model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_sft.commands.options import (
    CommandParser,
    add_dtype_option,
    add_raw_weights_option,
    add_writing_options,
    check_raw_weights,
    tell_of_average,
)
from hf_sft.imports import importing


def main(argv: Sequence[str]) -> int:
    """Merge as ``argv`` says; returns 0. Raises ValueError for everything that a user can put right."""
    parser = CommandParser(
        prog="hf-sft merge", description="Write an adapter merged into its base as one model, shard by shard."
    )
    parser.add_argument("adapter", help="folder (or hub name) of the adapter")
    add_writing_options(parser)
    add_raw_weights_option(parser)
    add_dtype_option(parser, "the base's own; onto dequantised weights the type of training's products")
    parser.add_argument(
        "--onto",
        choices=["original", "dequantized"],
        default="original",
        help="after qlora: the base's original weights (default), or those that training computed with, read back as floats",
    )
    parser.add_argument("--max_shard_size", help="largest file, such as 5GB; default: files as the base has them")
    add_quantisation_options(parser)
    parser.add_argument(
        "--no_check", action="store_true", help="do not compare the written model with the adapter on its base"
    )
    options = parser.options(argv)
    check_raw_weights(options, options.adapter)
    tell_of_average(options, options.adapter)

    with importing():
        from hf_sft.merging import merge_adapter
        from hf_sft.merging.difference import measure_difference, too_large_to_check
        from hf_sft.merging.quantised import training_quantisation

    double = None if options.double_quantization is None else options.double_quantization == "true"
    told = {
        "base": options.base,
        "trust_remote_code": options.trust_remote_code,
        "quantization": options.quantization,
        "double_quantization": double,
        "compute_dtype": options.compute_dtype,
        "averaged": not options.raw_weights,
    }
    folder = merge_adapter(
        options.adapter,
        options.output_dir,
        dtype=options.dtype,
        onto=options.onto,
        max_shard_size=options.max_shard_size,
        **told,
    )
    print(f"Merged model: {folder}")
    held = training_quantisation(options.adapter, options.quantization, double, options.compute_dtype)
    if held is not None and options.onto == "original":
        print(
            f"It is merged into the base's original weights, and training computed with them in {held}: --onto dequantized, with "
            "another --output_dir, merges into those."
        )
    if options.no_check:
        return 0
    if (reason := too_large_to_check(folder)) is not None:
        print(f"Not compared with the adapter on its base: {reason}.")
        return 0
    try:
        print(f"Compared: {measure_difference(options.adapter, folder, **told)}")
    except ValueError as error:  # the merged model stands; what cannot be had is the other one, as without bitsandbytes
        print(f"Not compared with the adapter on its base: {error}")
    return 0


def add_quantisation_options(parser: argparse.ArgumentParser) -> None:
    """How a qlora run held its base, for adapters without an args.json beside them."""
    group = parser.add_argument_group("after qlora, where no args.json beside the adapter says it")
    group.add_argument("--quantization", choices=["nf4", "int8"], help="how the base was held in training")
    group.add_argument("--double_quantization", choices=["true", "false"], help="of nf4; default: true, as in training")
    group.add_argument(
        "--compute_dtype",
        choices=["float32", "bfloat16", "float16"],
        help="type of training's products; default: bfloat16, as in training",
    )
