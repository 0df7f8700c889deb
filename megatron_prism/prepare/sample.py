"""Choose so many texts of each group by lot: the smallest keyed hashes, so neither order nor the number of processes moves it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from heapq import heappush, heappushpop


def lot(text: str, seed: int, source: str) -> int:
    """Return the text's lot, 128 bits: equal texts draw the same one, another seed or source draws anew."""
    key = hashlib.blake2b(repr((seed, source)).encode(), digest_size=32).digest()
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16, key=key).digest(), "big")


class Draw:
    """The smallest different lots of each group, as many as `counts` says; other groups are not looked at.

    Memory: about 170 bytes a text chosen (a heap and a set share each lot).
    """

    def __init__(self, counts: Mapping[str, int]):
        self._counts = dict(counts)
        self._heaps: dict[str, list[int]] = {group: [] for group in counts}  # of negated lots: the largest chosen is on top
        self._chosen: dict[str, set[int]] = {group: set() for group in counts}  # negated as well

    def add(self, group: str, lot: int) -> None:
        """Tell of one text."""
        if group not in self._counts or -lot in self._chosen[group]:
            return
        heap, chosen = self._heaps[group], self._chosen[group]
        if len(heap) < self._counts[group]:
            heappush(heap, -lot)
            chosen.add(-lot)
        elif -lot > heap[0]:
            chosen.remove(heappushpop(heap, -lot))
            chosen.add(-lot)

    def limits(self) -> dict[str, int]:
        """Return the largest chosen lot of each group that has a text."""
        return {group: -heap[0] for group, heap in self._heaps.items() if heap}

    def short(self) -> dict[str, int]:
        """Return the number of different texts of each group that has too few."""
        return {group: len(heap) for group, heap in self._heaps.items() if len(heap) < self._counts[group]}
