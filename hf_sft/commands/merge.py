"""``hf-sft merge``: write an adapter and its base as one model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_sft.commands.options import add_writing_options


def main(argv: Sequence[str]) -> int:
    """Merge as ``argv`` says; returns 0. Raises ValueError for everything that a user can put right."""
    parser = argparse.ArgumentParser(
        prog="hf-sft merge", description="Write an adapter merged into its base as one model."
    )
    parser.add_argument("adapter", help="folder (or hub name) of the adapter")
    add_writing_options(parser)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="type of the written weights; default: the base's own",
    )
    arguments = parser.parse_args(argv)

    from hf_sft.merging import merge_adapter

    folder = merge_adapter(
        arguments.adapter,
        arguments.output_dir,
        base=arguments.base,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(f"Merged model: {folder}")
    return 0
