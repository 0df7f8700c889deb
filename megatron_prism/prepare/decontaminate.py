"""Find runs of words that a document shares with evaluation texts. The answer is exact.

Words are those of words.plain (or another rule of words.py), so punctuation, white space and the layout of LaTeX cannot hide a copy.
A 64-bit hash of a run's first words finds candidates. Candidates are compared word by word, so a hash collision changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat

import numpy as np

from megatron_prism.prepare.words import Rule, plain

FACTOR = 0x9E3779B97F4A7C15  # odd: 2**64 over the golden ratio
FILTER_BITS_PER_RUN = 64  # table entries per run (one byte each in memory): one in 64 other runs passes this filter


@dataclass(frozen=True)
class Overlap:
    """An index over the words of the evaluation texts. num_texts counts all texts, num_too_short those too short to search for.

    A run is what a document must not share: `ngram` words in a row, or all words of a shorter text. Runs are sorted by hash.
    """

    num_texts: int
    num_too_short: int
    num_hashed: int  # how many words of each run are hashed: the length of the shortest run
    vocabulary: dict[str, int]  # numbers from 1; 0 stands for every unknown word
    words: np.ndarray  # uint64: all texts, concatenated
    hashes: np.ndarray  # uint64 [runs]
    starts: np.ndarray  # int64 [runs], in `words`
    lengths: np.ndarray  # int64 [runs], in words
    texts: np.ndarray  # int64 [runs]: the number of the run's text
    table: np.ndarray  # bool: whether any hash begins with these bits
    rule: Rule = plain

    def first(self, text: str) -> str | None:
        """Return the first shared run of words, the longest where several begin there. None: nothing is shared."""
        of_text = self.rule(text)
        for start, pairs in groupby(self.shared(of_text), key=lambda pair: pair[0]):
            return " ".join(of_text[start : start + max(int(self.lengths[run]) for _, run in pairs)])
        return None

    def shared(self, of_text: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Yield (word, run) for each run that a text's words hold, and the word that it begins with, in the text's order."""
        numbers = np.fromiter(map(self.vocabulary.get, of_text, repeat(0)), np.uint64, len(of_text))
        hashes = _hash_runs(numbers, self.num_hashed)
        for start in np.flatnonzero(self.table[hashes >> _shift(self.table)]):
            first, last = np.searchsorted(self.hashes, hashes[start], "left"), np.searchsorted(self.hashes, hashes[start], "right")
            for run in range(first, last):
                begin, length = self.starts[run], self.lengths[run]
                if np.array_equal(self.words[begin : begin + length], numbers[start : start + length]):
                    yield int(start), run


def overlap(texts: Iterable[str], ngram: int, shortest: int, rule: Rule = plain) -> Overlap:
    """Build the index over `texts`: runs of `ngram` words. A text shorter than that is one run, if it has at least `shortest` words."""
    vocabulary: dict[str, int] = {}
    all_words: list[int] = []
    runs: list[tuple[int, int, int]] = []  # start, length, text
    num_texts = num_too_short = 0
    for text in texts:
        text_words = rule(text)
        length = min(len(text_words), ngram)
        number, num_texts = num_texts, num_texts + 1
        if len(text_words) < max(shortest, 1):
            num_too_short += 1
            continue
        runs += [(len(all_words) + index, length, number) for index in range(len(text_words) - length + 1)]
        all_words += [vocabulary.setdefault(word, len(vocabulary) + 1) for word in text_words]
    starts, lengths, of_texts = np.array(runs, np.int64).reshape(-1, 3).T
    num_hashed = int(lengths.min(initial=ngram))
    numbers = np.array(all_words, np.uint64)
    hashes = _hash_runs(numbers, num_hashed)[starts]
    table = np.zeros(1 << (FILTER_BITS_PER_RUN * len(hashes)).bit_length(), bool)
    table[hashes >> _shift(table)] = True
    order = np.argsort(hashes, kind="stable")
    hashes, starts, lengths, of_texts = (array[order] for array in (hashes, starts, lengths, of_texts))
    return Overlap(num_texts, num_too_short, num_hashed, vocabulary, numbers, hashes, starts, lengths, of_texts, table, rule)


def _shift(table: np.ndarray) -> np.uint64:
    return np.uint64(65 - len(table).bit_length())


def _hash_runs(numbers: np.ndarray, length: int) -> np.ndarray:
    """Return a 64-bit polynomial hash (in FACTOR) of every run of `length` words. Runs double: 2, 4, ...; the last step overlaps."""
    hashes, size = numbers * np.uint64(FACTOR), 1
    while size < length:
        step = min(size, length - size)
        hashes = hashes[:-step] * np.uint64(pow(FACTOR, step, 1 << 64)) + hashes[step:]
        size += step
    return hashes
