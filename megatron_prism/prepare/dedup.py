"""Drop duplicate documents: the same text (exact), or one that shares most of its runs of five words (MinHash).

The first of several duplicates is kept. A document's key is a row of 64-bit numbers, computed from its text alone in any process.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from typing import TYPE_CHECKING, Literal
from zlib import crc32

import numpy as np

if TYPE_CHECKING:
    from datasketch import MinHash

WORD = re.compile(r"\w+")
NUM_BANDS, BAND_ROWS = 14, 8  # texts of similarity s share a band with probability 1 - (1 - s**8)**14: one half at s = 0.69
SHINGLE_WORDS = 5
MINHASH_SEED = 1
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: 2**64 over the golden ratio
PIECE = 4096  # shingles at a time: 4096 x 112 numbers of 4 bytes are 2 MB


def exact_key(text: str) -> bytes:
    """Return 16 bytes that only equal texts share."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def minhash_bands(text: str) -> np.ndarray:
    """Return the hash of each band of the text's MinHash signature, uint64 [14].

    A shingle is five words in a row; a word is a lower-case run of `\\w`. A text of fewer words is one shingle. A text without words
    is its own single shingle.
    """
    sketch = _empty().copy()
    shingles = _shingles(text)
    for start in range(0, len(shingles), PIECE):
        sketch.update_batch(shingles[start : start + PIECE].tolist())
    bands = sketch.hashvalues.astype("<u4").reshape(NUM_BANDS, BAND_ROWS)
    digests = b"".join(hashlib.blake2b(band.tobytes(), digest_size=8).digest() for band in bands)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


@cache
def _empty() -> MinHash:
    from datasketch import MinHash

    # The shingles are hashed already. `affine32` is named because a new default of the library would not match the keys of older shards.
    return MinHash(NUM_BANDS * BAND_ROWS, seed=MINHASH_SEED, hashfunc=int, scheme="affine32")


def _shingles(text: str) -> np.ndarray:
    """Return a 32-bit hash of each shingle, mixed from its words' hashes: each word is hashed once, not five times."""
    words = WORD.findall(text.lower()) or [text]
    hashes = np.fromiter(map(crc32, map(str.encode, words)), np.uint64, len(words))
    size = min(SHINGLE_WORDS, len(words))
    mixed = np.zeros(len(words) - size + 1, np.uint64)
    for index in range(size):
        mixed = (mixed + hashes[index : index + len(mixed)]) * FACTOR
        mixed ^= mixed >> np.uint64(29)
    return mixed >> np.uint64(32)


class Seen:
    """The keys of the documents kept so far. Exact keys match in both numbers, MinHash keys in any band.

    Memory: about 90 bytes (exact) or 1.2 kB (minhash) per document kept.
    """

    def __init__(self, kind: Literal["exact", "minhash"]):
        self._kind = kind
        self._marks: set[int] = set()

    def are_new(self, rows: np.ndarray) -> np.ndarray:
        """Return which documents are new (bool [documents]), and keep those.

        rows: uint64 [documents, 2 or 14], in order. A document is also compared with those before it in the same call.
        """
        is_new = np.zeros(len(rows), bool)
        for index, row in enumerate(rows.tolist()):
            marks = self._of(row)
            if self._marks.isdisjoint(marks):
                self._marks.update(marks)
                is_new[index] = True
        return is_new

    def add(self, rows: np.ndarray) -> None:
        """Add the keys of documents that an earlier run kept: uint64 [documents, 2 or 14]."""
        for row in rows.tolist():
            self._marks.update(self._of(row))

    def _of(self, row: list[int]) -> list[int]:
        """Return a document's marks. Two documents with a mark in common are duplicates."""
        if self._kind == "exact":
            return [row[0] << 64 | row[1]]
        return [number << 4 | band for band, number in enumerate(row)]
