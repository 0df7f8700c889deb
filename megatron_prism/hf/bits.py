"""Move values between files: read and write them in pieces that fit in memory and in the processor's cache.

Values are held as unsigned integers of their width, called bits: numpy has no bfloat16. Who computes with them casts them (as_torch.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import FileIO
from typing import Any

import numpy as np

Bits = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]
PIECE_BYTES = 1 << 20


def spans(start: int, count: int, bytes_each: int) -> Iterator[tuple[int, int]]:
    """Yield (first, number) of pieces that cover [start, start + count). A piece is at most PIECE_BYTES, but at least one item."""
    step = max(1, PIECE_BYTES // max(1, bytes_each))
    for first in range(start, start + count, step):
        yield first, min(step, start + count - first)


def empty(shape: tuple[int, ...], itemsize: int) -> Bits:
    """Return an uninitialised array for the bits of values of this width."""
    return np.empty(shape, f"u{itemsize}")


def read_at(stream: FileIO, position: int, bits: Bits) -> int:
    """Fill contiguous bits from a position in a file. Return the bytes read, fewer at the file's end."""
    view, done = _bytes(bits), 0
    while done < len(view) and (count := os.preadv(stream.fileno(), [view[done:]], position + done)):
        done += count
    return done


def write_at(stream: FileIO, position: int, bits: Bits) -> int:
    """Write bits at a position in a file. Return the position after them."""
    view, done = _bytes(bits), 0
    while done < len(view):
        done += os.pwrite(stream.fileno(), view[done:], position + done)
    return position + done


def _bytes(bits: Bits) -> memoryview:
    return np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data
