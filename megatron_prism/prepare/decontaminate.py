"""Find runs of words that a document shares with evaluation texts, exactly.

Words are lower-case runs of `\\w`, so neither punctuation nor white space nor the layout of LaTeX hides a copy.
A 64-bit hash of a run's first words finds candidates; they are compared word by word, so no hash decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat

import numpy as np

WORD = re.compile(r"\w+")
FACTOR = 0x9E3779B97F4A7C15  # odd: 2**64 over the golden ratio
FILTER_BITS_PER_RUN = 64  # a table of so many bits (bytes, in memory) a run lets one in 64 other runs through


@dataclass(frozen=True)
class Overlap:
    """The words of the evaluation texts, made to be searched. num_texts counts all of them, num_too_short those not looked for.

    A run is what must not be shared: `ngram` words in a row, or a shorter text. Runs are ordered by the hash of their first words.
    """

    num_texts: int
    num_too_short: int
    num_hashed: int  # words of a run that are hashed: those of the shortest run
    vocabulary: dict[str, int]  # from 1: 0 is every other word
    words: np.ndarray  # uint64: of all texts, one after the other
    hashes: np.ndarray  # uint64 [runs]
    starts: np.ndarray  # int64 [runs], in `words`
    lengths: np.ndarray  # int64 [runs], in words
    table: np.ndarray  # bool: is there a hash with these first bits?

    def first(self, text: str) -> str | None:
        """Return the shared run of words that begins first, of those the longest; None where there is none."""
        words = WORD.findall(text.lower())
        numbers = np.fromiter(map(self.vocabulary.get, words, repeat(0)), np.uint64, len(words))
        hashes = _hash_runs(numbers, self.num_hashed)
        for start in np.flatnonzero(self.table[hashes >> _shift(self.table)]):
            first, last = np.searchsorted(self.hashes, hashes[start], "left"), np.searchsorted(self.hashes, hashes[start], "right")
            known = [
                length
                for begin, length in zip(self.starts[first:last], self.lengths[first:last], strict=True)
                if np.array_equal(self.words[begin : begin + length], numbers[start : start + length])
            ]
            if known:
                return " ".join(words[start : start + max(known)])
        return None


def overlap(texts: Iterable[str], ngram: int, shortest: int) -> Overlap:
    """Return what finds `ngram` words in a row of any of `texts`; of a shorter text all words, if they are at least `shortest`."""
    vocabulary: dict[str, int] = {}
    words: list[int] = []
    runs: list[tuple[int, int]] = []  # start, length
    num_texts = num_too_short = 0
    for text in texts:
        found = WORD.findall(text.lower())
        length = min(len(found), ngram)
        num_texts += 1
        if len(found) < max(shortest, 1):
            num_too_short += 1
            continue
        runs += [(len(words) + index, length) for index in range(len(found) - length + 1)]
        words += [vocabulary.setdefault(word, len(vocabulary) + 1) for word in found]
    starts, lengths = np.array(runs, np.int64).reshape(-1, 2).T
    num_hashed = int(lengths.min(initial=ngram))
    numbers = np.array(words, np.uint64)
    hashes = _hash_runs(numbers, num_hashed)[starts]
    table = np.zeros(1 << (FILTER_BITS_PER_RUN * len(hashes)).bit_length(), bool)
    table[hashes >> _shift(table)] = True
    order = np.argsort(hashes, kind="stable")
    return Overlap(num_texts, num_too_short, num_hashed, vocabulary, numbers, hashes[order], starts[order], lengths[order], table)


def _shift(table: np.ndarray) -> np.uint64:
    return np.uint64(65 - len(table).bit_length())


def _hash_runs(words: np.ndarray, length: int) -> np.ndarray:
    """Return a 64-bit hash of every run of `length` words, a polynomial in FACTOR; it doubles to runs of 2, 4, ..., then overlaps."""
    hashes, size = words * np.uint64(FACTOR), 1
    while size < length:
        step = min(size, length - size)
        hashes = hashes[:-step] * np.uint64(pow(FACTOR, step, 1 << 64)) + hashes[step:]
        size += step
    return hashes
