"""Values between tensors and places in files, a piece at a time: memory holds a piece, and a piece stays in the processor's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import FileIO

import torch

PIECE_BYTES = 1 << 20


def spans(start: int, count: int, bytes_each: int) -> Iterator[tuple[int, int]]:
    """Yield (first, number) of pieces that cover [start, start + count): of PIECE_BYTES at most, or one of what is counted."""
    step = max(1, PIECE_BYTES // max(1, bytes_each))
    for first in range(start, start + count, step):
        yield first, min(step, start + count - first)


def as_bytes(values: torch.Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order; a contiguous tensor shares them."""
    return values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_at(stream: FileIO, position: int, values: torch.Tensor) -> int:
    """Fill a contiguous tensor from a place in a file; return the bytes read, fewer where the file ends."""
    view, done = as_bytes(values), 0
    while done < len(view) and (count := os.preadv(stream.fileno(), [view[done:]], position + done)):
        done += count
    return done


def write_at(stream: FileIO, position: int, data: bytes | bytearray | memoryview) -> int:
    """Write bytes at a place in a file; return where they end."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(stream.fileno(), view[done:], position + done)
    return position + done
