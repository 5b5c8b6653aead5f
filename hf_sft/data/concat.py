"""Texts joined into one stream of tokens and cut into rows of equal length, for ``pretrain_packing: concat``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from hf_sft.data.chat import IGNORE

LABELS = 1  # the place of the labels among the columns


def join(parts: Iterable[Sequence[np.ndarray]], length: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Rows of ``length`` tokens of the stream that ``parts`` make together; the last may be shorter.

    Each row begins with the last token of the one before, which is not learned again, and the first token of the stream has
    nothing before it: so of all others each is learned exactly once, as its label says.

    Args:
        parts: token ids, labels and any other columns, each [tokens of the part].
        length: at least 2.

    Yields:
        The same columns, [tokens of the row].
    """
    columns: list[np.ndarray] | None = None
    for part in parts:
        if not len(part[0]):
            continue
        if columns is None:
            columns = [column.copy() for column in part]
            columns[LABELS][0] = IGNORE
        else:
            columns = [np.concatenate(pair) for pair in zip(columns, part, strict=True)]
        start = 0
        while len(columns[0]) - start >= length:
            yield tuple(column[start : start + length].copy() for column in columns)
            start += length - 1
            columns[LABELS][start] = IGNORE
        columns = [column[start:] for column in columns]
    if columns is not None and len(columns[0]) > 1:
        yield tuple(columns)
