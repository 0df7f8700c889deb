"""Values between tensors and places in files, a piece at a time: memory holds a piece, and a piece stays in the processor's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

PIECE_BYTES = 1 << 20


def spans(start: int, count: int, bytes_each: int) -> Iterator[tuple[int, int]]:
    """Yield (first, number) of pieces that cover [start, start + count): of PIECE_BYTES at most, or one of what is counted."""
    step = max(1, PIECE_BYTES // max(1, bytes_each))
    for first in range(start, start + count, step):
        yield first, min(step, start + count - first)


def read_at(descriptor: int, position: int, values: torch.Tensor) -> int:
    """Fill a contiguous tensor from a place in a file; return the bytes read, fewer where the file ends."""
    view, got = _bytes(values), 0
    while got < len(view) and (count := os.preadv(descriptor, [view[got:]], position + got)):
        got += count
    return got


def write_at(descriptor: int, position: int, values: torch.Tensor) -> int:
    """Write a contiguous tensor at a place in a file; return where it ends."""
    view, done = _bytes(values), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], position + done)
    return position + done


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.detach().reshape(-1).view(torch.uint8).numpy())
