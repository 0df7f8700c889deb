"""Best-fit decreasing against a naive one, on lengths of any kind; a packing on disk, and the sequences it makes."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prism.core.errors import InputError
from megatron_prism.data import indexed, packed
from megatron_prism.prepare import packing

Pieces = list[tuple[int, int, int]]


def chunks(lengths: list[int], seq_length: int, overlap: int) -> Pieces:
    """The paper's chunks, one after the other until the document ends."""
    found = []
    for document, length in enumerate(lengths):
        start = 0
        while start + seq_length < length:
            found.append((document, start, seq_length))
            start += seq_length - overlap
        found.append((document, start, length - start))
    return found


def naive(pieces: Pieces, seq_length: int) -> list[int]:
    """Each bin's remaining room, every bin tried for every piece."""
    rooms: list[int] = []
    for _, _, length in sorted(pieces, key=lambda piece: -piece[2]):
        fits = [index for index, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[min(fits, key=rooms.__getitem__)] -= length
        else:
            rooms.append(seq_length - length)
    return rooms


def bins_of(found: packing.Packed) -> list[Pieces]:
    pieces = list(zip(found.document.tolist(), found.start.tolist(), found.length.tolist(), strict=True))
    return [pieces[first:end] for first, end in zip(found.bin_starts[:-1].tolist(), found.bin_starts[1:].tolist(), strict=True)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Bins of a few tokens, so that sizes repeat, and of some thousands, so that most rooms differ."""
    seq_length = draw(st.one_of(st.integers(1, 40), st.integers(1000, 3000)))
    lengths = draw(st.lists(st.one_of(st.integers(1, seq_length), st.integers(1, 3 * seq_length + 2)), max_size=200))
    return lengths, seq_length, draw(st.integers(0, seq_length - 1 if seq_length <= 40 else 400)) if draw(st.booleans()) else 0


@settings(deadline=None)
@given(problems())
def test_rooms_are_those_of_naive_best_fit_decreasing(problem: tuple[list[int], int, int]) -> None:
    lengths, seq_length, overlap = problem
    pieces = chunks(lengths, seq_length, overlap)
    found = packing.pack(np.array(lengths, np.int32), seq_length, overlap)
    bins = bins_of(found)
    assert sorted(seq_length - sum(length for _, _, length in pieces) for pieces in bins) == sorted(naive(pieces, seq_length))
    assert sorted(piece for pieces in bins for piece in pieces) == pieces
    assert all(bin == sorted(bin, key=lambda piece: -piece[2]) for bin in bins)
    assert found.num_bins == len(bins) and found.num_tokens == sum(length for _, _, length in pieces)
    assert found.efficiency == (found.num_tokens / (found.num_bins * seq_length) if bins else 0)


@settings(deadline=None)
@given(problems())
def test_every_token_is_in_one_piece_or_in_the_overlap_of_two(problem: tuple[list[int], int, int]) -> None:
    lengths, seq_length, overlap = problem
    found = packing.pack(np.array(lengths, np.int64), seq_length, overlap)
    spans = sorted(piece for pieces in bins_of(found) for piece in pieces)
    for document, length in enumerate(lengths):
        own = [(start, start + size) for number, start, size in spans if number == document]
        assert own[0][0] == 0 and own[-1][1] == length
        assert all(end - start == seq_length for start, end in own[:-1])
        assert all(after[0] == before[1] - overlap and after[1] > before[1] for before, after in pairwise(own))


def test_chunks_are_the_papers_and_pieces_of_a_bin_stand_as_they_were_put() -> None:
    found = packing.pack(np.array([3, 23, 5, 2, 5, 9]), seq_length=10, overlap=2)  # 23: from 0, 8 and 16
    assert bins_of(found) == [[(1, 0, 10)], [(1, 8, 10)], [(5, 0, 9)], [(1, 16, 7), (0, 0, 3)], [(2, 0, 5), (4, 0, 5)], [(3, 0, 2)]]
    assert found.length.dtype == np.int32 and found.document.dtype == found.start.dtype == found.bin_starts.dtype == np.int64


def test_many_documents_are_packed_in_seconds() -> None:
    """Half of them fill more than half a bin, so that some 150,000 bins are open."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 131072, 300_000)
    began = time.perf_counter()
    found = packing.pack(lengths, 131072)
    assert time.perf_counter() - began < 20
    assert found.num_tokens == lengths.sum() and found.efficiency > 0.99


# On disk

LENGTHS, SEQ_LENGTH, PAD = [5, 40, 1, 17, 30], 16, 65000


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A pair whose every token is its own place, packed with an overlap of 3."""
    prefix = tmp_path / "a.train"
    with indexed.Writer(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.arange(sum(LENGTHS)), np.array(LENGTHS))
    packed.save(packing.pack(np.array(LENGTHS), SEQ_LENGTH, 3), prefix)
    return prefix


def reader(prefix: Path) -> packed.PackedReader:
    return packed.PackedReader(indexed.Reader([prefix]), prefix, SEQ_LENGTH, PAD)


def test_sequences_hold_the_documents_tokens_and_padding_of_its_own(prefix: Path) -> None:
    found, firsts = reader(prefix), np.cumsum(LENGTHS) - LENGTHS
    bins = bins_of(packing.pack(np.array(LENGTHS), SEQ_LENGTH, 3))
    assert len(found) == len(bins) > 3
    for number, pieces in enumerate(bins):
        tokens, documents, loss_mask = found.sequence(number)
        assert (tokens.dtype, documents.dtype, loss_mask.dtype) == (np.int64, np.int32, np.float32)
        wanted = [firsts[document] + start + token for document, start, length in pieces for token in range(length)]
        padding = SEQ_LENGTH - len(wanted)
        assert tokens.tolist() == wanted + [PAD] * padding
        assert documents.tolist() == [index for index, (*_, length) in enumerate(pieces) for _ in range(length)] + [len(pieces)] * padding
        assert loss_mask.tolist() == [token + 1 < length for *_, length in pieces for token in range(length)] + [0] * padding
    assert any(len(pieces) > 1 for pieces in bins) and Counter(document for pieces in bins for document, *_ in pieces)[1] == 3


def test_the_files_are_mapped(prefix: Path) -> None:
    found = reader(prefix)
    assert isinstance(found._pieces, np.memmap) and isinstance(found._bins, np.memmap)
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["a.train.bin", "a.train.bins.npy", "a.train.idx", "a.train.pieces.npy"]


def bins(values: list[int]) -> bytes:
    return saved(np.array(values, np.int64))


def saved(values: np.ndarray) -> bytes:
    from io import BytesIO

    stream = BytesIO()
    np.save(stream, values)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "damage", "found"),
    [
        ("pieces", lambda data: data[:-1], ""),
        ("pieces", lambda data: data + b"\0", "bytes"),
        ("pieces", lambda data: b"", ""),
        ("pieces", lambda data: b"PK\x03\x04" + data, ""),
        ("pieces", lambda data: saved(np.zeros(10)), "float64 of shape"),
        ("pieces", lambda data: saved(np.zeros((10, 1), packed.PIECE)), r"of shape \(10, 1\)"),
        ("bins", lambda data: data[:70] + b"(" + data[71:], ""),
        ("bins", lambda data: saved(np.array([{}])), "Array can't be memory-mapped: Python objects in dtype"),
        ("bins", lambda data: saved(np.arange(10, dtype=np.int32)), "int32 of shape"),
        ("bins", lambda data: bins([]), ""),
        ("bins", lambda data: bins([0]), "do not divide"),
        ("bins", lambda data: bins([1, 2, 10]), "do not divide"),
        ("bins", lambda data: bins([0, 2, 2, 10]), "do not divide"),
        ("bins", lambda data: bins([0, 5, 4, 10]), "do not divide"),
        ("bins", lambda data: bins([0, 5, 9]), "do not divide"),
        ("bins", lambda data: bins([0, 5, 11]), "do not divide"),
    ],
)
def test_a_damaged_file_is_named_when_it_is_opened(prefix: Path, kind: str, damage, found: str) -> None:
    path = Path(f"{prefix}.{kind}.npy")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"a.train.{kind}.npy: found .*{found}"):
        reader(prefix)


@pytest.mark.parametrize("kind", ["pieces", "bins"])
def test_a_missing_file_is_named(prefix: Path, kind: str) -> None:
    Path(f"{prefix}.{kind}.npy").unlink()
    with pytest.raises(InputError, match=f"a.train.{kind}.npy: found no such file"):
        reader(prefix)


@pytest.mark.parametrize(
    "piece", [(5, 0, 1), (-1, 0, 1), (2, 0, 2), (2, 1, 1), (2, -1, 1), (4, 2**62, 2**30), (1, 0, 17), (1, 0, 0), (1, 5, -2)]
)
def test_a_piece_that_is_not_the_pairs_is_named_when_it_is_read(prefix: Path, piece: tuple[int, int, int]) -> None:
    values = np.load(packed.pieces_path(prefix))
    values[2] = piece
    np.save(packed.pieces_path(prefix), values)
    found = reader(prefix)
    number = int(np.searchsorted(found._bins, 2, side="right")) - 1
    with pytest.raises(
        InputError, match=f"a.train.pieces.npy: sequence {number}: found {piece[2]} tokens of document {piece[0]} from {piece[1]} on"
    ):
        found.sequence(number)
    for other in set(range(len(found))) - {number}:
        found.sequence(other)


def test_a_bin_that_is_overfull_is_named_when_it_is_read(prefix: Path) -> None:
    values = np.load(packed.pieces_path(prefix))
    assert values["length"][-3:].tolist() == [5, 4, 4]
    values[-1] = (4, 0, 8)
    np.save(packed.pieces_path(prefix), values)
    with pytest.raises(InputError, match="found 8 tokens of document 4 from 0 on; required .* of at most 7 tokens"):
        reader(prefix).sequence(6)


def test_a_full_disk_leaves_what_was_there(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path.name: path.read_bytes() for path in prefix.parent.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        packed.save(packing.pack(np.array([1]), SEQ_LENGTH), prefix)
    assert {path.name: path.read_bytes() for path in prefix.parent.iterdir()} == before


def test_a_save_that_stops_between_its_files_is_seen(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten pieces again, but others: old bins beside them would pass every check."""
    replace = Path.replace

    def stop_at_bins(path: Path, target: Path) -> Path:
        if target == packed.bins_path(prefix):
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stop_at_bins)
    with pytest.raises(KeyboardInterrupt):
        packed.save(packing.pack(np.array([2] * 10), SEQ_LENGTH), prefix)
    with pytest.raises(InputError, match=r"a.train.bins.npy: found no such file"):
        reader(prefix)
    assert not list(prefix.parent.glob(".*"))
