"""Find runs of words that a document shares with evaluation texts, exactly.

Words are lower-case runs of `\\w`, so neither punctuation nor white space nor the layout of LaTeX hides a copy.
A 64-bit hash of each run finds candidates; they are compared word by word, so no hash decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat

import numpy as np

WORD = re.compile(r"\w+")
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: 2**64 over the golden ratio
FILTER_BITS_PER_RUN = 64


@dataclass(frozen=True)
class Runs:
    """All runs of one length: hashes, ascending; where in the evaluation texts each begins; a table of the hashes' first bits."""

    hashes: np.ndarray  # uint64 [runs]
    starts: np.ndarray  # int64 [runs]
    table: np.ndarray  # bool [2 ** (64 - shift)]: is there a hash that begins so?
    shift: np.uint64


@dataclass(frozen=True)
class Overlap:
    """The words of the evaluation texts, made to be searched. num_texts counts all of them, num_too_short those not looked for."""

    num_texts: int
    num_too_short: int
    vocabulary: dict[str, int]  # from 1: 0 is every other word
    words: np.ndarray  # uint64: all texts, one after the other
    runs: dict[int, Runs]  # by length in words

    def first(self, text: str) -> str | None:
        """Return the shared run of words that begins first, of those the longest; None where there is none."""
        if not self.runs:
            return None
        words = WORD.findall(text.lower())
        found = np.fromiter(map(self.vocabulary.get, words, repeat(0)), np.uint64, len(words))
        best: tuple[int, int] | None = None
        for length, hashes in _hash_runs(found, max(self.runs)):
            if (runs := self.runs.get(length)) and (start := self._start(found, length, hashes, runs)) is not None:
                best = min(best or (start, -length), (start, -length))
        return " ".join(words[best[0] : best[0] - best[1]]) if best else None

    def _start(self, found: np.ndarray, length: int, hashes: np.ndarray, runs: Runs) -> int | None:
        for start in np.flatnonzero(runs.table[hashes >> runs.shift]):
            first, last = np.searchsorted(runs.hashes, hashes[start], "left"), np.searchsorted(runs.hashes, hashes[start], "right")
            for known in runs.starts[first:last]:
                if np.array_equal(self.words[known : known + length], found[start : start + length]):
                    return int(start)
        return None


def overlap(texts: Iterable[str], ngram: int, shortest: int) -> Overlap:
    """Return what finds `ngram` words in a row of any of `texts`; of a shorter text all words, if they are at least `shortest`."""
    vocabulary: dict[str, int] = {}
    words: list[int] = []
    starts: dict[int, list[int]] = {}
    num_texts = num_too_short = 0
    for text in texts:
        found = WORD.findall(text.lower())
        num_texts += 1
        length = min(len(found), ngram)
        if length < max(shortest, 1):
            num_too_short += 1
            continue
        starts.setdefault(length, []).extend(range(len(words), len(words) + len(found) - length + 1))
        words += [vocabulary.setdefault(word, len(vocabulary) + 1) for word in found]
    array = np.array(words, np.uint64)
    hashed = {length: hashes for length, hashes in _hash_runs(array, max(starts, default=0)) if length in starts}
    runs = {length: _index(hashes[starts[length]], np.array(starts[length])) for length, hashes in hashed.items()}
    return Overlap(num_texts, num_too_short, vocabulary, array, runs)


def _index(hashes: np.ndarray, starts: np.ndarray) -> Runs:
    order = np.argsort(hashes, kind="stable")
    shift = np.uint64(64 - (FILTER_BITS_PER_RUN * len(hashes)).bit_length())
    table = np.zeros(1 << int(64 - shift), bool)
    table[hashes >> shift] = True
    return Runs(hashes[order], starts[order], table, shift)


def _hash_runs(words: np.ndarray, longest: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each length up to `longest`, and the hashes of all runs of that many words, in order."""
    hashes = np.zeros(len(words) + 1, np.uint64)
    for length in range(1, min(longest, len(words)) + 1):
        hashes = (hashes[:-1] + words[length - 1 :]) * FACTOR
        hashes ^= hashes >> np.uint64(29)
        yield length, hashes
