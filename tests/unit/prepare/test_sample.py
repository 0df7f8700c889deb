from __future__ import annotations

import pickle
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from megatron_prism.prepare import sample

Texts = list[tuple[str, str]]  # group, text


def drawn(texts: Texts, counts: dict[str, int], seed: int = 1) -> tuple[Texts, dict[str, int]]:
    draw = sample.Draw(counts)
    for group, text in texts:
        draw.add(group, sample.lot(text, seed, "s"))
    limits, different = draw.limits(), dict.fromkeys(texts)  # `sample` comes with dedup
    return [(group, text) for group, text in different if sample.lot(text, seed, "s") <= limits.get(group, -1)], draw.short()


TEXTS = st.lists(st.tuples(st.sampled_from("abc"), st.text("xyz", max_size=3)), max_size=60)
COUNTS = st.dictionaries(st.sampled_from("abd"), st.integers(1, 12), min_size=1)


@given(TEXTS, COUNTS, st.randoms())
def test_exactly_so_many_different_texts_of_each_group_in_any_order(texts: Texts, counts: dict[str, int], order: random.Random) -> None:
    kept, short = drawn(texts, counts)
    different = {group: {text for other, text in texts if other == group} for group in counts}
    assert Counter(group for group, _ in kept) == Counter({group: min(counts[group], len(different[group])) for group in counts})
    assert len(set(kept)) == len(kept)
    assert short == {group: len(different[group]) for group in counts if len(different[group]) < counts[group]}
    smallest = {group: sorted(different[group], key=lambda text: sample.lot(text, 1, "s"))[: counts[group]] for group in counts}
    assert set(kept) == {(group, text) for group in counts for text in smallest[group]}
    shuffled = order.sample(texts, len(texts))
    assert set(drawn(shuffled, counts)[0]) == set(kept)


def test_every_text_has_the_same_chance() -> None:
    texts = [("a", f"text {index}") for index in range(40)] * 2
    times = Counter(text for seed in range(400) for _, text in drawn(texts, {"a": 10}, seed)[0])
    # 400 draws at 10 of 40: 100 expected, standard deviation 8.7; the first ten, or any fixed ten, would have 400.
    assert len(times) == 40 and all(60 < count < 140 for count in times.values())


def test_lot_depends_on_text_seed_and_source_alone() -> None:
    lots = {sample.lot(text, seed, source) for text in ("a", "b", "") for seed in (1, 2, 12) for source in ("s", "t", "2, 's", "s" * 200)}
    assert len(lots) == 36 and max(lots).bit_length() > 120
    assert sample.lot("a", 1, "s") == 0x345360FD92B57A76F0C480D5C8A7081C  # what was drawn stays drawn


def test_group_nobody_asked_for_is_left_out_and_an_absent_one_is_short() -> None:
    assert drawn([("a", "x"), ("b", "y")], {"a": 1, "z": 2}) == ([("a", "x")], {"z": 0})


def test_memory_is_that_of_the_chosen() -> None:
    draw = sample.Draw({"a": 3})
    for lot in range(1000, 0, -1):
        draw.add("a", lot)
    assert draw.limits() == {"a": 3} and len(pickle.dumps(draw)) < 300
