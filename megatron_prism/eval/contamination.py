"""Find the questions of evaluation sets in training documents: which n-grams of each question, or of its answer, a document holds.

Words are those of words.without_latex. The evaluation sets' n-grams are in memory, and the documents pass by one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_prism.eval import benchmarks
from megatron_prism.eval.benchmarks import Against, Text
from megatron_prism.prepare import decontaminate, words
from megatron_prism.prepare.decontaminate import Overlap
from megatron_prism.prepare.texts import Place, Texts

SIDES = ("question", "answer")


@dataclass(frozen=True)
class Search:
    """What is looked for. ngram: words in a row. A text of fewer is looked for as a whole, one of fewer than `shortest` not at all."""

    against: tuple[Against, ...]
    ngram: int = 13
    shortest: int = 8
    question_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Index:
    """The n-grams of all texts of the evaluation sets. num_ngrams: of each text, 0 where it is too short; num_words: int64 [texts]."""

    texts: tuple[Text, ...]
    overlap: Overlap
    num_ngrams: np.ndarray
    num_words: np.ndarray


@dataclass(frozen=True)
class Hit:
    """A text of the index that a document holds, in part or whole.

    containment: the share of the text's n-grams that the document holds. span: the longest piece of the document that it shares, and begin:
    its first character in the document's NFKC form.
    """

    text: int
    containment: float
    span: str
    begin: int


@dataclass(frozen=True)
class Scanned:
    """A batch of documents: what they hold, by the document's place. bad: records that give no text, named."""

    source: str
    num_documents: int
    num_bytes: int
    hits: tuple[tuple[Place, tuple[Hit, ...]], ...]
    bad: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def index(search: Search) -> Index:
    """Return the index of the evaluation sets, made once per process. Raises: InputError where a set cannot be read whole."""
    texts = benchmarks.read(search.against, search.question_fields)
    overlap = decontaminate.overlap((text.text for text in texts), search.ngram, search.shortest, words.without_latex)
    num_words = np.array([len(words.without_latex(text.text)) for text in texts], np.int64)
    return Index(texts, overlap, np.bincount(overlap.texts, minlength=len(texts)), num_words)


def scan(batch: Texts, search: Search) -> Scanned:
    """Look for the evaluation sets in a batch of documents."""
    of_sets, hits, num_documents, num_bytes = index(search), [], 0, 0
    bad: list[str] = []
    for place, text in batch.read(bad):
        num_documents, num_bytes = num_documents + 1, num_bytes + len(text.encode("utf-8", "replace"))
        if of_document := tuple(find(text, of_sets)):
            hits.append((place, of_document))
    return Scanned(batch.source, num_documents, num_bytes, tuple(hits), tuple(bad))


def find(document: str, of_sets: Index) -> Iterator[Hit]:
    """Yield each text of the index of which a document holds an n-gram."""
    runs: dict[int, list[tuple[int, int]]] = {}  # by text: (word of the document, run)
    for word, run in of_sets.overlap.shared(words.without_latex(document)):
        runs.setdefault(int(of_sets.overlap.texts[run]), []).append((word, run))
    places = words.spans(document) if runs else []
    for text, pairs in runs.items():
        share = len({run for _, run in pairs}) / int(of_sets.num_ngrams[text])
        first, last = _longest((word, word + int(of_sets.overlap.lengths[run])) for word, run in pairs)
        begin, end = places[first][0], places[last - 1][1]
        yield Hit(text, share, words.normal(document)[begin:end], begin)


def _longest(pieces: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the longest piece, with pieces that overlap or touch as one. They come in the order of their begins."""
    joined: list[tuple[int, int]] = []
    for begin, end in pieces:
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return max(joined, key=lambda piece: piece[1] - piece[0])


@dataclass
class Tally:
    """What the documents of one source hold. Memory grows with the evaluation sets alone.

    examples: by text, the documents that hold most of it. documents: how many hold a part of a set's side, or (None) of either.
    """

    num_documents: int = 0
    num_bytes: int = 0
    examples: dict[int, list[tuple[Place, Hit]]] = field(default_factory=dict)
    of_text: dict[int, int] = field(default_factory=dict)
    documents: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, scanned: Scanned, of_sets: Index, num_examples: int) -> None:
        """Count a batch."""
        self.num_documents += scanned.num_documents
        self.num_bytes += scanned.num_bytes
        for place, hits in scanned.hits:
            for key in {(of_sets.texts[hit.text].benchmark, of_sets.texts[hit.text].side) for hit in hits}:
                self.documents[key] = self.documents.get(key, 0) + 1
            for hit in hits:
                self.of_text[hit.text] = self.of_text.get(hit.text, 0) + 1
                best = [*self.examples.get(hit.text, []), (place, hit)]
                self.examples[hit.text] = sorted(best, key=lambda pair: -pair[1].containment)[: max(num_examples, 1)]


def table(tallies: dict[str, Tally], of_sets: Index) -> list[dict[str, Any]]:
    """Return a row for each source, evaluation set and side: what is held, of how much. A set without answers has no row for them.

    num_whole: questions of which one document holds every n-gram (containment 1). containment: the mean, over all questions that are looked
    for, of the largest share that one document holds.
    """
    rows = []
    for source, tally in tallies.items():
        for benchmark, side, numbers in sides(of_sets):
            searched = [number for number in numbers if of_sets.num_ngrams[number]]
            best = {number: tally.examples[number][0][1].containment for number in searched if number in tally.examples}
            rows.append(
                {
                    "source": source,
                    "benchmark": benchmark,
                    "side": side,
                    "num_hit": len(best),
                    "num_whole": sum(share == 1.0 for share in best.values()),
                    "num_searched": len(searched),
                    "num_documents_hit": tally.documents.get((benchmark, side), 0),
                    "containment": sum(best.values()) / len(searched) if searched else None,
                    "max_containment": max(best.values(), default=0.0),
                }
            )
    return rows


def sides(of_sets: Index) -> Iterator[tuple[str, str, list[int]]]:
    """Yield (set, side, numbers of its texts) of each side that has texts."""
    for benchmark in dict.fromkeys(text.benchmark for text in of_sets.texts):
        for side in SIDES:
            numbers = [number for number, text in enumerate(of_sets.texts) if (text.benchmark, text.side) == (benchmark, side)]
            if numbers:
                yield benchmark, side, numbers


def describe(of_sets: Index, search: Search) -> list[dict[str, Any]]:
    """Return what is looked for of each set: its texts, those too short to be, and those short enough to be looked for as a whole."""
    return [
        {
            "benchmark": benchmark,
            "side": side,
            "num_texts": len(numbers),
            "num_too_short": int((of_sets.num_words[numbers] < search.shortest).sum()),
            "num_as_a_whole": int(((of_sets.num_words[numbers] >= search.shortest) & (of_sets.num_words[numbers] < search.ngram)).sum()),
            "num_ngrams": int(of_sets.num_ngrams[numbers].sum()),
        }
        for benchmark, side, numbers in sides(of_sets)
    ]


def examples(tallies: dict[str, Tally], of_sets: Index, num_examples: int) -> Iterator[dict[str, Any]]:
    """Yield what was found, a line a document and text: by source, in the sets' order, the most contained first."""
    for source, tally in tallies.items():
        for number in sorted(tally.examples):
            text: Text = of_sets.texts[number]
            for place, hit in tally.examples[number][:num_examples]:
                yield {
                    "source": source,
                    "benchmark": text.benchmark,
                    "question": text.question,
                    "side": text.side,
                    "containment": hit.containment,
                    "num_documents": tally.of_text[number],
                    **place._asdict(),
                    "begin": hit.begin,
                    "span": hit.span,
                }
