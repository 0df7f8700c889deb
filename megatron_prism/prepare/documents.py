"""From records to documents: a record's text, then what leaves it out, then its tokens. All that a worker process does.

A document's way: keep -> text -> sample -> decontaminate -> tokens -> min_tokens; dedup (dedup.py) needs all documents in order and
comes after. What becomes of a record depends on it and the recipe alone, so neither order nor the number of workers moves it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from megatron_prism.core.config import DecontaminateConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.data import tokenizer
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.prepare import decontaminate, dedup, records, sample, sources
from megatron_prism.prepare.decontaminate import Overlap
from megatron_prism.prepare.sources import Input, OpenFile, Record

BATCH_BYTES = 1 << 19  # a fraction of a second's work, and all that a worker holds at a time
LeftOut = Literal["keep", "sample", "decontaminate", "min_tokens", "dedup"]


@dataclass(frozen=True)
class Recipe:
    """What decides, beside the file, which documents its records become."""

    source: str
    tokenizer: TokenizerSpec
    append_eos: bool
    min_tokens: int
    dedup: Literal["none", "exact", "minhash"]
    valid_percent: float
    seed: int
    decontaminate: DecontaminateConfig | None


@dataclass(frozen=True)
class Batch:
    """Records of one file, in order, with their numbers, and what to do with them."""

    recipe: Recipe
    file: Input
    records: Sequence[tuple[int, Record]]
    is_last: bool


@dataclass(frozen=True)
class Made:
    """What became of a batch: documents as tokens end to end, each one's length, side of the split and keys to know it again by."""

    file: Input
    tokens: np.ndarray
    lengths: np.ndarray
    is_valid: np.ndarray
    keys: np.ndarray
    left_out: Mapping[LeftOut, int]
    bad: Sequence[Problem]
    is_last: bool


def batches(files: Iterable[Input], recipe: Recipe, open_file: OpenFile | None = None) -> Iterator[Batch]:
    """Yield the records of files in batches of about BATCH_BYTES; a file's last batch may be empty.

    Raises: InputError naming a file that cannot be read.
    """
    for file in files:
        waiting: list[tuple[int, Record]] = []
        num_bytes = 0
        for number, record in sources.read_records(file, open_file):
            waiting.append((number, record))
            num_bytes += _size_bytes(record)
            if num_bytes >= BATCH_BYTES:
                yield Batch(recipe, file, waiting, is_last=False)
                waiting, num_bytes = [], 0
        yield Batch(recipe, file, waiting, is_last=True)


def make(batch: Batch) -> Made:
    """Return what becomes of a batch of records."""
    recipe, file = batch.recipe, batch.file
    left_out: Counter[LeftOut] = Counter()
    bad: list[Problem] = []
    found = [text for text, group in read_texts(file, batch.records, left_out, bad) if _is_drawn(recipe, file, text, group, left_out)]
    if recipe.decontaminate:
        overlap = evaluation_overlap(recipe.decontaminate)
        clean = [text for text in found if overlap.first(text) is None]
        left_out["decontaminate"] += len(found) - len(clean)
        found = clean
    tokens, lengths = tokenizer.encode_documents(found, recipe.tokenizer, recipe.append_eos)
    enough = lengths >= max(recipe.min_tokens, 1)
    if not enough.all():
        left_out["min_tokens"] += int((~enough).sum())
        tokens, lengths, found = (
            tokens[np.repeat(enough, lengths)],
            lengths[enough],
            [text for text, is_in in zip(found, enough, strict=True) if is_in],
        )
    is_valid = np.array([file.is_held_out or is_held_out(text, recipe.valid_percent) for text in found], bool)
    return Made(file, tokens, lengths, is_valid, _keys(found, recipe.dedup), left_out, bad, batch.is_last)


def of_one_file(made: Iterator[Made]) -> Iterator[Made]:
    """Yield what became of one file's batches, and look no further: what is wrong with the next file is not this one's matter."""
    for part in made:
        yield part
        if part.is_last:
            return


def lots(batch: Batch) -> list[tuple[str, int]]:
    """Return (group, lot) of each text of a batch whose part is sampled: what `sample.Draw` chooses from."""
    recipe, found = batch.recipe, read_texts(batch.file, batch.records, Counter(), [])
    return [(group, sample.lot(text, recipe.seed, recipe.source)) for text, group in found if group is not None]


def read_texts(
    file: Input, numbered: Iterable[tuple[int, Record]], left_out: Counter[LeftOut], bad: list[Problem]
) -> Iterator[tuple[str, str | None]]:
    """Yield each record's text and the group it is sampled from; what is left out is counted, what is bad is told."""
    for number, record in numbered:
        try:
            text, group = records.text_of(record, file.part, file.is_plain)
        except records.BadRecord as error:
            bad.append(Problem(file.place(number + error.line), error.found, error.required, "correct it, or set on_bad_record: skip"))
            continue
        if text is None:
            left_out["keep"] += 1
        else:
            yield text, group


def is_held_out(text: str, valid_percent: float) -> bool:
    """Return whether a document is among the valid_percent held out, by a hash of its text: equal texts stay together."""
    if not valid_percent:
        return False
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") * 100 < valid_percent * 2**64


def evaluation_files(config: DecontaminateConfig) -> tuple[Input, ...]:
    """Return the files of the evaluation sets.

    Raises: InputError with every pattern that matches no file.
    """
    problems: list[Problem] = []
    files = [
        file for index, part in enumerate(config.against) for file in sources.files(part, f"decontaminate.against.{index}.path", problems)
    ]
    raise_problems(problems)
    return tuple(files)


@lru_cache(maxsize=1)
def evaluation_overlap(config: DecontaminateConfig) -> Overlap:
    """Return what to look for in documents, read once a process from the evaluation sets.

    Raises: InputError with every record of theirs that gives no text.
    """
    problems: list[Problem] = []
    wanted = [text for file in evaluation_files(config) for text, _ in read_texts(file, sources.read_records(file), Counter(), problems)]
    raise_problems(problems)
    if not wanted:
        raise InputError(Problem("decontaminate.against", "no text", "at least one text"))
    return decontaminate.overlap(wanted, config.ngram, config.shortest)


def _is_drawn(recipe: Recipe, file: Input, text: str, group: str | None, left_out: Counter[LeftOut]) -> bool:
    if group is None:
        return True
    assert file.limits is not None
    limit = file.limits.get(group)
    drawn = limit is not None and sample.lot(text, recipe.seed, recipe.source) <= limit
    left_out["sample"] += not drawn
    return drawn


def _keys(found: Sequence[str], kind: Literal["none", "exact", "minhash"]) -> np.ndarray:
    """Return what `dedup` knows each text by, uint64 [texts, numbers of one]."""
    if kind == "none" or not found:
        return np.zeros((len(found), 0), np.uint64)
    rows = [dedup.minhash_bands(text) if kind == "minhash" else np.frombuffer(dedup.exact_key(text), np.uint64) for text in found]
    return np.stack(rows)


def _size_bytes(value: object) -> int:
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size_bytes, value.values()))
    return sum(map(_size_bytes, value)) if isinstance(value, list) else 8
