"""Move values between files: read, cast and write them in pieces that fit in memory and in the processor's cache.

Values are held as unsigned integers of their width, called bits. Only a cast treats them as numbers, and numpy has no bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from typing import Any, cast

import numpy as np
import torch

Bits = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]
PIECE_BYTES = 1 << 20
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute pieces with one torch thread: a piece fits in the cache, and more threads take half as much CPU time again and are no faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spans(start: int, count: int, bytes_each: int) -> Iterator[tuple[int, int]]:
    """Yield (first, number) of pieces that cover [start, start + count). A piece is at most PIECE_BYTES, but at least one item."""
    step = max(1, PIECE_BYTES // max(1, bytes_each))
    for first in range(start, start + count, step):
        yield first, min(step, start + count - first)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Bits:
    """Return an uninitialised array for the bits of values."""
    return np.empty(shape, f"u{dtype.itemsize}")


def to_tensor(bits: Bits, dtype: torch.dtype) -> torch.Tensor:
    """Return bits as a tensor that shares their memory."""
    return torch.from_numpy(bits).view(dtype)


def of_tensor(tensor: torch.Tensor) -> Bits:
    """Return a tensor's bits. They share the memory of a contiguous tensor."""
    return cast(Bits, tensor.detach().contiguous().view(_UNSIGNED[tensor.dtype.itemsize]).numpy())


def convert(bits: Bits, source: torch.dtype, target: torch.dtype) -> Bits:
    """Return the bits of values cast to another dtype. For the same dtype return the bits unchanged."""
    return bits if source == target else of_tensor(to_tensor(bits, source).to(target))


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
