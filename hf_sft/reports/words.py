"""Numbers and times for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone

from hf_sft.pages import number


def figure(value: float) -> str:
    """Four significant digits: 2.004, 1.23e-4, 0.5."""
    text = number(value, digits=4)
    return text.rstrip("0").rstrip(".") if "." in text and text[-1] == "0" and "e" not in text else text


def count(value: float) -> str:
    """487, 12.3k, 1.18M."""
    size = abs(value)
    for power, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= (10 * power if letter == "k" else power) * 0.9995:
            return f"{value / power:.3g}{letter}"
    return f"{value:,.0f}"


def percent(share: float) -> str:
    """Of a share: 56.6 %, < 0.1 %."""
    if not math.isfinite(share):
        return "NaN"
    shown = f"{100 * share:.0f}" if share in (0, 1) else "< 0.1" if 0 < share < 0.0005 else f"{100 * share:.1f}"
    return f"{shown} %"


def duration(seconds: float) -> str:
    """45.3 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if not math.isfinite(seconds):
        return "NaN"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, names in ((86400, 3600, ("d", "h")), (3600, 60, ("h", "min")), (60, 1, ("min", "s"))):
        if whole >= large:
            first, rest = divmod(round(whole / small), large // small)
            return f"{first} {names[0]}" + (f" {rest} {names[1]}" if rest else "")
    return f"{whole} s"


def date(seconds: float) -> str:
    """Of seconds since 1970: 21 November 2026, 17:47 UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%d %B %Y, %H:%M UTC").lstrip("0")


def listed(names: Sequence[str], most: int = 5) -> str:
    """a, b and c; of many, the first."""
    shown, more = list(names[:most]), len(names) - most
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return ", ".join(shown[:-1]) + " and " + shown[-1] if len(shown) > 1 else "".join(shown)
