"""``hf-sft export``: write a model in the form that another program reads."""

from __future__ import annotations

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

FORMATS = {
    "wedlm": "the official WeDLM engine (bfloat16)",
    "safetensors": "transformers and PEFT, from a checkpoint of DeepSpeed ZeRO or FSDP",
}
_ONLY = {"wedlm": ("base", "mask_token_id", "raw_weights"), "safetensors": ("dtype", "max_shard_size")}


def main(argv: Sequence[str]) -> int:
    """Export as ``argv`` says; returns 0. Raises ValueError for everything that a user can put right."""
    parser = CommandParser(
        prog="hf-sft export", description="Write a model, an adapter or a sharded checkpoint for another program."
    )
    parser.add_argument("source", help="folder (or hub name) of the model or of the adapter; or a sharded checkpoint")
    formats = "; ".join(f"{name}: {reader}" for name, reader in FORMATS.items())
    parser.add_argument("--format", required=True, choices=list(FORMATS), help=f"who reads it. {formats}")
    add_writing_options(parser)
    add_raw_weights_option(parser)
    parser.add_argument(
        "--mask_token_id", type=int, help="wedlm: token at mask slots; default: what the model was trained with"
    )
    add_dtype_option(parser, "as the checkpoint holds them (safetensors alone)")
    parser.add_argument("--max_shard_size", help="safetensors: largest file; default: 5GB")
    options = parser.options(argv)
    for name in (name for format, names in _ONLY.items() if format != options.format for name in names):
        if (given := getattr(options, name)) is not None and given is not False:
            raise ValueError(f"--{name} has no place in --format {options.format}; leave it out.")

    if options.format == "safetensors":
        with importing():
            from hf_sft.converting import convert_checkpoint

        folder = convert_checkpoint(
            options.source,
            options.output_dir,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size or "5GB",
            trust_remote_code=options.trust_remote_code,
        )
    else:
        with importing():
            from hf_sft.exporting import export_wedlm

        check_raw_weights(options, options.source)
        tell_of_average(options, options.source)
        folder = export_wedlm(
            options.source,
            options.output_dir,
            base=options.base,
            mask_token_id=options.mask_token_id,
            trust_remote_code=options.trust_remote_code,
            averaged=not options.raw_weights,
        )
    print(f"Exported model: {folder}")
    return 0
