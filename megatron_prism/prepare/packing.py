"""Best-fit-decreasing packing: documents, or chunks of those that are too long, into bins of seq_length tokens (paper, section 8.1).

A document longer than a bin is cut into chunks. Pieces are taken from the longest to the shortest, and each goes to the bin whose
remaining room is sufficient and minimal, else to a new bin. Pure arithmetic on lengths; its files are packed.py's.
"""

from __future__ import annotations

from array import array
from itertools import repeat

import numpy as np

from megatron_prism.data.packed import Packed


def pack(lengths: np.ndarray, seq_length: int, overlap: int = 0) -> Packed:
    """Pack documents of these lengths (tokens, each at least 1) into bins of `seq_length`, by best-fit decreasing.

    Chunks of a longer document begin at 0, L - overlap, 2 (L - overlap), ...; the last one holds the rest. Memory and time grow with
    the documents, not with their square.
    Source: paper, section 8.1.
    """
    assert 0 <= overlap < seq_length <= np.iinfo(np.int32).max
    document, start, length = _pieces(np.asarray(lengths, np.int64), seq_length, overlap)
    order = np.argsort(-length, kind="stable")
    sizes, counts = np.unique(length, return_counts=True)
    bins, runs = _best_fit(sizes[::-1].tolist(), counts[::-1].tolist(), seq_length)
    bin_of = np.repeat(np.frombuffer(bins, np.int64), np.frombuffer(runs, np.int64))
    order = order[np.argsort(bin_of, kind="stable")]  # stable: within a bin in the order they were put
    bin_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(bin_of))])
    return Packed(document[order], start[order], length[order].astype(np.int32), bin_starts, seq_length)


def _pieces(lengths: np.ndarray, seq_length: int, overlap: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (document, start, length) of each document's chunks, in document order."""
    assert (lengths > 0).all()
    stride = seq_length - overlap
    chunks = 1 + np.maximum(-(-(lengths - seq_length) // stride), 0)
    document = np.repeat(np.arange(lengths.size), chunks)
    start = (np.arange(document.size) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * stride
    return document, start, np.minimum(lengths[document] - start, seq_length)


def _best_fit(sizes: list[int], counts: list[int], seq_length: int) -> tuple[array[int], array[int]]:
    """Return runs of pieces, from the longest on: the bin that each run goes to, and how many pieces it is.

    sizes fall; counts are how many pieces there are of each. A bin that took a piece and has room for another of the same size is
    then the best fit itself, so that pieces of one size fill bin after bin.
    """
    bins, runs = array("q"), array("q")
    with_room: dict[int, list[int]] = {}  # bins by their room
    rooms = _Rooms(seq_length)
    num_bins = 0
    for size, count in zip(sizes, counts, strict=True):
        while count:
            room = rooms.at_least(size)
            each = (seq_length if room is None else room) // size
            full, rest = divmod(count, each)
            if room is None:
                found = list(range(num_bins, num_bins + full + (rest > 0)))
                num_bins, room = num_bins + len(found), seq_length
            else:
                found = _take(full + (rest > 0), room, with_room, rooms)
            full = min(full, len(found))
            bins.extend(found[:full])
            runs.extend(repeat(each, full))
            _put(found[:full], room - each * size, with_room, rooms)
            count -= full * each
            if len(found) > full:
                bins.append(found[full])
                runs.append(count)
                _put(found[full:], room - count * size, with_room, rooms)
                count = 0
    return bins, runs


def _take(count: int, room: int, with_room: dict[int, list[int]], rooms: _Rooms) -> list[int]:
    """Return `count` bins of a room, or as many as there are."""
    found = with_room[room]
    if len(found) > count:
        taken = found[-count:]
        del found[-count:]
        return taken
    rooms.remove(room)
    return with_room.pop(room)


def _put(bins: list[int], room: int, with_room: dict[int, list[int]], rooms: _Rooms) -> None:
    if not bins or not room:
        return
    if room in with_room:
        with_room[room] += bins
    else:
        with_room[room] = bins
        rooms.add(room)


class _Rooms:
    """The rooms that some bin has, as bits of whole numbers: those of WIDTH rooms in a row in one, and one that says where any is."""

    WIDTH = 512

    def __init__(self, largest: int):
        self._words = [0] * (largest // self.WIDTH + 1)
        self._used = 0

    def add(self, room: int) -> None:
        word, bit = divmod(room, self.WIDTH)
        self._words[word] |= 1 << bit
        self._used |= 1 << word

    def remove(self, room: int) -> None:
        word, bit = divmod(room, self.WIDTH)
        self._words[word] &= ~(1 << bit)
        if not self._words[word]:
            self._used &= ~(1 << word)

    def at_least(self, size: int) -> int | None:
        """Return the smallest room of `size` or more that some bin has."""
        word, bit = divmod(size, self.WIDTH)
        above = self._words[word] >> bit
        if above:
            return size + _lowest(above)
        later = self._used >> (word + 1)
        if not later:
            return None
        word += 1 + _lowest(later)
        return word * self.WIDTH + _lowest(self._words[word])


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
