from __future__ import annotations

import itertools
import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prism.prepare import dedup, duplicates


def words(start: int, count: int) -> str:
    return " ".join(f"w{index}" for index in range(start, start + count))


def num_shared(first: str, second: str) -> int:
    return int((dedup.minhash_bands(first) == dedup.minhash_bands(second)).sum())


def test_keys_are_the_same_everywhere_and_always() -> None:
    # What earlier shards kept was written down: a change of a library or of a constant is an error, not a miss.
    assert dedup.exact_key("a").hex() == "27c35e6e9373877f29e562464e46497e"
    bands = dedup.minhash_bands("The quick brown fox jumps over")
    assert bands.dtype == np.uint64 and bands.shape == (14,)
    assert bands[:3].tolist() == [14429053601690807789, 12932984036718969075, 14256653170713519905]


def test_minhash_reads_runs_of_five_words() -> None:
    text = "The quick, brown fox jumps over the lazy dog; twice!"
    assert num_shared(text, "the QUICK brown\n\nfox (jumps) over the lazy dog twice") == 14
    assert num_shared(text, "the quick brown fox over jumps the lazy dog twice") == 0  # the same words, no run of five
    assert num_shared(text + " and on", text + " and on") == 14
    assert num_shared("one two three", "One, two: three!") == 14 and num_shared("one two three", "one two") == 0
    assert num_shared("!!!", "???") == num_shared("", "!") == 0 and num_shared("!!!", "!!!") == 14
    assert num_shared("a b c d e x y z a b c d e", "a b c d e x y z a b c d e x y z a b c d e") == 14  # a set: how often is no matter


def test_a_key_is_both_of_its_numbers_and_a_band_its_own(tmp_path: Path) -> None:
    """Half of a text's key, and the hash of another band, are no key."""
    exact = [np.array([[5, 1], [5, 2]], np.uint64), np.array([[5, 1]], np.uint64)]
    assert duplicates.find(exact, "exact", tmp_path / "a").tolist() == [False, False, True]
    bands = np.arange(28, dtype=np.uint64).reshape(2, 14)
    bands[1, 3] = bands[0, 4]
    assert not duplicates.find([bands], "minhash", tmp_path / "b").any()
    bands[1, 4] = bands[0, 4]
    assert duplicates.find([bands], "minhash", tmp_path / "c").tolist() == [False, True]


def test_long_text_in_pieces_is_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = words(0, 1000)
    whole = dedup.minhash_bands(text)
    monkeypatch.setattr(dedup, "PIECE", 100)
    assert (dedup.minhash_bands(text) == whole).all() and num_shared(text, words(0, 104)) < 14


def test_shingles_differ_as_runs_of_words_do(shared_data: Path) -> None:
    text = (shared_data / "wikitext2_valid.txt").read_text("utf-8")[:400_000]
    found = dedup.WORD.findall(text.lower())
    runs = {tuple(found[start : start + 5]) for start in range(len(found) - 4)}
    hashes = set(dedup._shingles(text).tolist())
    assert max(hashes) < 2**32
    assert len(runs) - 5 <= len(hashes) <= len(runs)  # by chance 0.6 of 70,000 pairs of 2**32 meet


@pytest.mark.parametrize("num_common", [75, 82, 87])
def test_chance_to_share_a_band_is_the_formula(num_common: int) -> None:
    num_pairs, size = 600, 100  # shingles of each text
    similarity = num_common / (2 * size - num_common)
    shared = []
    for pair in range(num_pairs):
        common = words(1000 * pair, num_common + 4)
        rest = size - num_common
        shared.append(num_shared(f"{common} {words(1000 * pair + 300, rest)}", f"{common} {words(1000 * pair + 600, rest)}"))
    expected = 1 - (1 - similarity**8) ** 14
    error = abs(np.mean(np.array(shared) > 0) - expected)
    tolerance = 4 * (expected * (1 - expected) / num_pairs) ** 0.5
    assert error < tolerance
    for rows in (7, 9):  # the tolerance is narrow enough to tell a row more or less
        assert abs(1 - (1 - similarity**rows) ** 14 - expected) > tolerance
    assert abs(np.mean(shared) - 14 * similarity**8) < 0.25


NUMBERS = st.sampled_from([0, 1, 2, 15, 16, 2**60, 2**63, 2**64 - 1])  # few, so that they meet; and what shifts could mix


@pytest.mark.parametrize(("kind", "num_keys"), [("exact", 2), ("minhash", 14)])
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_duplicates_are_what_a_plain_comparison_says(kind: Any, num_keys: int, data: st.DataObject) -> None:
    # In minhash a document has two of its numbers from the few, the others its own: else nearly all would be alike.
    documents = data.draw(st.lists(st.tuples(NUMBERS, NUMBERS, st.integers(0, num_keys - 1)), max_size=40))
    rows = np.arange(len(documents) * num_keys, dtype=np.uint64).reshape(-1, num_keys) + np.uint64(2**20)
    for row, (first, second, place) in zip(rows, documents, strict=True):
        row[place], row[place - 1] = first, second
    again = [
        number
        for number, row in enumerate(rows)
        if any((row == other).all() if kind == "exact" else (row == other).any() for other in rows[:number])
    ]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    shards = [rows[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(rows)])]
    memory_bytes = data.draw(st.sampled_from([2_000, 20_000, 1 << 20]))  # of 20 entries at a time, of 200, of all
    with tempfile.TemporaryDirectory() as folder:
        found = duplicates.find(shards, kind, Path(folder) / "scratch", memory_bytes)
        assert np.flatnonzero(found).tolist() == again and not list(Path(folder).iterdir())


def test_duplicates_of_any_number_of_documents_are_found_in_bounded_memory(tmp_path: Path) -> None:
    """Every key once more, and one text that is everywhere: as many bytes of keys as would be 20 times the memory that is allowed."""
    draw = np.random.default_rng(1)
    half = draw.integers(0, 2**64, (20_000, 14), dtype=np.uint64)
    half[::7] = half[0]
    keys, memory_bytes = [half, half], 2 << 20
    tracemalloc.start()
    try:
        again = duplicates.find(keys, "minhash", tmp_path / "scratch", memory_bytes)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert again[20_000:].all() and np.flatnonzero(again[:20_000]).tolist() == list(range(7, 20_000, 7))
    assert 2 * half.size * duplicates.SORT_BYTES > 20 * memory_bytes and peak_bytes < 2 * memory_bytes


def test_more_files_than_may_be_open_are_dealt_in_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keys of 8 files, of which 2 may be open: the keys are read 4 times."""
    monkeypatch.setattr(duplicates, "OPEN_FILES", 2)
    keys = np.random.default_rng(2).integers(0, 2**64, (200, 2), dtype=np.uint64)
    found = duplicates.find([keys, keys], "exact", tmp_path / "scratch", 400 * duplicates.SORT_BYTES // 4)
    assert np.flatnonzero(found).tolist() == list(range(200, 400))


def test_real_texts_are_kept_once(shared_data: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["answer"] for line in (shared_data / "gsm8k_test.jsonl").read_text("utf-8").splitlines()]
    copies = [text.upper().replace("\n", " - ") for text in texts]
    exact = np.stack([np.frombuffer(dedup.exact_key(text), np.uint64) for text in texts + copies])
    assert np.flatnonzero(duplicates.find([exact, exact], "exact", tmp_path / "a")).tolist() == list(range(2 * len(texts), 4 * len(texts)))
    bands = [np.stack([dedup.minhash_bands(text) for text in part]) for part in (texts, copies)]
    assert np.flatnonzero(duplicates.find(bands, "minhash", tmp_path / "b")).tolist() == list(range(len(texts), 2 * len(texts)))
