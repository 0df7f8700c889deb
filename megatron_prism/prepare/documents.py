"""From records to documents: text, filters, tokens. This is all that a worker process does.

The steps are keep -> text -> sample -> decontaminate -> tokens -> min_tokens. Dedup (dedup.py) needs all documents in order, so it runs
afterwards in the parent. The result for a record depends on the record and the recipe alone, not on order or the number of workers.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from megatron_prism.core.config import DecontaminateConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.data import tokenizer
from megatron_prism.data.tokenizer import InText, TokenizerSpec
from megatron_prism.prepare import decontaminate, dedup, records, sample, sources
from megatron_prism.prepare.decontaminate import Overlap
from megatron_prism.prepare.sources import Input, OpenFile, Record

BATCH_BYTES = 1 << 19  # a fraction of a second of work; a worker holds one batch at a time
LeftOut = Literal["keep", "sample", "decontaminate", "min_tokens", "dedup"]


@dataclass(frozen=True)
class Recipe:
    """The settings that decide which documents a file's records become."""

    source: str
    tokenizer: TokenizerSpec
    append_eos: bool
    special_tokens_in_text: InText
    min_tokens: int
    dedup: Literal["none", "exact", "minhash"]
    valid_percent: float
    seed: int
    decontaminate: DecontaminateConfig | None


@dataclass(frozen=True)
class Batch:
    """Records of one file, in order, with their numbers and the recipe for them."""

    recipe: Recipe
    file: Input
    records: Sequence[tuple[int, Record]]
    is_last: bool


@dataclass(frozen=True)
class Made:
    """The documents of one batch: tokens, concatenated; per document its length, its side of the split, its dedup key, and how many
    special tokens its text spells.
    """

    file: Input
    tokens: np.ndarray
    lengths: np.ndarray
    is_valid: np.ndarray
    keys: np.ndarray
    num_spelled: np.ndarray
    left_out: Mapping[LeftOut, int]
    bad: Sequence[Problem]
    is_last: bool


def batches(files: Iterable[Input], recipe: Recipe, open_file: OpenFile | None = None) -> Iterator[Batch]:
    """Yield the records of files in batches of about BATCH_BYTES. The last batch of a file may be empty.

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
    """Turn a batch of records into documents."""
    recipe, file = batch.recipe, batch.file
    left_out: Counter[LeftOut] = Counter()
    bad: list[Problem] = []
    read = _read_allowed(batch, left_out, bad)
    texts = [text for text, group in read if _is_drawn(recipe, file, text, group, left_out)]
    if recipe.decontaminate:
        overlap = evaluation_overlap(recipe.decontaminate)
        clean = [text for text in texts if overlap.first(text) is None]
        left_out["decontaminate"] += len(texts) - len(clean)
        texts = clean
    tokens, lengths = tokenizer.encode_documents(texts, recipe.tokenizer, recipe.append_eos, recipe.special_tokens_in_text)
    enough = lengths >= max(recipe.min_tokens, 1)
    if not enough.all():
        left_out["min_tokens"] += int((~enough).sum())
        tokens, lengths, texts = (
            tokens[np.repeat(enough, lengths)],
            lengths[enough],
            [text for text, is_in in zip(texts, enough, strict=True) if is_in],
        )
    is_valid = np.array([file.is_held_out or is_held_out(text, recipe.valid_percent) for text in texts], bool)
    num_spelled = tokenizer.num_spelled(texts, recipe.tokenizer)
    return Made(file, tokens, lengths, is_valid, _keys(texts, recipe.dedup), num_spelled, left_out, bad, batch.is_last)


def of_one_file(made: Iterator[Made]) -> Iterator[Made]:
    """Yield the batches of one file and stop before the next, so an error in the next file does not end this one."""
    for part in made:
        yield part
        if part.is_last:
            return


def lots(batch: Batch) -> list[tuple[str, int]]:
    """Return (group, lot) of each text in a batch of a sampled part: the candidates of `sample.Draw`."""
    recipe, texts = batch.recipe, _read_allowed(batch, Counter(), [])
    return [(group, sample.lot(text, recipe.seed, recipe.source)) for text, group in texts if group is not None]


def _read_allowed(batch: Batch, left_out: Counter[LeftOut], bad: list[Problem]) -> Iterator[tuple[str, str | None]]:
    not_allowed = tokenizer.not_allowed(batch.recipe.tokenizer, batch.recipe.special_tokens_in_text)
    return read_texts(batch.file, batch.records, left_out, bad, not_allowed)


def read_texts(
    file: Input,
    numbered: Iterable[tuple[int, Record]],
    left_out: Counter[LeftOut],
    bad: list[Problem],
    not_allowed: re.Pattern[str] | None = None,
) -> Iterator[tuple[str, str | None]]:
    """Yield each record's text and its sample group. Count filtered records in `left_out`; append bad ones to `bad`.

    not_allowed: finds the special tokens that make a record a bad one.
    """
    for number, record in numbered:
        try:
            text, group = records.text_of(record, file.part, file.is_plain)
        except records.BadRecord as error:
            bad.append(Problem(file.place(number + error.line), error.found, error.required, "correct it, or set on_bad_record: skip"))
            continue
        if text is None:
            left_out["keep"] += 1
        elif not_allowed and (spelled := not_allowed.search(text)):
            found = f"the special token {spelled[0]!r} in the text"
            fix = "remove it, or change special_tokens_in_text, or set on_bad_record: skip"
            bad.append(Problem(file.place(number), found, "a text whose tokens are all ordinary", fix))
        else:
            yield text, group


def is_held_out(text: str, valid_percent: float) -> bool:
    """Return whether a document is held out (valid_percent). A hash of its text decides, so equal texts stay together."""
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
    """Return the index of the evaluation sets, read once per process.

    Raises: InputError with every evaluation record that gives no text.
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


def _keys(texts: Sequence[str], kind: Literal["none", "exact", "minhash"]) -> np.ndarray:
    """Return the dedup key of each text, uint64 [texts, numbers per key]."""
    if kind == "none" or not texts:
        return np.zeros((len(texts), 0), np.uint64)
    rows = [dedup.minhash_bands(text) if kind == "minhash" else np.frombuffer(dedup.exact_key(text), np.uint64) for text in texts]
    return np.stack(rows)


def _size_bytes(value: object) -> int:
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size_bytes, value.values()))
    return sum(map(_size_bytes, value)) if isinstance(value, list) else 8
