"""Name what a run reads: from (step, rank, sample) to (source, epoch, document, token), and back. Pure arithmetic on the walk and the index."""

from __future__ import annotations

from typing import NamedTuple

from megatron_prism.core.config import BatchConfig
from megatron_prism.data import segments
from megatron_prism.data.indexed import Reader
from megatron_prism.data.loader import Sequences
from megatron_prism.data.packed import PackedReader


class Sample(NamedTuple):
    """A sequence as a rank sees it: the step that metrics.jsonl names (1 is the first), and its number among the rank's own of that step."""

    step: int
    dp_rank: int
    sample: int


class Span(NamedTuple):
    """Tokens of one document in a sequence: which document (from 0), the first of them within it, how many; epoch: passes over the source before."""

    epoch: int
    document: int
    token: int
    num_tokens: int


class Contents(NamedTuple):
    """What a sequence holds."""

    source: str
    spans: tuple[Span, ...]


def sequence_of(sample: Sample, batch: BatchConfig, dp: int) -> int:
    """Return the number of a sequence in its run."""
    per_rank = batch.global_size // dp
    assert sample.step >= 1 and 0 <= sample.dp_rank < dp and 0 <= sample.sample < per_rank
    return (sample.step - 1) * batch.global_size + sample.dp_rank * per_rank + sample.sample


def sample_of(sequence: int, batch: BatchConfig, dp: int) -> Sample:
    """Return who reads a sequence, and when: the way back from `sequence_of`."""
    step, within = divmod(sequence, batch.global_size)
    return Sample(step + 1, *divmod(within, batch.global_size // dp))


def contents(run: Sequences, sequence: int) -> Contents:
    """Return the documents, or parts of them, that a sequence of the run holds, in order."""
    prepared, walk = run.segments[segments.at(run.segments, sequence)]
    place = walk.place(sequence)
    name = walk.streams[place.source].name
    reader = run.reader(prepared.source(name))
    if isinstance(reader, PackedReader):
        return Contents(name, tuple(Span(place.epoch, *piece) for piece in reader.pieces(place.offset // walk.seq_length)))
    return Contents(name, _spans(reader, place.epoch, place.offset, walk.seq_length))


def find(run: Sequences, source: str, epoch: int, document: int, token: int) -> tuple[int, int] | None:
    """Return (sequence, position in it) that holds a token of a source: the way back from `contents`. None: this run does not come to it."""
    ends = [*(segment.walk.first_sequence for segment in run.segments[1:]), None]
    for (prepared, walk), end in zip(run.segments, ends, strict=True):
        names = [stream.name for stream in walk.streams]
        if source in names:
            offset = _offset(run.reader(prepared.source(source)), document, token)
            sequence, position = walk.find(names.index(source), epoch, offset)
            assert sequence >= walk.first_sequence  # what was read before is found in the segments before
            if end is None or sequence < end:
                return sequence, position
    return None


def _offset(reader: Reader | PackedReader, document: int, token: int) -> int:
    if isinstance(reader, Reader):
        return reader.start(document) + token
    number, position = reader.find(document, token)
    return number * reader.seq_length + position


def _spans(reader: Reader, epoch: int, offset: int, count: int) -> tuple[Span, ...]:
    found = []
    while count:
        document, token = reader.document(offset)
        taken = min(count, reader.start(document + 1) - offset)
        found.append(Span(epoch, document, token, taken))
        offset, count = offset + taken, count - taken
        if offset == reader.num_tokens:
            epoch, offset = epoch + 1, 0
    return tuple(found)
