"""What a word is where texts are compared: two rules, each from a text to its words in order."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

Rule = Callable[[str], list[str]]
PLAIN = re.compile(r"\w+")
# a command of LaTeX (an escaped backslash too), with the name of an environment; or letters, or digits
LATEX = re.compile(r"\\+(?:(?i:begin|end)\s*\{[^{}]*\}|[A-Za-z]+)|([^\W\d_]+|\d+)")


def plain(text: str) -> list[str]:
    """Return the lower-case runs of `\\w`."""
    return PLAIN.findall(text.lower())


def without_latex(text: str) -> list[str]:
    """Return the runs of letters and the runs of digits, case-folded, of the NFKC text without LaTeX's commands.

    Delimiters, spacing and commands hide no copy: `$\\dfrac{x}{2}$`, `\\( \\frac x2 \\)` and `x/2` are the same two words.
    """
    if text.isascii():
        return [word for word in LATEX.findall(text.lower()) if word]
    return [word.casefold() for word in LATEX.findall(normal(text)) if word]


def normal(text: str) -> str:
    """Return the text in which `spans` counts characters: its NFKC form."""
    return unicodedata.normalize("NFKC", text)


def spans(text: str) -> list[tuple[int, int]]:
    """Return where each word of `without_latex` begins and ends in `normal(text)`."""
    return [match.span(1) for match in LATEX.finditer(normal(text)) if match[1]]
