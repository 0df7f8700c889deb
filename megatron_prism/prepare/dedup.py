"""The keys by which duplicate documents are known: the same text (exact), or most of its runs of five words (MinHash).

A document's key is a row of 64-bit numbers, computed from its text alone in any process. duplicates.py compares them.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

if TYPE_CHECKING:
    from datasketch import MinHash

WORD = re.compile(r"\w+")
NUM_BANDS, BAND_ROWS = 14, 8  # texts of similarity s share a band with probability 1 - (1 - s**8)**14: one half at s = 0.69
KEY_NUMBERS = {"none": 0, "exact": 2, "minhash": NUM_BANDS}  # 64-bit numbers of a key, by the kind of dedup
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
