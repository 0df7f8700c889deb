"""Leave out a document that was there before: the same text, or (MinHash) one that shares most of its runs of five words.

Of those alike the first in order is kept. A document is known by a row of 64-bit numbers that any process makes from its text alone.
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
NUM_BANDS, BAND_ROWS = 14, 8  # two texts of similarity s share a band with the probability 1 - (1 - s**8)**14: half of them at s = 0.69
SHINGLE_WORDS = 5
MINHASH_SEED = 1
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: 2**64 over the golden ratio
PIECE = 4096  # shingles at a time: so many times 112 numbers of 4 bytes is 2 MB


def exact_key(text: str) -> bytes:
    """Return 16 bytes that only equal texts share."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def minhash_bands(text: str) -> np.ndarray:
    """Return the hash of each band of the text's MinHash signature, uint64 [14].

    Shingles are runs of five words, lower-case runs of `\\w`; a text of fewer is one shingle, and one without words is itself.
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

    # The shingles come hashed. `affine32` is named, since a library's next default would disagree with what earlier shards kept.
    return MinHash(NUM_BANDS * BAND_ROWS, seed=MINHASH_SEED, hashfunc=int, scheme="affine32")


def _shingles(text: str) -> np.ndarray:
    """Return a 32-bit hash of each shingle, mixed from those of its words, so that a word is hashed once for five shingles."""
    words = WORD.findall(text.lower()) or [text]
    hashes = np.fromiter(map(crc32, map(str.encode, words)), np.uint64, len(words))
    size = min(SHINGLE_WORDS, len(words))
    mixed = np.zeros(len(words) - size + 1, np.uint64)
    for index in range(size):
        mixed = (mixed + hashes[index : index + len(mixed)]) * FACTOR
        mixed ^= mixed >> np.uint64(29)
    return mixed >> np.uint64(32)


class Seen:
    """The documents kept so far, by their rows: those of `exact_key` agree in both numbers, those of `minhash_bands` in any.

    Memory: about 90 bytes (exact) or 1.2 kB (minhash) a document kept.
    """

    def __init__(self, kind: Literal["exact", "minhash"]):
        self._kind = kind
        self._marks: set[int] = set()

    def are_new(self, rows: np.ndarray) -> np.ndarray:
        """Return for each document whether none kept is like it, and keep it then: bool [documents].

        rows: uint64 [documents, 2 or 14], in order; a document may be like one before it in the same call.
        """
        found = np.zeros(len(rows), bool)
        for index, row in enumerate(rows.tolist()):
            marks = self._of(row)
            if self._marks.isdisjoint(marks):
                self._marks.update(marks)
                found[index] = True
        return found

    def add(self, rows: np.ndarray) -> None:
        """Keep documents unasked, as earlier calls kept them: uint64 [documents, 2 or 14]."""
        for row in rows.tolist():
            self._marks.update(self._of(row))

    def _of(self, row: list[int]) -> list[int]:
        """Return the marks of a document, any of which makes another like it."""
        if self._kind == "exact":
            return [row[0] << 64 | row[1]]
        return [number << 4 | band for band, number in enumerate(row)]
