"""Numbers as golds and answers spell them: e-notation becomes plain decimals, for a reader of LaTeX takes `1e-05` for 1 times e, minus 5."""

from __future__ import annotations

import math
import re
from decimal import Decimal

MAX_EXPONENT = 400  # a float64 has at most 324
_SCIENTIFIC = re.compile(r"\$?\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][+-]?([0-9]+))\s*\$?")


def without_exponent(value: str | int | float) -> str:
    """Return a number, or a text that spells one in e-notation, as exact decimals without an exponent; any other text as it is.

    A float is the shortest decimal that reads back as it.
    Raises: ValueError for NaN, infinity, and an exponent above MAX_EXPONENT.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the number {value}, which is not finite")
    text = str(value)
    match = _SCIENTIFIC.fullmatch(text.strip())
    if match is None:
        return text
    if len(match[2].lstrip("0")) > len(str(MAX_EXPONENT)) or int(match[2]) > MAX_EXPONENT:
        raise ValueError(f"the number {text[:40]!r}, with an exponent above {MAX_EXPONENT}")
    return format(Decimal(match[1]), "f")
