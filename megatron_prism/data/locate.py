"""Map what a run reads: from (step, rank, sample) to (source, epoch, document, token), and back. Pure arithmetic on walk and index."""

from __future__ import annotations

from typing import NamedTuple

from megatron_prism.core.config import BatchConfig
from megatron_prism.data.indexed import Reader
from megatron_prism.data.loader import Sequences
from megatron_prism.data.packed import PackedReader


class Sample(NamedTuple):
    """A sequence as a rank sees it: the step as in metrics.jsonl (from 1), the rank, and the sequence's number on that rank in that step."""

    step: int
    dp_rank: int
    sample: int


class Span(NamedTuple):
    """Tokens of one document in a sequence: the document (from 0), its first token here, their number. epoch: earlier passes over the source."""

    epoch: int
    document: int
    token: int
    num_tokens: int


class Contents(NamedTuple):
    """The contents of a sequence."""

    source: str
    spans: tuple[Span, ...]


def sequence_of(sample: Sample, batch: BatchConfig, dp: int) -> int:
    """Return the number in the run of a rank's sequence."""
    per_rank = batch.global_size // dp
    assert sample.step >= 1 and 0 <= sample.dp_rank < dp and 0 <= sample.sample < per_rank
    return (sample.step - 1) * batch.global_size + sample.dp_rank * per_rank + sample.sample


def sample_of(sequence: int, batch: BatchConfig, dp: int) -> Sample:
    """Return the step, rank and sample that read a sequence: the inverse of `sequence_of`."""
    step, within = divmod(sequence, batch.global_size)
    return Sample(step + 1, *divmod(within, batch.global_size // dp))


def contents(run: Sequences, sequence: int) -> Contents:
    """Return the documents, or parts of documents, in a sequence of the run, in order."""
    _, source, reader, place = run.locate(sequence)
    if isinstance(reader, PackedReader):
        return Contents(source.name, tuple(Span(place.epoch, *piece) for piece in reader.pieces(place.offset // run.seq_length)))
    return Contents(source.name, _spans(reader, place.epoch, place.offset, run.seq_length))


def find(run: Sequences, source: str, epoch: int, document: int, token: int) -> tuple[int, int] | None:
    """Return (sequence, position in it) of a source's token, the inverse of `contents`. None: the run never reads it."""
    ends = [*(segment.walk.first_sequence for segment in run.segments[1:]), None]
    for (prepared, walk), end in zip(run.segments, ends, strict=True):
        names = [stream.name for stream in walk.streams]
        if source in names:
            offset = _offset(run.reader(prepared.source(source)), document, token)
            sequence, position = walk.find(names.index(source), epoch, offset)
            assert sequence >= walk.first_sequence  # the loop over segments has returned earlier sequences already
            if end is None or sequence < end:
                return sequence, position
    return None


def _offset(reader: Reader | PackedReader, document: int, token: int) -> int:
    if isinstance(reader, Reader):
        return reader.start(document) + token
    number, position = reader.find(document, token)
    return number * reader.seq_length + position


def _spans(reader: Reader, epoch: int, offset: int, count: int) -> tuple[Span, ...]:
    spans = []
    while count:
        document, token = reader.document(offset)
        taken = min(count, reader.start(document + 1) - offset)
        spans.append(Span(epoch, document, token, taken))
        offset, count = offset + taken, count - taken
        if offset == reader.num_tokens:
            epoch, offset = epoch + 1, 0
    return tuple(spans)
