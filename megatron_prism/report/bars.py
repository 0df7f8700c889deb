"""Counts as bars of text, for a log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

WIDTH = 40


def bars(counts: Sequence[int]) -> Iterator[str]:
    """Yield a line for each count: its place, a bar beside the longest one's WIDTH, and the count. A count above 0 has a bar."""
    most, digits = max(counts, default=0), len(str(len(counts) - 1))
    for place, count in enumerate(counts):
        length = -(-count * WIDTH // most) if count else 0
        yield f"{place:>{digits}} {'#' * length:<{WIDTH}} {count:,}"
