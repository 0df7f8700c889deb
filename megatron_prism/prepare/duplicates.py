"""Find a source's duplicate documents on disk: a document is one where an earlier document of the source has its key.

A key is a text (exact) or any one band of it (MinHash); dedup.py makes them. Earlier means before it in the order of shards and documents,
whether that one is itself a duplicate or not. So the answer for a document does not depend on what comes after it, or on who made the shards.
Keys are dealt into files by their first bits, and one file at a time is sorted: the memory is bounded, whatever the number of documents.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np

ENTRY = np.dtype([("key", "<u8"), ("other", "<u8"), ("document", "<i8")])  # other: a text's second number, or the number of a band
MEMORY_BYTES = 256 << 20
SORT_BYTES = 96  # of memory for an entry that is sorted: itself, its copies and its place
OPEN_FILES = 256
KEY_BITS = 64
SCRATCH = "duplicates"  # a folder within the source's


def find(keys: Sequence[np.ndarray], kind: Literal["exact", "minhash"], scratch: Path, memory_bytes: int = MEMORY_BYTES) -> np.ndarray:
    """Return which documents are duplicates (bool [documents], a file's mapped memory), the shards' documents one after another.

    keys: uint64 [documents, 2 or 14] of each shard, in order. scratch: a folder that is made, and removed.
    """
    num_documents = sum(map(len, keys))
    num_entries = sum(rows.size for rows in keys) // (2 if kind == "exact" else 1)
    bits = max(0, (num_entries * SORT_BYTES // memory_bytes).bit_length())  # so that a file's entries fit the memory
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        is_duplicate = np.memmap(scratch / "duplicates", bool, "w+", shape=(max(num_documents, 1),))
        for first in range(0, 1 << bits, OPEN_FILES):
            files = [scratch / f"{number}" for number in range(first, min(first + OPEN_FILES, 1 << bits))]
            _deal(_entries(keys, kind, memory_bytes // SORT_BYTES), files, first, bits, is_duplicate)
            for path in files:
                entries = np.fromfile(path, ENTRY)
                path.unlink()
                _firsts(entries, is_duplicate)
        return is_duplicate[:num_documents]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # what is mapped stays readable


def _entries(keys: Sequence[np.ndarray], kind: str, most: int) -> Iterator[np.ndarray]:
    """Yield ENTRY of all documents in order, at most about `most` at a time."""
    start = 0
    for rows in keys:
        step = max(1, most // rows.shape[1])
        for begin in range(0, len(rows), step):
            part = np.asarray(rows[begin : begin + step])
            documents = np.arange(start + begin, start + begin + len(part))
            if kind == "exact":
                entries = np.empty(len(part), ENTRY)
                entries["key"], entries["other"], entries["document"] = part[:, 0], part[:, 1], documents
            else:
                entries = np.empty(part.size, ENTRY)
                entries["key"], entries["other"] = part.ravel(), np.tile(np.arange(part.shape[1], dtype=np.uint64), len(part))
                entries["document"] = np.repeat(documents, part.shape[1])
            yield entries
        start += len(rows)


def _deal(entries: Iterator[np.ndarray], files: Sequence[Path], first: int, bits: int, is_duplicate: np.ndarray) -> None:
    """Append entries to the file of their key's first bits; files: those of the buckets from `first` on. Other buckets' entries are passed over."""
    with ExitStack() as stack:
        streams = [stack.enter_context(path.open("wb")) for path in files]
        for part in entries:
            part = _firsts(part, is_duplicate)  # a text that is everywhere comes once from each part: no file grows with it
            if not bits:
                streams[0].write(part.tobytes())
                continue
            buckets = (part["key"] >> np.uint64(KEY_BITS - bits)).astype(np.int64)
            ends = np.searchsorted(buckets, np.arange(first, first + len(files) + 1))
            for stream, begin, end in zip(streams, ends, ends[1:], strict=False):
                stream.write(part[begin:end].tobytes())


def _firsts(entries: np.ndarray, is_duplicate: np.ndarray) -> np.ndarray:
    """Return the first document's entry of each key, in the keys' order, and mark the others' documents as duplicates."""
    entries = entries[np.lexsort((entries["document"], entries["other"], entries["key"]))]
    is_again = np.zeros(len(entries), bool)
    is_again[1:] = (entries["key"][1:] == entries["key"][:-1]) & (entries["other"][1:] == entries["other"][:-1])
    is_duplicate[entries["document"][is_again]] = True
    return entries[~is_again]
