"""``hf-sft export``: write a model in the form that another program reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

FORMATS = {"wedlm": "the official WeDLM engine (bfloat16)"}


def main(argv: Sequence[str]) -> int:
    """Export as ``argv`` says; returns 0. Raises ValueError for everything that a user can put right."""
    parser = argparse.ArgumentParser(
        prog="hf-sft export", description="Write a model, or an adapter merged into its base, for another program."
    )
    parser.add_argument("source", help="folder (or hub name) of the model or of the adapter")
    formats = "; ".join(f"{name}: {reader}" for name, reader in FORMATS.items())
    parser.add_argument("--format", required=True, choices=list(FORMATS), help=f"who reads it. {formats}")
    parser.add_argument("--output_dir", required=True, help="new folder for the model and its tokenizer")
    parser.add_argument("--base", help="folder or hub name of an adapter's base; default: what the adapter names")
    parser.add_argument(
        "--mask_token_id", type=int, help="token at mask slots; default: what the model was trained with"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that the source brings along")
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
