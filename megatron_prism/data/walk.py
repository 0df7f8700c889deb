"""The walk through a mixture: which tokens each sequence of a run holds. A pure function of the position, without tables in memory.

A source is an endless stream: its tokens, epoch after epoch, cut into chunks of seq_length. Each epoch permutes the chunks that begin in it,
so each token is read once per epoch, whatever seq_length is. Sources alternate by weight: each sequence of a source has a time, spaced by the
weight, and the walk sorts by time. So every stretch of the walk holds each source's share to within a few sequences.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

ROUNDS = 4


class Stream(NamedTuple):
    """A source as the walk sees it. taken: its sequences that were read before this walk begins."""

    name: str
    weight: float
    num_tokens: int
    taken: int = 0


class Place(NamedTuple):
    """The position of a sequence's first token: the source's index, the epoch, the token."""

    source: int
    epoch: int
    offset: int


@dataclass(frozen=True)
class Walk:
    """The sequences of a run from `first_sequence` on: from step to tokens, and back.

    paused: sources that were read before and are not now, with the number of their sequences that were read.
    """

    streams: tuple[Stream, ...]
    seq_length: int
    seed: int
    first_sequence: int = 0
    paused: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        assert self.streams and all(stream.num_tokens > 0 and stream.weight > 0 for stream in self.streams)

    @cached_property
    def _rates(self) -> tuple[int, ...]:
        """The weights as integers."""
        weights = [Fraction(str(stream.weight)) for stream in self.streams]  # 27.5 as written, not as a float holds it
        common = math.lcm(*(weight.denominator for weight in weights))
        return tuple(int(weight * common) for weight in weights)

    @cached_property
    def _periods(self) -> tuple[int, ...]:
        """The time between two sequences of each source, as integers: exact, however long the run."""
        whole = math.lcm(*self._rates)
        return tuple(2 * (whole // rate) for rate in self._rates)  # even, since a source's first sequence is at half its period

    def counts(self, sequence: int) -> tuple[int, ...]:
        """Return the number of sequences of each source before a sequence of the run, counted from this walk's first."""
        wanted = sequence - self.first_sequence
        assert wanted >= 0
        early = 2 * wanted - len(self.streams)  # twice: rounding moves a source by half a sequence at most
        time = max(early * self._periods[0] * self._rates[0] // (2 * sum(self._rates)), 0)
        counts = [self._count(source, time) for source in range(len(self.streams))]
        while sum(counts) < wanted:
            counts[self._next(counts)] += 1
        assert sum(counts) == wanted
        return tuple(counts)

    def _count(self, source: int, time: int) -> int:
        """Return the number of a source's sequences up to and at a time."""
        period = self._periods[source]
        return (time + period // 2) // period

    def _time(self, source: int, number: int) -> int:
        period = self._periods[source]
        return number * period + period // 2

    def _next(self, counts: Sequence[int]) -> int:
        return min(range(len(counts)), key=lambda source: (self._time(source, counts[source]), source))

    def place(self, sequence: int) -> Place:
        """Return where a sequence of the run begins."""
        counts = self.counts(sequence)
        source = self._next(counts)
        stream = self.streams[source]
        number = stream.taken + counts[source]
        epoch = number * self.seq_length // stream.num_tokens
        first, size = self._chunks(stream, epoch)
        chunk = first + permute(number - first, size, self._key(stream.name, epoch))
        return Place(source, epoch, chunk * self.seq_length - epoch * stream.num_tokens)

    def find(self, source: int, epoch: int, offset: int) -> tuple[int, int]:
        """Return (sequence of the run, position in it) of a token, the inverse of `place`. Before the walk's first: negative."""
        stream = self.streams[source]
        assert 0 <= offset < stream.num_tokens
        chunk, position = divmod(epoch * stream.num_tokens + offset, self.seq_length)
        began = chunk * self.seq_length // stream.num_tokens  # a chunk may begin in an epoch and end in the next
        first, size = self._chunks(stream, began)
        number = first + permute(chunk - first, size, self._key(stream.name, began), back=True) - stream.taken
        if number < 0:
            return -1, position
        time = self._time(source, number)
        before = [
            self._count(other, time) - (other > source and self._is_at(other, time))
            for other in range(len(self.streams))
            if other != source
        ]
        return self.first_sequence + number + sum(before), position

    def _is_at(self, source: int, time: int) -> bool:
        period = self._periods[source]
        return time % period == period // 2

    def _chunks(self, stream: Stream, epoch: int) -> tuple[int, int]:
        """Return the first chunk that begins in an epoch, and the number of such chunks."""
        first, end = (-(-number * stream.num_tokens // self.seq_length) for number in (epoch, epoch + 1))
        return first, end - first

    def _key(self, name: str, epoch: int) -> bytes:
        return hashlib.blake2b(f"{self.seed}/{name}/{epoch}".encode(), digest_size=16).digest()

    def changed(self, sequence: int, weights: Mapping[str, float], num_tokens: Mapping[str, int]) -> Walk:
        """Return the walk that continues from a sequence with another mixture. Within an epoch no token of a source is read twice.

        Also a source that leaves the mixture and comes back continues where it was.
        """
        counts = zip(self.streams, self.counts(sequence), strict=True)
        taken = dict(self.paused) | {stream.name: stream.taken + count for stream, count in counts}
        streams = tuple(Stream(name, weight, num_tokens[name], taken.get(name, 0)) for name, weight in weights.items())
        paused = tuple((name, count) for name, count in taken.items() if name not in weights)
        return Walk(streams, self.seq_length, self.seed, sequence, paused)


def permute(index: int, size: int, key: bytes, back: bool = False) -> int:
    """Apply a keyed permutation of range(size) to an index. `back`: apply the inverse.

    A Feistel network over the next power of four, iterated until the value is within range(size): under four rounds on average.
    """
    assert 0 <= index < size
    half = (max(size - 1, 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    rounds = range(ROUNDS - 1, -1, -1) if back else range(ROUNDS)
    while True:
        left, right = index >> half, index & mask
        for number in rounds:
            if back:
                left, right = right ^ (_mix(left, number, key) & mask), left
            else:
                left, right = right, left ^ (_mix(right, number, key) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int, number: int, key: bytes) -> int:
    digest = hashlib.blake2b(value.to_bytes(8, "little") + bytes((number,)), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")
