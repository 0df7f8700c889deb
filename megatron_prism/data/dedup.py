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
FIRST_ROWS = 1 << 10
PIECE = 4096  # shingles, or documents, at a time: so many times 112 numbers of 4 bytes is 2 MB


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

    Memory: 24 to 48 bytes a document (exact), 224 to 448 (minhash), and half of that again while it doubles.
    """

    def __init__(self, kind: Literal["exact", "minhash"]):
        self._num_bands, self._width = (1, 2) if kind == "exact" else (NUM_BANDS, 1)
        self._num_rows = 0
        self._rows = np.zeros((FIRST_ROWS, self._num_bands, self._width), np.uint64)
        # Row numbers + 1, 0 where free: a part for each band, with open addressing within it; at most half of it is taken.
        self._table = np.zeros(self._num_bands * 2 * FIRST_ROWS, np.uint32)

    def is_new(self, keys: np.ndarray) -> bool:
        """Return whether no document kept is like this one, and keep it then; `are_new` is many times faster for many."""
        return bool(self.are_new(keys[None])[0])

    def are_new(self, rows: np.ndarray) -> np.ndarray:
        """Return for each document whether none kept is like it, and keep it then: bool [documents].

        rows: uint64 [documents, 2 or 14], in order; a document may be like one before it in the same call.
        """
        keys = rows.reshape(-1, self._num_bands, self._width)
        new = ~self._has(keys)
        here: set[tuple[int, ...]] = set()
        for index in np.flatnonzero(new):
            marks = {(band, *numbers) for band, numbers in enumerate(keys[index].tolist())}
            new[index] = here.isdisjoint(marks)
            here |= marks if new[index] else set()
        self.add(rows[new])
        return new

    def add(self, rows: np.ndarray) -> None:
        """Keep documents unasked: uint64 [documents, 2 or 14], as earlier calls kept them."""
        first, self._num_rows = self._num_rows, self._num_rows + len(rows)
        if self._num_rows > len(self._rows):
            size = 1 << (self._num_rows - 1).bit_length()
            rows_before, self._rows = self._rows[:first], np.zeros((size, *self._rows.shape[1:]), np.uint64)
            self._rows[:first] = rows_before
            self._table = np.zeros(self._num_bands * 2 * size, np.uint32)
            first = 0
        self._rows[self._num_rows - len(rows) : self._num_rows] = rows.reshape(-1, self._num_bands, self._width)
        for begin in range(first, self._num_rows, PIECE):
            self._insert(begin, min(begin + PIECE, self._num_rows))

    def state(self) -> np.ndarray:
        """Return the rows of the documents kept, in order: uint64 [documents, 2 or 14]."""
        return self._rows[: self._num_rows].reshape(self._num_rows, self._num_bands * self._width).copy()

    def _homes(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return, for each document's bands one after the other, the document, the band, and the first place to look at."""
        documents, bands = (axis.ravel() for axis in np.indices(keys.shape[:2]))
        size = len(self._table) // self._num_bands
        return documents, bands, bands * size + (keys[:, :, 0].ravel() & np.uint64(size - 1)).astype(np.int64)

    def _next(self, places: np.ndarray) -> np.ndarray:
        size = len(self._table) // self._num_bands
        return np.where((places + 1) % size, places + 1, places + 1 - size)  # from the end of a band's part to its begin

    def _has(self, keys: np.ndarray) -> np.ndarray:
        documents, bands, places = self._homes(keys)
        found = np.zeros(len(keys), bool)
        while len(places):
            held = self._table[places]
            documents, bands, places, held = (array[held > 0] for array in (documents, bands, places, held))
            found[documents[(self._rows[held - 1, bands] == keys[documents, bands]).all(axis=1)]] = True
            left = ~found[documents]
            documents, bands, places = documents[left], bands[left], self._next(places[left])
        return found

    def _insert(self, first: int, last: int) -> None:
        """Put the numbers of rows `first` to `last` into the table, each at the first free place from its home on."""
        documents, _, places = self._homes(self._rows[first:last])
        numbers = (documents + first + 1).astype(np.uint32)
        while len(numbers):
            free = self._table[places] == 0
            self._table[places[free]] = numbers[free]  # of several for one place the last wins; the others go on
            left = self._table[places] != numbers
            numbers, places = numbers[left], self._next(places[left])
