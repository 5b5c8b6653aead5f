"""``hf-sft prepare``: data files to a folder of token rows that train.py takes; no GPU and no weights are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_sft.commands.options import CommandParser, add_run_options, parse_data_run
from hf_sft.imports import importing


def main(argv: Sequence[str]) -> int:
    """Prepare the data of a run; returns 0. Raises ValueError for everything that a user can put right."""
    options, rest = _parser().options_and_rest(argv)
    if options.output_dir is None:
        raise ValueError("hf-sft prepare needs --output_dir: the folder to write")
    with importing():
        from hf_sft.commands.train import log_to_terminal
        from hf_sft.data.bins import Bins
        from hf_sft.data.prepared import check_new_folder, identity, save_prepared
        from hf_sft.data.rows import Encoding
        from hf_sft.tasks import packing_of, prepare_data, read_data_side

    check_new_folder(options.output_dir)
    arguments = parse_data_run(options, rest)
    log_to_terminal(arguments.training.local_process_index)
    if arguments.data.is_live:
        raise ValueError("streaming and lazy_preprocess tokenise while the model trains: leave them out of prepare")
    tokenizer, objective = read_data_side(arguments)
    prepared = prepare_data(arguments, tokenizer, objective)
    identities: dict[str, Any] = {}
    packing: dict[str, Any] = {}
    for split, part in prepared.items():
        rules = objective.row_rules(evaluation=split == "eval")
        identities[split] = identity(tokenizer, Encoding.of(arguments.data, rules))
        packing[split] = packing_of(Bins(part.rows, arguments.data.bin_capacity))
    save_prepared(options.output_dir, prepared, identities, packing)
    for split, part in prepared.items():
        print(_summary(split, part.report, packing[split]))
    print(f"Written to {options.output_dir}: name it as --train_file, with the same model and template.")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="hf-sft prepare",
        description="Tokenise the data of a run into a folder, with data_report.json. train.py takes the folder as train_file.",
        epilog="Every argument of hf-sft train may follow, such as --eval_file or --max_seq_length.",
    )
    add_run_options(parser)
    parser.add_argument("--output_dir", help="folder to write; it must not exist")
    return parser


def _summary(split: str, report: dict[str, Any], packing: dict[str, Any] | None) -> str:
    dropped = sum(report["dropped"].values())
    fill = f", {packing['bins']:,} bins {packing['fill']:.1%} full" if packing else ""
    return (
        f"{split}: {report['records']:,} records, {report['kept']:,} kept, {dropped:,} dropped, "
        f"{report['bad']['count']:,} bad; {report['tokens']:,} tokens, {report['supervised_share']:.1%} supervised{fill}"
    )
