"""Multiple choice: which option a response chose, and options in a seeded order."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from string import ascii_uppercase

from megatron_prism.grade import math

_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_LABELS = ("answer:", "final answer:", "the answer:")


def letters(choices: Sequence[str]) -> str:
    """Return the letters of the options, A first."""
    return ascii_uppercase[: len(choices)]


def extract(answer: str, takes_plain: bool) -> str | None:
    """Return the text of the choice: of the last box, else of the last line `Answer: X`, else of an answer that is one letter."""
    boxed = math.last_boxed(answer)
    if boxed is not None or "\\boxed" in answer:
        return (boxed or "").strip() or None
    for line in reversed(answer.splitlines()):
        plain = line.replace("*", "").strip(" \t#>")
        label = next((label for label in _LABELS if plain[: len(label)].casefold() == label), None)
        if label is not None:
            return plain[len(label) :].strip() or None
    return answer if takes_plain and len(answer) == 1 else None


def chosen(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter that a text names, by itself or as the text of exactly one option, else None."""
    bare = _bare(text)
    letter = bare.removesuffix(".").removeprefix("(").removesuffix(")")
    if len(letter) == 1 and letter.isascii() and letter.upper() in letters(choices):
        return letter.upper()
    equal = [letter for letter, choice in zip(letters(choices), choices, strict=True) if _bare(choice) == bare]
    return equal[0] if len(equal) == 1 else None


def shuffle(choices: Sequence[str], gold: str, seed: str) -> tuple[tuple[str, ...], str]:
    """Return the options in an order that the seed alone decides, and the letter that the gold option has in it."""

    def draw(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{index}".encode()).digest()

    order = sorted(range(len(choices)), key=draw)
    return tuple(choices[index] for index in order), ascii_uppercase[order.index(ascii_uppercase.index(gold))]


def _bare(text: str) -> str:
    match = _TEXT.fullmatch(text.strip())
    return " ".join((match[1] if match else text).strip("$").split())
