"""When a loss has jumped, for the training that watches it and for the page that reads its log without torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

LINES = 20  # of the log, that a loss is compared with
_RATIO, _RISE = 3.0, 1.0  # a jump is above so many times their median, and so many nats above it


def jumped(loss: float, earlier: Sequence[float]) -> float | None:
    """The median of the ``earlier`` losses (the last ``LINES`` of the log) if ``loss`` is above all of them, above 3 times that
    median and more than 1 above it; else None."""
    if not earlier:
        return None
    middle = median(earlier)
    return middle if loss > max(*earlier, _RATIO * middle, middle + _RISE) else None
