"""``hf-sft export``: write a model in the form that another program reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_sft.commands.options import add_writing_options

FORMATS = {"wedlm": "the official WeDLM engine (bfloat16)"}


def main(argv: Sequence[str]) -> int:
    """Export as ``argv`` says; returns 0. Raises ValueError for everything that a user can put right."""
    parser = argparse.ArgumentParser(
        prog="hf-sft export", description="Write a model, or an adapter merged into its base, for another program."
    )
    parser.add_argument("source", help="folder (or hub name) of the model or of the adapter")
    formats = "; ".join(f"{name}: {reader}" for name, reader in FORMATS.items())
    parser.add_argument("--format", required=True, choices=list(FORMATS), help=f"who reads it. {formats}")
    add_writing_options(parser)
    parser.add_argument(
        "--mask_token_id", type=int, help="token at mask slots; default: what the model was trained with"
    )
    arguments = parser.parse_args(argv)

    from hf_sft.exporting import export_wedlm

    folder = export_wedlm(
        arguments.source,
        arguments.output_dir,
        base=arguments.base,
        mask_token_id=arguments.mask_token_id,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(f"Exported model: {folder}")
    return 0
