from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_prism.core.errors import InputError
from megatron_prism.data import indexed


def write(prefix: Path, documents: list[np.ndarray], dtype: np.dtype, per_chunk: int = 7) -> None:
    with indexed.Writer(prefix, dtype) as writer:
        for start in range(0, len(documents), per_chunk):
            chunk = documents[start : start + per_chunk]
            writer.add(np.concatenate(chunk), np.array([len(document) for document in chunk]))


@pytest.fixture
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 60000, size) for size in rng.integers(1, 300, 100)]


@pytest.mark.parametrize("vocab_size", [512, 65499, 65500, 128256])
def test_bytes_are_those_of_megatron_core(tmp_path: Path, documents: list[np.ndarray], vocab_size: int) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    if vocab_size > 65536:
        documents[0][0] = vocab_size - 1
    if vocab_size < 1000:
        documents = [document % vocab_size for document in documents]
    theirs, ours = tmp_path / "theirs", tmp_path / "our.s"
    builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(f"{theirs}.idx")
    write(ours, documents, indexed.token_dtype(vocab_size))
    for suffix in (".bin", ".idx"):
        assert Path(f"{ours}{suffix}").read_bytes() == Path(f"{theirs}{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["our.s.bin", "our.s.idx", "theirs.bin", "theirs.idx"]

    dataset = IndexedDataset(str(ours))
    assert len(dataset) == len(documents)
    assert all(np.array_equal(dataset[index], document) for index, document in enumerate(documents))
    assert indexed.verify(ours) == indexed.Held(len(documents), sum(map(len, documents)), indexed.token_dtype(vocab_size))


def test_nothing_appears_before_the_end_or_after_an_error(tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    with pytest.raises(RuntimeError, match="stop"), indexed.Writer(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.arange(4), np.array([4]))
        assert not indexed.bin_path(prefix).exists() and not indexed.idx_path(prefix).exists()
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "a", [np.arange(4)], np.dtype(np.uint16))
    assert not list(tmp_path.iterdir())


def patched(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".bin", lambda data: data[:-1]),
        (".bin", lambda data: data + b"\0\0"),
        (".idx", lambda data: data[:20]),
        (".idx", lambda data: data[:-8]),
        (".idx", lambda data: data + b"\0"),
        (".idx", lambda data: patched(data, 0, b"X")),
        (".idx", lambda data: patched(data, 9, b"\2")),
        (".idx", lambda data: patched(data, 17, b"\7")),
        (".idx", lambda data: patched(data, 18, b"\xff" * 8)),
        (".idx", lambda data: patched(data, 34, b"\xff\xff\xff\xff")),
        (".idx", lambda data: patched(data, 34 + 4 * 5, b"\1")),
        (".idx", lambda data: patched(data, len(data) - 8, b"\0")),
    ],
)
def test_verify_names_the_damaged_file(tmp_path: Path, suffix: str, damage) -> None:
    prefix = tmp_path / "a"
    write(prefix, [np.arange(3 + index) for index in range(5)], np.dtype(np.uint16))
    file = Path(f"{prefix}{suffix}")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError) as caught:
        indexed.verify(prefix)
    assert caught.value.problems[0].where == str(file)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_verify_names_the_missing_file(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "a", [np.arange(3)], np.dtype(np.uint16))
    (tmp_path / f"a{suffix}").unlink()
    with pytest.raises(InputError, match=f"a{suffix}: found no such file"):
        indexed.verify(tmp_path / "a")
