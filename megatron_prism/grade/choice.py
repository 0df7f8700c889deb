"""Multiple choice: which option a response chose, and options in a seeded order."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from string import ascii_uppercase

from megatron_prism.core.config.grade import AnswerForm
from megatron_prism.grade import math

_LETTER_AND_TEXT = re.compile(r"\(?([A-Za-z])[).:]\s+(.+)", re.DOTALL)
_OPTION = re.compile(r"(?:option|choice)\s+(.+)", re.DOTALL | re.IGNORECASE)
_MARKS = "*_$ \t"  # of Markdown and LaTeX around a letter
_LABELS = ("answer:", "final answer:", "the answer:")


def letters(choices: Sequence[str]) -> str:
    """Return the letters of the options, A first."""
    return ascii_uppercase[: len(choices)]


def extract(answer: str, form: AnswerForm) -> str | None:
    """Return the text of the choice: of the last box, else of the last line `Answer: X`, else of an answer that is one letter.

    With the form `boxed` one letter alone is none. With `boxed_or_last` a line that says `answer is X` counts as `Answer: X` does.
    """
    boxed = math.last_boxed(answer)
    if boxed is not None or "\\boxed" in answer:
        return (boxed or "").strip() or None
    for line in reversed(answer.splitlines()):
        plain = line.replace("*", "").strip(" \t#>")
        label = next((label for label in _LABELS if plain[: len(label)].casefold() == label), None)
        if label is not None:
            return plain[len(label) :].strip() or None
        if form == "boxed_or_last" and (mark := re.search(r"\banswer is:?\s+(?!not\b)", plain, re.IGNORECASE)):
            return plain[mark.end() :].removesuffix(".").strip() or None
    return answer if form != "boxed" and len(_letter(answer)) == 1 else None


def chosen(text: str, choices: Sequence[str], max_labels: int = 2) -> str | None:
    """Return the letter that a text names, by itself or as the text of exactly one option behind at most max_labels letters or `option`, else None."""
    bare = _bare(text)
    letter = _letter(bare)
    if len(letter) == 1 and letter.isascii() and letter.upper() in letters(choices):
        return letter.upper()
    equal = [letter for letter, choice in zip(letters(choices), choices, strict=True) if _bare(choice) == bare]
    if not equal and max_labels and (match := _LETTER_AND_TEXT.fullmatch(bare)):  # `D) its text`: both must name one option
        named = chosen(match[1], choices)
        return named if named and chosen(match[2], choices, max_labels - 1) == named else None
    if not equal and max_labels and (match := _OPTION.fullmatch(bare)):  # `Option D`
        return chosen(match[1], choices, max_labels - 1)
    return equal[0] if len(equal) == 1 else None


def shuffle(choices: Sequence[str], gold: str, seed: str) -> tuple[tuple[str, ...], str]:
    """Return the options in an order that the seed alone decides, and the letter that the gold option has in it."""

    def draw(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{index}".encode()).digest()

    order = sorted(range(len(choices)), key=draw)
    return tuple(choices[index] for index in order), ascii_uppercase[order.index(ascii_uppercase.index(gold))]


def _letter(text: str) -> str:
    """Return a text without the marks around it and one pair of parentheses: `(D)`, `**D**` and `D.` are D."""
    bare = text.strip(_MARKS).removesuffix(".").strip(_MARKS)
    return bare.removeprefix("(").removesuffix(")").strip(_MARKS)


def _bare(text: str) -> str:
    """Return a text without math mode's marks around it, with its \\text{} and its LaTeX spaces as plain ones."""
    return " ".join(math.SPACE.sub(" ", math.TEXT.sub(r"\1", math.without_marks(text))).strip("$").split())
