"""What a word is where texts are compared: two rules, each from a text to its words in order."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

Rule = Callable[[str], list[str]]
PLAIN_NAME = "plain-2"  # of `plain`, in what was made by it: another name where it gives other words
COMMAND = re.compile(r"(?<!\\)\\+(?:(?i:begin|end)\s*\{[^{}]*\}|[A-Za-z]+)")  # of LaTeX, escaped or not, with the name of an environment
HAN = r"\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
UNSPACED = rf"{HAN}\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # and kana: written without spaces
PLAIN, ASCII_PLAIN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+"), re.compile(r"\w+")
WORD, ASCII_WORD = re.compile(rf"[{UNSPACED}]|[^\W\d_{UNSPACED}]+|\d+"), re.compile(r"[a-z]+|[0-9]+")


def plain(text: str) -> list[str]:
    """Return the lower-case runs of `\\w`. Of Chinese and Japanese, which have no spaces between words, each character is one."""
    return (ASCII_PLAIN if text.isascii() else PLAIN).findall(text.lower())


def without_latex(text: str) -> list[str]:
    """Return the runs of letters and the runs of digits, case-folded, of the NFKC text without LaTeX's commands.

    Delimiters, spacing and commands hide no copy: `$\\dfrac{x}{2}$`, `\\( \\frac x2 \\)` and `x/2` are the same two words.
    Of Chinese and Japanese each character is a word, as in `plain`.
    """
    if text.isascii():  # as below, at twice the speed
        return ASCII_WORD.findall(_without_commands(text.lower()))
    return [word.casefold() for word in WORD.findall(_without_commands(normal(text)))]


def normal(text: str) -> str:
    """Return the text in which `spans` counts characters: its NFKC form."""
    return unicodedata.normalize("NFKC", text)


def spans(text: str) -> list[tuple[int, int]]:
    """Return where each word of `without_latex` begins and ends in `normal(text)`."""
    return [match.span() for match in WORD.finditer(_without_commands(normal(text)))]


def _without_commands(text: str) -> str:
    """Return the text with spaces in the place of LaTeX's commands."""
    return COMMAND.sub(lambda match: " " * len(match[0]), text) if "\\" in text else text
