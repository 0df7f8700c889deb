"""What a sub-task is: it draws a question, and writes it at any size. A larger size only adds to the haystack: nothing else of it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

NUM_DEPTHS = 40  # RULER's


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The user's files, in their published forms. None: what needs it is refused, and of essays replaced by a text of ours.

    essays: a text, or RULER's JSON {"text": ...}. squad: SQuAD 2.0 (dev-v2.0.json). hotpotqa: HotpotQA's distractor set.
    """

    essays: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A question, drawn and not yet sized.

    write: the prompt at a size, in units of the haystack. smallest, largest: the sizes that it can have (largest None: any).
    golds: the strings that an answer must hold. tags: what is known of it.
    """

    write: Callable[[int], str]
    golds: tuple[str, ...]
    smallest: int
    largest: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


def depths(random: Random, count: int) -> list[float]:
    """Return as many places in a haystack, as shares of it, ascending: of 40 even ones, as RULER places what it hides in essays."""
    return sorted(depth / (NUM_DEPTHS - 1) for depth in random.sample(range(NUM_DEPTHS), count))


def hidden(haystack: Sequence[str], statements: Sequence[str], places: Sequence[float]) -> list[str]:
    """Return a haystack's pieces with each statement at its place."""
    pieces: list[str] = []
    last = 0
    for statement, place in zip(statements, places, strict=True):
        index = int(len(haystack) * place)
        pieces += [*haystack[last:index], statement]
        last = index
    return [*pieces, *haystack[last:]]
