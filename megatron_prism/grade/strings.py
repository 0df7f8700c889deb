"""Expected strings: which of them stand in a response. RULER's measure of retrieval.

Source: RULER scripts/eval/synthetic/constants.py (all: the share that stands in the response) and, for any, HELMET's substring exact match
(SQuAD's normal form: without case, punctuation and articles).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import punctuation

WANTED = ("all", "any")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", punctuation)


def share(response: str, expected: Sequence[str], wanted: str) -> float:
    """Return the share of the expected strings that stand in a response, whatever their case; of any, 1 where one of them does, else 0."""
    if wanted == "any":
        text = _normal(response)
        return float(any((_normal(string) in text) if _normal(string) else (string.lower() in response.lower()) for string in expected))
    return sum(string.lower() in response.lower() for string in expected) / len(expected)


def _normal(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())
