"""The final answer of a worked solution, and whether two of them are the same: numbers as numbers, the rest as text."""

from __future__ import annotations

import re
from fractions import Fraction

_MARK = re.compile(r"####|\\f?boxed\s*(?=\{)")
_FRACTION = re.compile(  # 3\frac{1}{2}, \frac12
    r"(\d{0,40})\s*\\[dt]?frac\s*(?:\{\s*(-?)(\d{1,40})\s*\}|(\d))\s*(?:\{\s*(\d{1,40})\s*\}|(\d))"
)
_GROUPED = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"
_MAGNITUDES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_LETTERS = {"k": "thousand", "m": "million", "mn": "million", "b": "billion", "bn": "billion"}
# $5M and €2.5k: a letter behind a number is one behind a currency alone, and $5k$ is LaTeX.
_SHORT = re.compile(r"([$€£¥]\d[\d,]{0,40}(?:\.\d{1,40})?)\s?(mn|bn|[kmb])(?=\s*(?:$|[.,;:!?)}]|[^\W\d_]))(?!\w)", re.I)
# A sign only where no number or word stands before it: "10-3" ends in 3. A whole number before a fraction is a mixed number.
_NUMBER = re.compile(
    rf"(?:(?<![\w)])(-)\s*)?(?:[€£¥]\s*)?(?:({_GROUPED}) (?=\d{{1,40}} ?/ ?\d))?((?:{_GROUPED})(?:\.\d+)?|\.\d+)"
    rf"(?:\s*/\s*(\d+(?:\.\d+)?))?((?:[ -]?(?:{'|'.join(_MAGNITUDES)})s?(?!\w)){{0,3}})",
    re.I,
)
_MAGNITUDE = re.compile("|".join(_MAGNITUDES))
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:!]|\\ |\\left(?![a-z])|\\right(?![a-z])|\^\s*(?:\{?\\circ\}?|°)|[*`]|\\[()\[\]]")
# What may stand beside the number of a marked answer: words, and behind it a unit, of one letter only after a space (5x is no 5).
_BEFORE = re.compile(r"(?:[^\W\d]+[\s:=]|[\s€£¥:=~≈])*")
_AFTER = re.compile(r"\s*[%°€£¥]?[\s.,]*|(?:\s+|(?=[^\W\d]{2}))[^\W\d](?:[^\W\d]|[\s.,'-]|\^\s*\{?\d\}?)*")
_LONGEST = 300  # characters of a number: longer ones are no answers, and slow


def has_final_answer(text: str) -> bool:
    r"""Whether a ``#### 42`` or ``\boxed{42}`` stands in the text, with something behind or in it."""
    return _marked(text) is not None


def final_answer(text: str) -> Fraction | str | None:
    r"""The answer that a worked solution ends with.

    It is what stands behind the last ``####`` of the text, up to the end of the line, or in the last ``\boxed{...}``, whichever
    comes later; without either, the last number of the text. A marked answer that is one number, with a currency, a percent
    sign or a unit beside it, is that number: 1,000 = 1000.0 = $1000 = 1000 apples, 50% = 50, ``\frac{1}{2}`` = 1/2 = 0.5. Words
    of magnitude behind a number multiply it (3 million, 2 dozen, $1.5M), and mixed numbers are sums (5 1/2 = 5.5).

    Returns:
        A number, exactly; any other marked answer as a text without spaces; None where the text has no answer.
    """
    marked = _marked(text)
    if marked is None:
        plain = _plain(text)
        numbers = [number for found in _NUMBER.finditer(plain) for number in (_value(found), _fraction(plain, found))]
        return next((number for number in reversed(numbers) if number is not None), None)
    plain = _plain(marked).strip()
    found = _NUMBER.search(plain)
    if found and _BEFORE.fullmatch(plain[: found.start()]) and _AFTER.fullmatch(plain[found.end() :]):
        number = _value(found)
        if number is not None:
            return number
    return "".join(plain.rstrip(".").split())


def _marked(text: str) -> str | None:
    """What the last mark of a text holds that holds anything."""
    closing = _braces(text)
    for mark in reversed(list(_MARK.finditer(text))):
        if mark.group() == "####":
            held = text[mark.end() :].split("\n", 1)[0]
        else:
            held = text[mark.end() + 1 : closing.get(mark.end(), 0)]
        if held.strip():
            return held
    return None


def _braces(text: str) -> dict[int, int]:
    """Where each brace that opens is closed, one inside another; those that never are are left out."""
    opened: list[int] = []
    closing = {}
    for brace in re.finditer(r"[{}]", text):
        if brace.group() == "{":
            opened.append(brace.start())
        elif opened:
            closing[opened.pop()] = brace.start()
    return closing


def _plain(text: str) -> str:
    """The text with LaTeX's ways to write numbers undone."""
    text = text.replace("{,}", ",").replace("\N{MINUS SIGN}", "-").replace(r"\$", "$").replace(r"\%", "%")
    text = _SHORT.sub(lambda found: f"{found[1]} {_LETTERS[found[2].lower()]}", text)
    text = _TEXT_COMMAND.sub(r" \1 ", _SPACING.sub("", text))
    text = _FRACTION.sub(_as_ratio, " ".join(text.split()))
    return text.replace("$", "")


def _as_ratio(found: re.Match[str]) -> str:
    """``3\\frac{1}{2}`` as 7/2."""
    whole, sign = found[1], found[2] or ""
    over, under = int(found[3] or found[4]), int(found[5] or found[6])
    return f"{int(whole) * under + over}/{under}" if whole else f" {sign}{over}/{under}"


def _fraction(text: str, found: re.Match[str]) -> Fraction | None:
    """What stands behind the whole number of 3 4/2, two numbers beside each other; None for all other matches."""
    alone = _NUMBER.match(text, found.start(3))
    return _value(alone) if found[2] and alone and _value(found) is None else None


def _value(found: re.Match[str]) -> Fraction | None:
    """The number of a match, exactly; None for a division by zero, endless digits, and 3 4/2, which is no mixed number."""
    if len(found.group()) > _LONGEST:
        return None
    sign, whole, over, under, words = found.groups()
    divisor = Fraction(under or 1)
    if not divisor:
        return None
    value = Fraction(over.replace(",", "")) / divisor
    if whole is not None:
        if value >= 1:
            return None
        value += int(whole.replace(",", ""))
    for word in _MAGNITUDE.findall(words.lower()):
        value *= _MAGNITUDES[word]
    return -value if sign else value
