"""Best-fit packing of documents into bins of a fixed capacity.

length   9 6 5 4 3 3 2      capacity 10
bins     [9] [6 4] [5 3 2] [3]
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_documents(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack documents into bins by best-fit decreasing; no document is cut or left out.

    The longest document comes first, and each goes into the fullest bin that still has room for it. The result depends
    on nothing but the arguments. O(n log n) comparisons.

    Args:
        lengths: tokens of each document, each in [1, capacity].
        capacity: tokens that a bin holds.

    Returns:
        The bins as lists of indices into ``lengths``: ascending inside a bin, bins ordered by their first index.

    Raises:
        ValueError: a document that is empty or longer than a bin, or a capacity below 1.
    """
    if capacity < 1:
        raise ValueError(f"The capacity of a bin is {capacity}, but it must be at least 1 token. Set max_seq_length.")
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(
                f"Document {index} has {length} tokens, but a bin holds 1 to {capacity}. Leave empty documents out; "
                "for long ones raise max_seq_length, or shorten or drop them first (overlength: truncate or drop)."
            )
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # free tokens -> bins with exactly so many
    free_sizes: list[int] = []  # the keys of open_bins, sorted; never more than capacity
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = int(lengths[index])
        place = bisect_left(free_sizes, length)
        if place == len(free_sizes):
            number, free = len(bins), capacity
            bins.append([])
        else:
            free = free_sizes[place]
            number = open_bins[free].pop()
            if not open_bins[free]:
                del open_bins[free], free_sizes[place]
        bins[number].append(index)
        free -= length
        if free:
            if free not in open_bins:
                open_bins[free] = []
                insort(free_sizes, free)
            open_bins[free].append(number)
    return sorted((sorted(members) for members in bins), key=lambda members: members[0])
