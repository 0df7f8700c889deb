"""Leave out a document that was there before: the same text, or (MinHash) one that shares most of its runs of five words.

Documents come one by one, in order, and the first of those alike is kept. A document is known by a row of 64-bit numbers, made by
any process from its text alone.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from datasketch import MinHash

WORD = re.compile(r"\w+")
NUM_BANDS, BAND_ROWS = 14, 8  # two texts of similarity s share a band with the probability 1 - (1 - s**8)**14: half of them at s = 0.69
SHINGLE_WORDS = 5
MINHASH_SEED = 1
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: 2**64 over the golden ratio
PIECE = 4096  # shingles: times 112 numbers of 4 bytes, within a core's cache


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
    rows = sketch.hashvalues.astype("<u4").reshape(NUM_BANDS, BAND_ROWS)
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


@cache
def _empty() -> MinHash:
    from datasketch import MinHash

    # The shingles come hashed. `affine32` is named, since a library's next default would disagree with what earlier shards kept.
    return MinHash(NUM_BANDS * BAND_ROWS, seed=MINHASH_SEED, hashfunc=int, scheme="affine32")


def _shingles(text: str) -> np.ndarray:
    """Return a 32-bit hash of each shingle: of its words' hashes, so that a word is hashed once for five shingles."""
    words = WORD.findall(text.lower()) or [text]
    hashes = {word: int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") for word in set(words)}
    array = np.fromiter(map(hashes.__getitem__, words), np.uint64, len(words))
    size = min(SHINGLE_WORDS, len(words))
    mixed = np.zeros(len(words) - size + 1, np.uint64)
    for index in range(size):
        mixed = (mixed + array[index : index + len(mixed)]) * FACTOR
        mixed ^= mixed >> np.uint64(29)
    return mixed >> np.uint64(32)


class Seen:
    """The documents kept so far, as rows of `exact_key` (two numbers, which agree together) or `minhash_bands` (any of which agrees).

    Each band has a table of row numbers with open addressing.
    """

    def __init__(self, kind: Literal["exact", "minhash"]):
        self._num_bands, self._width = (1, 2) if kind == "exact" else (NUM_BANDS, 1)
        self._num_rows = 0
        self._rows = np.zeros((1 << 10, self._num_bands, self._width), np.uint64)
        self._tables = np.zeros((self._num_bands, 1 << 11), np.uint32)  # row number + 1, 0: free; at most half of it is taken

    def is_new(self, keys: np.ndarray) -> bool:
        """Return whether no document before was like this one, and from now on count it among them.

        keys: uint64 [2] (exact_key) or [14] (minhash_bands).
        """
        keys = keys.reshape(self._num_bands, self._width)
        mask = np.uint64(self._tables.shape[1] - 1)
        bands, slots = np.arange(self._num_bands), keys[:, 0] & mask
        while len(bands):
            held = self._tables[bands, slots]
            if (self._rows[held[held > 0] - 1, bands[held > 0]] == keys[bands[held > 0]]).all(axis=1).any():
                return False
            bands = bands[held > 0]
            slots = (slots[held > 0] + np.uint64(1)) & mask
        self.add(keys.reshape(1, -1))
        return True

    def add(self, rows: np.ndarray) -> None:
        """Count documents among those kept, unasked: uint64 [documents, 2 or 14], as `state` returned them."""
        first, self._num_rows = self._num_rows, self._num_rows + len(rows)
        if self._num_rows > len(self._rows):
            size = 1 << (self._num_rows - 1).bit_length()
            self._rows = np.concatenate([self._rows, np.zeros((size - len(self._rows), *self._rows.shape[1:]), np.uint64)])
            self._tables, start = np.zeros((self._num_bands, 2 * size), np.uint32), 0
        else:
            start = first
        self._rows[first : self._num_rows] = rows.reshape(-1, self._num_bands, self._width)
        for band, table in enumerate(self._tables):
            _insert(table, self._rows[start : self._num_rows, band, 0], start)

    def state(self) -> np.ndarray:
        """Return the rows of the documents kept, in order: uint64 [documents, 2 or 14]."""
        return self._rows[: self._num_rows].reshape(self._num_rows, -1).copy()


def _insert(table: np.ndarray, keys: np.ndarray, start: int) -> None:
    """Put the numbers of rows `start` and on into a table, each at the first free slot from its key on."""
    mask = np.uint64(len(table) - 1)
    numbers, slots = np.arange(start + 1, start + 1 + len(keys), dtype=np.uint32), keys & mask
    while len(numbers):
        free = table[slots] == 0
        table[slots[free]] = numbers[free]  # of several for one slot the last wins; the others go on
        left = table[slots] != numbers
        numbers, slots = numbers[left], (slots[left] + np.uint64(1)) & mask
