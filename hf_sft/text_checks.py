"""Checks of how texts are cut into rows; as in ``hf_sft.checks``, every check yields sentences."""

from __future__ import annotations

from collections.abc import Iterator

from hf_sft.arguments import DataArguments


def check_cutting(data: DataArguments, given: set[str]) -> Iterator[str]:
    """``split_overlap`` and ``pretrain_packing``, and what goes with them."""
    joins = data.pretrain_packing == "concat"
    if "split_overlap" in given and (joins or data.overlength_rule != "split"):
        why = f"overlength is {data.overlength_rule}, and split_overlap belongs to split (of task_type pretrain)"
        if joins:
            why = "pretrain_packing concat joins texts and cuts rows that share one token"
        yield f"split_overlap is {data.split_overlap}: {why}; leave it out"
    elif data.max_seq_length >= 2 and not 1 <= data.split_overlap < data.max_seq_length:
        yield (
            f"split_overlap is {data.split_overlap}: it lies between 1, the token that the next one is predicted from, and "
            f"max_seq_length - 1 ({data.max_seq_length - 1}), so that each part learns something new"
        )
    if joins:
        yield from _check_joining(data)


def _check_joining(data: DataArguments) -> Iterator[str]:
    if data.task_type != "pretrain":
        yield (
            f"pretrain_packing is concat, which joins texts of task_type pretrain, and task_type is {data.task_type}: leave it "
            "out"
        )
    elif data.overlength not in (None, "split"):
        yield (
            f"overlength is {data.overlength} and pretrain_packing is concat: texts are joined and cut, and none is too long; "
            "leave overlength out"
        )
    if data.lazy_preprocess:
        yield (
            "lazy_preprocess is true and pretrain_packing is concat: where a row begins depends on all texts before it, which "
            "are not tokenised yet; leave lazy_preprocess out, or use streaming"
        )
