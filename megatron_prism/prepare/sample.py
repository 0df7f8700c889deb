"""Sample a number of texts from each group: those with the smallest keyed hashes, whatever the order or the number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from heapq import heappush, heappushpop


def lot(text: str, seed: int, source: str) -> int:
    """Return the text's lot, a keyed hash of 128 bits. Equal texts have equal lots; another seed or source gives other lots."""
    key = hashlib.blake2b(repr((seed, source)).encode(), digest_size=32).digest()
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16, key=key).digest(), "big")


class Draw:
    """The smallest distinct lots of each group in `counts`, up to the group's count. Other groups are ignored.

    Memory: about 170 bytes per chosen text (a heap and a set share each lot).
    """

    def __init__(self, counts: Mapping[str, int]):
        self._counts = dict(counts)
        self._heaps: dict[str, list[int]] = {group: [] for group in counts}  # negated lots: the largest chosen lot is on top
        self._chosen: dict[str, set[int]] = {group: set() for group in counts}  # negated too

    def add(self, group: str, lot: int) -> None:
        """Offer one text's lot."""
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
        """Return the groups with too few distinct texts, and the number of distinct texts in each."""
        return {group: len(heap) for group, heap in self._heaps.items() if len(heap) < self._counts[group]}
