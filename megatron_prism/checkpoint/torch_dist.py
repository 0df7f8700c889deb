"""Single tensors in and out of a Megatron torch_dist checkpoint, without a model: memory holds a piece of a tensor at a time.

torch_dist is torch.distributed.checkpoint's format with Megatron's two marker files (megatron/core/dist_checkpointing/strategies/torch.py):
each chunk of a tensor is a torch.save archive in a .distcp file, and .metadata says where. torch writes and reads everything but
the values; we write and read those at their place in the archive. The zip checksum of the values stays 0, as
torch.serialization.skip_data leaves it: torch.load does not check it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_prism.checkpoint import unpickle
from megatron_prism.core import disk
from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.core.manifest import write_json
from megatron_prism.hf import as_torch, bits

MARKER = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
FILE_BYTES = 4 << 30  # several files, so that a parallel file system spreads a large model


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its key, shape and dtype, known before its values."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def write_tensors(root: Path, specs: Sequence[TensorSpec], values: Callable[[str], Iterable[bits.Bits]]) -> None:
    """Write a torch_dist checkpoint, whole on disk at the end (fsync).

    `values(key)` yields a tensor's values in row-major order, in pieces of any shape. It is called when the tensor's turn comes, not before.
    """
    results, frames = [], {kind: _Frame(*kind) for kind in {(spec.shape, spec.dtype) for spec in specs}}
    for number, group in enumerate(_files(specs)):
        with (root / f"__0_{number}.distcp").open("wb", buffering=0) as stream:
            results += [_append(stream, spec, frames[spec.shape, spec.dtype], values(spec.key)) for spec in group]
            os.fsync(stream.fileno())
    entries: dict[str, Any] = {
        spec.key: TensorStorageMetadata(TensorProperties(spec.dtype), torch.Size(spec.shape), [_whole(spec)]) for spec in specs
    }
    FileSystemWriter(root, sync_files=True).finish(Metadata(entries), [results])
    torch.save({}, root / "common.pt")
    write_json(root / "metadata.json", MARKER)  # last: Megatron takes a folder with this file for complete


def _files(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """Deal the tensors out to files, in order: a new file begins where the last one holds FILE_BYTES."""
    files: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if sum(map(_size_bytes, files[-1])) >= FILE_BYTES:
            files.append([])
        files[-1].append(spec)
    return files


def _size_bytes(spec: TensorSpec) -> int:
    return prod(spec.shape) * spec.dtype.itemsize


def _whole(spec: TensorSpec) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size([0] * len(spec.shape)), sizes=torch.Size(spec.shape))


class _Frame:
    """A torch.save archive without its tensor's values. As the stream of a torch.save, it records the bytes before and after them."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.before, self.after, self.gap_bytes = bytearray(), bytearray(), 0
        with torch.serialization.skip_data():
            torch.save(torch.empty(shape, dtype=dtype), cast(IO[bytes], self))  # never touched, so it takes no memory

    def write(self, data: bytes) -> int:
        (self.after if self.gap_bytes else self.before).extend(data)
        return len(data)

    def seek(self, count: int, whence: int) -> None:
        """Note the gap that torch leaves in place of the values."""
        assert whence == os.SEEK_CUR and not self.gap_bytes
        self.gap_bytes = count

    def flush(self) -> None:
        return None


def _append(stream: FileIO, spec: TensorSpec, frame: _Frame, values: Iterable[bits.Bits]) -> WriteResult:
    """Write one tensor's archive at the end of a file."""
    offset = os.fstat(stream.fileno()).st_size
    end = start = bits.write_at(stream, offset, np.frombuffer(frame.before, np.uint8))
    for piece in values:
        end = bits.write_at(stream, end, piece)
    assert end - start == frame.gap_bytes == _size_bytes(spec), (spec, frame.gap_bytes, end - start)
    length = bits.write_at(stream, end, np.frombuffer(frame.after, np.uint8)) - offset
    return WriteResult(MetadataIndex(spec.key, _whole(spec).offsets, 0), length, _StorageInfo(Path(str(stream.name)).name, offset, length))


class _Archive:
    """A torch.save archive of one tensor in a file: where its values begin, and its pickle, which has shape, dtype and strides."""

    def __init__(self, stream: FileIO, offset: int, length: int):
        self.view = cast(IO[bytes], _create_file_view(stream, offset, length))
        reader: Any = torch._C.PyTorchFileReader(self.view)
        self.values_offset = int(reader.get_record_offset("data/0"))
        self.pickle = bytes(reader.get_record("data.pkl"))

    def describe(self) -> torch.Tensor:
        """Return the tensor without its values."""
        self.view.seek(0)
        return torch.load(self.view, map_location="meta", weights_only=True)


@dataclass(frozen=True)
class _Chunk:
    """A stored box of a tensor: its place in the tensor, its file, and where in it the values begin in row-major order."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stream: FileIO
    start: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, open to be read by rows. One without dimensions has shape (1,) here."""

    where: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]

    def rows(self, start: int, count: int) -> bits.Bits:
        """Return rows [start, start + count).

        Raises: CheckpointError naming the tensor where the checkpoint lacks a part of them.
        """
        values_read, filled = bits.empty((count, *self.shape[1:]), self.dtype.itemsize), 0
        for chunk in self.chunks:
            first, last = max(start, chunk.offsets[0]), min(start + count, chunk.offsets[0] + chunk.sizes[0])
            if first < last:
                columns = (slice(offset, offset + size) for offset, size in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
                target = values_read[(slice(first - start, last - start), *columns)]
                values = target if target.flags.c_contiguous else bits.empty(target.shape, self.dtype.itemsize)
                position = chunk.start + (first - chunk.offsets[0]) * prod(chunk.sizes[1:]) * self.dtype.itemsize
                filled += bits.read_at(chunk.stream, position, values)
                if values is not target:
                    target[...] = values
        if filled != values_read.nbytes:
            raise CheckpointError(Problem(self.where, f"{filled} bytes of rows {start} to {start + count}", f"{values_read.nbytes} bytes"))
        return values_read


class TensorReader:
    """Reads tensors of a torch_dist checkpoint, however they are sharded in it."""

    def __init__(self, root: Path):
        self.root = root
        self._described: dict[bytes, torch.Tensor] = {}  # by its pickle, a stored tensor without its values
        try:
            with disk.reading(root), unpickle.guarded(root):
                self._metadata = FileSystemReader(root).read_metadata()
        except OSError as error:
            raise CheckpointError(Problem(str(root), f"{type(error).__name__}: {error}", "a torch_dist checkpoint")) from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's global shape by key."""
        entries = self._metadata.state_dict_metadata.items()
        return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return every tensor's dtype by key."""
        entries = self._metadata.state_dict_metadata.items()
        return {key: entry.properties.dtype for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def read(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return one tensor; of a padded one the first `shape` part.

        Raises: CheckpointError naming the tensor where it cannot be read.
        """
        with self.open(key) as stored:
            padded = as_torch.to_tensor(stored.rows(0, shape[0] if shape else 1), stored.dtype)
        return padded[tuple(slice(size) for size in shape)].reshape(shape)

    @contextmanager
    def open(self, key: str) -> Iterator[StoredTensor]:
        """Open the files of one tensor.

        Raises: CheckpointError naming the tensor where they are not there, or not what .metadata says.
        """
        entry, where = self._metadata.state_dict_metadata[key], f"{self.root}: {key}"
        assert isinstance(entry, TensorStorageMetadata), key
        with ExitStack() as stack:
            try:
                chunks = tuple(self._open_chunk(key, chunk, entry.properties.dtype, stack) for chunk in entry.chunks)
            except Exception as error:  # torch raises many kinds for a damaged archive
                raise CheckpointError(Problem(where, f"{type(error).__name__}: {error}", "a readable tensor")) from error
            yield StoredTensor(where, tuple(entry.size) or (1,), entry.properties.dtype, chunks)

    def _open_chunk(self, key: str, chunk: ChunkStorageMetadata, dtype: torch.dtype, stack: ExitStack) -> _Chunk:
        place = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        stream = stack.enter_context((self.root / place.relative_path).open("rb", buffering=0))
        archive = _Archive(stream, place.offset, place.length)
        if archive.pickle not in self._described:  # layers are alike
            self._described[archive.pickle] = archive.describe()
        stored = self._described[archive.pickle]
        actual, wanted = (stored.shape, stored.dtype, stored.is_contiguous()), (chunk.sizes, dtype, True)
        if actual != wanted:
            raise ValueError(f"{place.relative_path}: shape, dtype, contiguous: {actual}; .metadata says {wanted}")
        start = place.offset + archive.values_offset + stored.storage_offset() * dtype.itemsize
        return _Chunk(tuple(chunk.offsets) or (0,), tuple(chunk.sizes) or (1,), stream, start)
