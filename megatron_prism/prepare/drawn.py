"""A few texts of files: those with the smallest keyed hashes, whatever the order of the records. A text that comes twice counts once."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappush, heappushpop

from megatron_prism.core.config import PartConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.prepare import documents, records, sources
from megatron_prism.prepare.lines import TooLong
from megatron_prism.prepare.sample import lot
from megatron_prism.prepare.sources import Input

MAX_RECORD_BYTES = 1 << 26


def draw(part: PartConfig, num: int, seed: int, name: str, min_characters: int, where: str) -> tuple[list[str], int]:
    """Return `num` texts of at least min_characters, by their lots, and how many records had such a text. Memory holds those texts.

    name: enters the lots. where: the files' key, for messages.
    Raises: InputError where a file cannot be read, or a record has no text; where there are fewer texts.
    """
    problems: list[Problem] = []
    files = sources.files(part, where, problems)
    raise_problems(problems)
    heap: list[tuple[int, str]] = []  # negated lots: the largest chosen one is on top
    chosen: set[int] = set()
    available = 0
    for text in (text for file in files for text in _texts(file)):
        if len(text.strip()) < min_characters:
            continue
        available += 1
        own = -lot(text, seed, name)
        if own in chosen or (len(heap) == num and own <= heap[0][0]):
            continue
        chosen.add(own)
        if len(heap) < num:
            heappush(heap, (own, text))
        else:
            chosen.remove(heappushpop(heap, (own, text))[0])
    if len(heap) < num:
        fix = "more files, a smaller min_characters, or a smaller num_prompts"
        raise InputError(Problem(where, f"{len(heap)} distinct texts of at least {min_characters} characters", f"{num}", fix))
    return [text for _, text in sorted(heap, reverse=True)], available


def _texts(file: Input) -> Iterator[str]:
    """Yield the text of each record. Empty ones are left out: WikiText has them."""
    for waiting, _ in documents.record_batches(file, max_bytes=MAX_RECORD_BYTES):
        for number, record in waiting:
            if isinstance(record, TooLong):
                raise InputError(Problem(file.place(number), f"a record of {record.num_bytes} bytes", f"at most {MAX_RECORD_BYTES}"))
            try:
                text, _ = records.text_of(record, file.part, file.is_plain)
            except records.BadRecord as error:
                if error.found == records.EMPTY:
                    continue
                raise InputError(Problem(file.place(number + error.line), error.found, error.required)) from None
            assert text is not None  # a part without conditions
            yield text
