"""The walk: every token of an epoch once, shares exact, the same whatever the start, a mixture changed on the way."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prism.data.walk import Place, Stream, Walk, permute

PAPER = {
    "math": (55, 15, 10, 10, 10),
    "math_code": (27.5, 13.75, 13.75, 10, 10, 10, 5, 5, 5),
    "math_code_science": (20, 13.75, 13.75, 10, 10, 7.75, 7, 5, 5, 4.75, 3),
}
STEPS, GLOBAL_SIZE, SEQ_LENGTH = 25_000, 128, 8192


@st.composite
def walks(draw: st.DrawFn) -> Walk:
    count = draw(st.integers(1, 5))
    weights = [draw(st.sampled_from([0.5, 1.0, 3.25, 10.0, 27.5, 55.0])) for _ in range(count)]
    tokens = [draw(st.integers(1, 300)) for _ in range(count)]
    taken = [draw(st.integers(0, 50)) for _ in range(count)]
    streams = tuple(Stream(f"s{i}", *values) for i, values in enumerate(zip(weights, tokens, taken, strict=True)))
    return Walk(streams, draw(st.integers(1, 40)), draw(st.integers(0, 3)), draw(st.integers(0, 1000)))


@settings(deadline=None)
@given(size=st.integers(1, 400), key=st.binary(min_size=16, max_size=16))
def test_a_permutation_is_one_and_goes_back(size: int, key: bytes) -> None:
    found = [permute(index, size, key) for index in range(size)]
    assert sorted(found) == list(range(size))
    assert [permute(place, size, key, back=True) for place in found] == list(range(size))


@settings(deadline=None)
@given(walk=walks())
def test_places_are_the_next_ones_of_each_source(walk: Walk) -> None:
    """A source's sequences are its chunks of an epoch, each once, before the next epoch's begin."""
    first = walk.first_sequence
    places = [walk.place(sequence) for sequence in range(first, first + 120)]
    counts = Counter(place.source for place in places)
    assert walk.counts(first + 120) == tuple(counts[source] for source in range(len(walk.streams)))
    for source, stream in enumerate(walk.streams):
        epochs = [place.epoch for place in places if place.source == source]
        assert epochs == sorted(epochs)
        by_epoch = {epoch: [place.offset for place in places if place[:2] == (source, epoch)] for epoch in set(epochs)}
        for epoch, offsets in by_epoch.items():
            every = {
                chunk * walk.seq_length - epoch * stream.num_tokens
                for chunk in range(-(-(epoch + 1) * stream.num_tokens // walk.seq_length))
            }
            every = {offset for offset in every if offset >= 0}
            assert len(offsets) == len(set(offsets)) and set(offsets) <= every
            if min(epochs) < epoch < max(epochs):
                assert set(offsets) == every


@settings(deadline=None)
@given(walk=walks(), sequence=st.integers(0, 10**7), position=st.integers(0, 39))
def test_any_token_is_found_again(walk: Walk, sequence: int, position: int) -> None:
    sequence, position = walk.first_sequence + sequence, position % walk.seq_length
    place = walk.place(sequence)
    epochs, offset = divmod(place.offset + position, walk.streams[place.source].num_tokens)
    assert walk.find(place.source, place.epoch + epochs, offset) == (sequence, position)


@pytest.mark.parametrize(("num_tokens", "seq_length"), [(103, 10), (100, 10), (7, 10), (97, 1), (1000, 999)])
def test_each_token_is_read_once_an_epoch(num_tokens: int, seq_length: int) -> None:
    walk = Walk((Stream("a", 100.0, num_tokens),), seq_length, seed=0)
    epochs = 6
    stream = Counter()
    for sequence in range(-(-epochs * num_tokens // seq_length) + seq_length + 2):
        place = walk.place(sequence)
        start = place.epoch * num_tokens + place.offset
        stream.update(range(start, start + seq_length))
    assert set(stream.values()) == {1}
    assert set(range(epochs * num_tokens)) <= stream.keys()


@pytest.mark.parametrize("mixture", PAPER)
def test_the_papers_blends_are_exact_at_their_budget(mixture: str) -> None:
    """26.2 billion tokens, planned: every source within 0.01% of its weight, and every step close to the blend."""
    weights = PAPER[mixture]
    walk = Walk(tuple(Stream(f"s{i}", weight, 10**9) for i, weight in enumerate(weights)), SEQ_LENGTH, seed=1)
    total = STEPS * GLOBAL_SIZE
    counts = walk.counts(total)
    assert sum(counts) == total
    assert all(abs(count / total * 100 - weight) < 0.01 for count, weight in zip(counts, weights, strict=True))
    assert all(abs(count - Fraction(str(weight)) * total / 100) <= 2 for count, weight in zip(counts, weights, strict=True))
    for step in (0, 1, 12_345, STEPS - 1):
        first, last = walk.counts(step * GLOBAL_SIZE), walk.counts((step + 1) * GLOBAL_SIZE)
        assert all(abs(b - a - weight * GLOBAL_SIZE / 100) <= 2 for a, b, weight in zip(first, last, weights, strict=True))


@settings(deadline=None)
@given(walk=walks(), sequence=st.integers(0, 300), weights=st.lists(st.sampled_from([1.0, 2.5, 40.0]), min_size=3, max_size=3))
def test_a_changed_mixture_goes_on_where_the_first_stopped(walk: Walk, sequence: int, weights: list[float]) -> None:
    """One source stays, one comes, the others go: what stays is read on as if nothing had changed."""
    sequence += walk.first_sequence
    changed = walk.changed(
        sequence, dict(zip(("new", "s0", "later"), weights, strict=True)), {"new": 50, "later": 9, "s0": walk.streams[0].num_tokens}
    )
    alone = Walk((walk.streams[0],), walk.seq_length, walk.seed)
    before = [place for place in map(walk.place, range(walk.first_sequence, sequence)) if place.source == 0]
    after = [Place(0, *place[1:]) for place in map(changed.place, range(sequence, sequence + 60)) if place.source == 1]
    assert before + after == [alone.place(number) for number in range(len(before) + len(after))]


def test_a_source_that_leaves_and_comes_back_goes_on_where_it_was() -> None:
    """a, then b for a long time and two changes, then a again: no token of a is read twice before all are read."""
    first = Walk((Stream("a", 1.0, 640), Stream("b", 1.0, 320)), 10, 1)
    without = first.changed(20, {"b": 1.0}, {"b": 320}).changed(30, {"b": 3.0, "c": 1.0}, {"b": 320, "c": 80})
    back = without.changed(50, {"c": 1.0, "a": 1.0}, {"c": 80, "a": 640})
    alone = Walk((Stream("a", 1.0, 640),), 10, 1)
    read = [place[1:] for place in map(first.place, range(20)) if place.source == 0]
    read += [place[1:] for place in map(back.place, range(50, 158)) if place.source == 1]
    assert read == [alone.place(number)[1:] for number in range(64)] and len(set(read)) == 64
    assert dict(back.paused) == {"b": 10 + 10 + 15} and [stream.taken for stream in back.streams] == [5, 10]


def test_sources_seeds_and_epochs_have_orders_of_their_own() -> None:
    def order(seed: int, source: int, epoch: int) -> list[int]:
        walk = Walk((Stream("a", 1.0, 640), Stream("b", 1.0, 640)), 10, seed)
        places = [walk.place(sequence) for sequence in range(256)]
        return [place.offset for place in places if place[:2] == (source, epoch)]

    orders = [order(seed, source, epoch) for seed, source, epoch in itertools.product((0, 1), repeat=3)]
    assert all(sorted(found) == list(range(0, 640, 10)) for found in orders)
    assert len({tuple(found) for found in orders}) == len(orders)


def test_the_order_is_what_it_was() -> None:
    """A run that resumes under a later version must go on in the order in which it began."""
    walk = Walk((Stream("a", 0.1, 1000), Stream("b", 0.3, 777)), 8, 3)
    places = [(1, 0, 96), (0, 0, 296), (1, 0, 144), (1, 0, 728), (1, 0, 424), (0, 0, 784), (1, 0, 368), (1, 0, 248)]
    assert [tuple(walk.place(sequence)) for sequence in range(8)] == places
    assert walk.counts(10**18) == (25 * 10**16, 75 * 10**16)  # weights as they were written: 0.1 and 0.3, not the floats' ratio
