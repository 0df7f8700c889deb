"""Best-fit-decreasing packing of documents into bins of seq_length tokens (paper, section 8.1).

A document longer than a bin is cut into chunks. Pieces (documents or chunks) are placed from the longest to the shortest. Each goes to
the bin with the least sufficient room, else to a new bin. Pure arithmetic on lengths; data/packed.py reads and writes the files.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from itertools import repeat

import numpy as np

from megatron_prism.data.packed import Packed


def pack(lengths: np.ndarray, seq_length: int, overlap: int = 0) -> Packed:
    """Pack documents of these lengths (tokens, each at least 1) into bins of `seq_length`, by best-fit decreasing.

    Chunks of a longer document begin at 0, L - overlap, 2 (L - overlap), ...; the last one holds the rest. Memory and time do not grow
    with the square of the number of documents.
    Source: paper, section 8.1.
    """
    assert 0 <= overlap < seq_length <= np.iinfo(np.int32).max
    document, start, length = _pieces(np.asarray(lengths, np.int64), seq_length, overlap)
    order = np.argsort(-length, kind="stable")
    sizes, counts = np.unique(length, return_counts=True)
    bins, runs = _best_fit(sizes[::-1].tolist(), counts[::-1].tolist(), seq_length)
    bin_of = np.repeat(np.frombuffer(bins, np.int64), np.frombuffer(runs, np.int64))
    order = order[np.argsort(bin_of, kind="stable")]  # stable: pieces keep the order in which they were placed
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
    """Return runs of pieces, longest first: the bin of each run, and the number of pieces in it.

    sizes are decreasing; counts hold the number of pieces of each size. A bin that took a piece and has room for another of the same
    size is again the best fit, so pieces of one size fill bin after bin.
    """
    bins, runs = array("q"), array("q")
    bins_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of bins_by_room, ascending

    def put(filled: list[int], room: int) -> None:
        if not filled or not room:
            return
        if room not in bins_by_room:
            insort(rooms, room)
            bins_by_room[room] = []
        bins_by_room[room] += filled

    num_bins = 0
    for size, count in zip(sizes, counts, strict=True):
        while count:
            best = bisect_left(rooms, size)
            room = rooms[best] if best < len(rooms) else seq_length
            each = room // size  # pieces per bin
            wanted = -(-count // each)  # bins
            if best == len(rooms):
                taken = list(range(num_bins, num_bins + wanted))
                num_bins += wanted
            elif wanted < len(bins_by_room[room]):
                taken = bins_by_room[room][-wanted:]
                del bins_by_room[room][-wanted:]
            else:
                taken = bins_by_room.pop(room)
                del rooms[best]
            full = min(count // each, len(taken))
            bins.extend(taken)
            runs.extend(repeat(each, full))
            put(taken[:full], room - each * size)
            count -= full * each
            if full < len(taken):  # the last bin takes the remainder
                runs.append(count)
                put(taken[full:], room - count * size)
                count = 0
    return bins, runs
