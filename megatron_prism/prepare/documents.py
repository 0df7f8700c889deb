"""From records to documents: text, filters, tokens. This is all that a worker process does.

The steps are keep -> text -> sample -> decontaminate -> tokens -> min_tokens. Dedup (dedup.py) needs all documents in order, so it runs
afterwards (duplicates.py). The result for a record depends on the record and the recipe alone, not on order or the number of workers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from megatron_prism.core import log
from megatron_prism.core.config import DecontaminateConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.data import tokenizer
from megatron_prism.data.tokenizer import InText, TokenizerSpec
from megatron_prism.prepare import decontaminate, dedup, records, sample, sources
from megatron_prism.prepare.decontaminate import Overlap
from megatron_prism.prepare.lines import UNBOUNDED, TooLong
from megatron_prism.prepare.sources import Input, OpenFile, Record
from megatron_prism.prepare.words import PLAIN_NAME

SHOWN = 20  # records of evaluation sets named at once
BATCH_BYTES, LEAST_BATCH_BYTES = 1 << 19, 1 << 12  # a fraction of a second of work; a worker holds one batch at a time
LeftOut = Literal["keep", "sample", "decontaminate", "min_tokens", "too_long", "dedup"]
REASONS: tuple[str, ...] = (
    "keep",
    "sample",
    "decontaminate",
    "min_tokens",
    "too_long",
    "bad",
)  # why a record gave no document, by its code
LEFT_OUT = np.dtype([("number", "<i8"), ("reason", "u1")])  # a record that gave none


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
    max_record_bytes: int = UNBOUNDED


@dataclass(frozen=True)
class Batch:
    """Records of one file, in order, with their numbers and the recipe for them."""

    recipe: Recipe
    file: Input
    records: Sequence[tuple[int, Record]]
    is_last: bool


@dataclass(frozen=True)
class Made:
    """The documents of one batch, in order: tokens, concatenated; per document its record's number, length, side of the split, dedup key,
    and how many special tokens its text spells.

    left_out: LEFT_OUT for each other record, in order. too_long: the places and sizes of those that were too long.
    """

    file: Input
    tokens: np.ndarray
    numbers: np.ndarray
    lengths: np.ndarray
    is_valid: np.ndarray
    keys: np.ndarray
    num_spelled: np.ndarray
    left_out: np.ndarray
    bad: Sequence[Problem]
    too_long: Sequence[str]
    is_last: bool


@dataclass
class Without:
    """The records that give no document: (number, reason) of each, the problems of the bad ones, the places and sizes of the long ones."""

    records: list[tuple[int, str]] = field(default_factory=list)
    bad: list[Problem] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)

    def table(self) -> np.ndarray:
        """Return LEFT_OUT of each record, by its number."""
        return np.array(sorted((number, REASONS.index(reason)) for number, reason in self.records), LEFT_OUT)


def batches(files: Iterable[Input], recipe: Recipe, open_file: OpenFile | None = None, batch_bytes: int | None = None) -> Iterator[Batch]:
    """Yield the records of files in batches of about batch_bytes (None: BATCH_BYTES). The last batch of a file may be empty.

    Raises: InputError naming a file that cannot be read.
    """
    for file in files:
        for waiting, is_last in record_batches(file, open_file, recipe.max_record_bytes, batch_bytes):
            yield Batch(recipe, file, waiting, is_last)


def record_batches(
    file: Input, open_file: OpenFile | None = None, max_bytes: int = UNBOUNDED, batch_bytes: int | None = None
) -> Iterator[tuple[list[tuple[int, Record]], bool]]:
    """Yield a file's records with their numbers, in batches of about batch_bytes (None: BATCH_BYTES), and whether a batch is the last.

    Raises: InputError where the file cannot be read.
    """
    waiting: list[tuple[int, Record]] = []
    num_bytes = 0
    for number, record in sources.read_records(file, open_file, max_bytes):
        waiting.append((number, record))
        num_bytes += _size_bytes(record)
        if num_bytes >= (batch_bytes or BATCH_BYTES):
            yield waiting, False
            waiting, num_bytes = [], 0
    yield waiting, True


def make(batch: Batch) -> Made:
    """Turn a batch of records into documents."""
    recipe, file, without = batch.recipe, batch.file, Without()
    texts = [(number, text) for number, text, group in _of_batch(batch, without) if _is_drawn(recipe, file, number, text, group, without)]
    if recipe.decontaminate:
        overlap = evaluation_overlap(recipe.decontaminate)
        dirty = {number for number, text in texts if overlap.first(text) is not None}
        without.records += [(number, "decontaminate") for number in dirty]
        texts = [(number, text) for number, text in texts if number not in dirty]
    tokens, lengths = tokenizer.encode_documents(
        [text for _, text in texts], recipe.tokenizer, recipe.append_eos, recipe.special_tokens_in_text
    )
    enough = lengths >= max(recipe.min_tokens, 1)
    if not enough.all():
        without.records += [(number, "min_tokens") for (number, _), is_in in zip(texts, enough, strict=True) if not is_in]
        tokens, lengths = tokens[np.repeat(enough, lengths)], lengths[enough]
        texts = [pair for pair, is_in in zip(texts, enough, strict=True) if is_in]
    numbers = np.array([number for number, _ in texts], np.int64)
    is_valid = np.array([file.is_held_out or is_held_out(text, recipe.valid_percent) for _, text in texts], bool)
    keys, num_spelled = (
        _keys([text for _, text in texts], recipe.dedup),
        tokenizer.num_spelled([text for _, text in texts], recipe.tokenizer),
    )
    return Made(file, tokens, numbers, lengths, is_valid, keys, num_spelled, without.table(), without.bad, without.too_long, batch.is_last)


def of_one_file(made: Iterator[Made]) -> Iterator[Made]:
    """Yield the batches of one file and stop before the next, so an error in the next file does not end this one."""
    for part in made:
        yield part
        if part.is_last:
            return


def lots(batch: Batch) -> tuple[list[tuple[str, int]], int, str]:
    """Return (group, lot) of each text in a batch of a sampled part, the candidates of `sample.Draw`; how many records are bad; the first of them."""
    recipe, without = batch.recipe, Without()
    texts = _of_batch(batch, without)
    found = [(group, sample.lot(text, recipe.seed, recipe.source)) for _, text, group in texts if group is not None]
    return found, len(without.bad), str(without.bad[0]) if without.bad else ""


def read_texts(
    file: Input, numbered: Iterable[tuple[int, Record]], left_out: Counter[LeftOut], bad: list[Problem]
) -> Iterator[tuple[str, str | None]]:
    """Yield each record's text and its sample group. Count filtered records in `left_out`; append bad ones to `bad`."""
    for record in numbered:
        without = Without()
        yield from ((text, group) for _, text, group in _texts(file, [record], without))
        left_out.update(reason for _, reason in without.records if reason != "bad")  # type: ignore[misc]
        bad += without.bad


def _of_batch(batch: Batch, without: Without) -> Iterator[tuple[int, str, str | None]]:
    recipe = batch.recipe
    not_allowed = tokenizer.not_allowed(recipe.tokenizer, recipe.special_tokens_in_text)
    return _texts(batch.file, batch.records, without, recipe.max_record_bytes, not_allowed)


def _texts(
    file: Input,
    numbered: Iterable[tuple[int, Record]],
    without: Without,
    max_bytes: int = UNBOUNDED,
    not_allowed: re.Pattern[str] | None = None,
) -> Iterator[tuple[int, str, str | None]]:
    """Yield each record's number, text and sample group. A text of more than max_bytes is too long, as a record is.

    not_allowed: finds the special tokens that make a record a bad one.
    """
    for number, record in numbered:
        num_bytes = record.num_bytes if isinstance(record, TooLong) else 0
        if not isinstance(record, TooLong):
            try:
                text, group = records.text_of(record, file.part, file.is_plain)
            except records.BadRecord as error:
                fix = "correct it, or set on_bad_record: skip"
                without.bad.append(Problem(file.place(number + error.line), error.found, error.required, fix))
                without.records.append((number, "bad"))
                continue
            if text is None:
                without.records.append((number, "keep"))
                continue
            if 4 * len(text) <= max_bytes or (num_bytes := len(text.encode())) <= max_bytes:
                if not_allowed and (spelled := not_allowed.search(text)):
                    found = f"the special token {spelled[0]!r} in the text"
                    fix = "remove it, or change special_tokens_in_text, or set on_bad_record: skip"
                    without.bad.append(Problem(file.place(number), found, "a text whose tokens are all ordinary", fix))
                    without.records.append((number, "bad"))
                else:
                    yield number, text, group
                continue
        without.records.append((number, "too_long"))
        without.too_long.append(f"{file.place(number)}: {num_bytes} bytes")


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


def evaluation_identity(config: DecontaminateConfig, sha256: Mapping[str, str]) -> dict[str, Any]:
    """Return all that decides what is left out, each evaluation file by its hash and by how it is read. Where it lies decides nothing."""
    files = evaluation_files(config)
    against = [{**sources.how_read(file.part), "is_plain": file.is_plain, "sha256": sha256[file.name]} for file in files]
    return dataclasses.asdict(config) | {"against": against, "words": PLAIN_NAME}


def searched(config: DecontaminateConfig) -> dict[str, Any]:
    """Return what a manifest says of the evaluation texts: by which words they were looked for, and how many were too short to be."""
    overlap = evaluation_overlap(config)
    return {"words": PLAIN_NAME, "texts": overlap.num_texts, "too_short": overlap.num_too_short}


def has_these_words(described: Mapping[str, Any]) -> bool:
    """Say whether what a manifest describes was decontaminated by today's words, or not at all."""
    found = described.get("decontaminate")
    return found is None or found.get("words") == PLAIN_NAME


def warn_of_short(config: DecontaminateConfig) -> None:
    """Warn of evaluation texts that are too short to be looked for. Raises: as evaluation_overlap."""
    overlap = evaluation_overlap(config)
    if overlap.num_too_short:
        message = "decontaminate: %d of %d evaluation texts have fewer than %d words (shortest) and are not looked for"
        log.get().warning(message, overlap.num_too_short, overlap.num_texts, config.shortest)


@lru_cache(maxsize=1)
def evaluation_overlap(config: DecontaminateConfig) -> Overlap:
    """Return the index of the evaluation sets, read once per process.

    Raises: InputError with the first evaluation records that give no text.
    """
    bad: list[Problem] = []
    wanted = [text for file in evaluation_files(config) for text, _ in read_texts(file, sources.read_records(file), Counter(), bad)]
    fix = "correct it, or decontaminate.against names another field of its records"
    problems = [dataclasses.replace(problem, fix=fix) for problem in bad[:SHOWN]]
    if len(bad) > SHOWN:
        problems.append(Problem("decontaminate.against", f"{len(bad)} records without a text", "none"))
    raise_problems(problems)
    if not wanted:
        raise InputError(Problem("decontaminate.against", "no text", "at least one text"))
    return decontaminate.overlap(wanted, config.ngram, config.shortest)


def _is_drawn(recipe: Recipe, file: Input, number: int, text: str, group: str | None, without: Without) -> bool:
    if group is None:
        return True
    assert file.limits is not None
    limit = file.limits.get(group)
    if limit is not None and sample.lot(text, recipe.seed, recipe.source) <= limit:
        return True
    without.records.append((number, "sample"))
    return False


def _keys(texts: Sequence[str], kind: Literal["none", "exact", "minhash"]) -> np.ndarray:
    """Return the dedup key of each text, uint64 [texts, numbers per key]."""
    if kind == "none" or not texts:
        return np.zeros((len(texts), dedup.KEY_NUMBERS[kind]), np.uint64)
    rows = [dedup.minhash_bands(text) if kind == "minhash" else np.frombuffer(dedup.exact_key(text), np.uint64) for text in texts]
    return np.stack(rows)


def _size_bytes(value: object) -> int:
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size_bytes, value.values()))
    return sum(map(_size_bytes, value)) if isinstance(value, list) else 8
