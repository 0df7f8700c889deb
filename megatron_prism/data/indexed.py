"""Write, verify and read Megatron's .bin/.idx pair, byte for byte as Megatron-Core's IndexedDatasetBuilder writes it.

The .bin holds the tokens of all documents, concatenated. The .idx, little endian: 9 bytes of magic, u64 version, u8 type
code, u64 sequences S, u64 boundaries D+1; then S int32 lengths in tokens, S int64 offsets in bytes, D+1 int64 document
boundaries. One document is one sequence here, so S = D.
Source: megatron/core/datasets/indexed_dataset.py (0.16.1).
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_prism.core import disk
from megatron_prism.core.errors import InputError, Problem

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[np.dtype, int] = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
UINT16_BELOW = 65500  # Megatron-Core's DType.optimal_dtype


@dataclass(frozen=True)
class Held:
    """The contents of a verified pair."""

    num_documents: int
    num_tokens: int
    dtype: np.dtype


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype for tokens of a vocabulary: uint16 below 65500 entries, int32 from there."""
    return np.dtype(np.uint16 if vocab_size < UINT16_BELOW else np.int32)


def bin_path(prefix: Path) -> Path:
    """Return the token file of a prefix (a prefix may contain dots)."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Return the index file of a prefix."""
    return prefix.with_name(prefix.name + ".idx")


class Writer:
    """Write one pair, as a context manager. On a clean exit .bin, then .idx appear whole. After an exception, or without a document, neither does."""

    def __init__(self, prefix: Path, dtype: np.dtype):
        self.prefix, self.dtype = prefix, dtype
        self._lengths: list[np.ndarray] = []
        self._parts = [_part(bin_path(prefix)), _part(idx_path(prefix))]

    def __enter__(self) -> Writer:
        self._stream = self._parts[0].open("wb")
        return self

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their tokens, concatenated, and the number of tokens of each."""
        assert tokens.size == lengths.sum() and lengths.max(initial=0) <= np.iinfo(np.int32).max
        self._stream.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.append(lengths.astype(np.int32))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            is_written = kind is None and self._lengths
            with self._stream:
                if is_written:
                    _sync(self._stream)
            if is_written:
                self._write_index()
                self._parts[0].replace(bin_path(self.prefix))
                self._parts[1].replace(idx_path(self.prefix))
        finally:
            for part in self._parts:
                part.unlink(missing_ok=True)

    def _write_index(self) -> None:
        lengths = np.concatenate(self._lengths)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        with self._parts[1].open("wb") as stream:
            stream.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], lengths.size, lengths.size + 1))
            stream.write(lengths.tobytes())
            stream.write((ends - lengths * np.int64(self.dtype.itemsize)).tobytes())
            stream.write(np.arange(lengths.size + 1, dtype=np.int64).tobytes())
            _sync(stream)


def verify(prefix: Path) -> Held:
    """Check that a pair's sizes, offsets and counts agree with each other and with the .bin's length; return its contents.

    Raises: InputError naming the file at fault.
    """
    index, tokens = idx_path(prefix), bin_path(prefix)
    for path in (tokens, index):
        if not path.is_file():
            raise InputError(Problem(str(path), "no such file", "the .bin and the .idx of a prepared source"))
    dtype, num_sequences, num_boundaries = _header(index)
    data = index.read_bytes()
    lengths = np.frombuffer(data, np.int32, num_sequences, HEADER.size).astype(np.int64)
    offsets = np.frombuffer(data, np.int64, num_sequences, HEADER.size + 4 * num_sequences)
    boundaries = np.frombuffer(data, np.int64, num_boundaries, HEADER.size + 12 * num_sequences)
    itemsize = dtype.itemsize
    if (lengths < 1).any() or not np.array_equal(offsets, (np.cumsum(lengths) - lengths) * itemsize):
        found = "offsets that are not the running sum of the lengths"
        raise InputError(Problem(str(index), found, "each sequence to start where the last one ends"))
    if not np.array_equal(boundaries, np.arange(num_sequences + 1)):
        raise InputError(Problem(str(index), "document boundaries that miss sequences", f"one document a sequence, 0 to {num_sequences}"))
    num_tokens = int(lengths.sum())
    if tokens.stat().st_size != num_tokens * itemsize:
        required = f"{num_tokens * itemsize}: {num_tokens} tokens of {itemsize} bytes in {index.name}"
        raise InputError(Problem(str(tokens), f"{tokens.stat().st_size} bytes", required))
    return Held(num_sequences, num_tokens, dtype)


def _header(index: Path) -> tuple[np.dtype, int, int]:
    """Return an index's token dtype, number of sequences and number of boundaries. Check the file's length against them.

    Raises: InputError naming the file.
    """
    file_bytes = index.stat().st_size
    with index.open("rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        raise InputError(Problem(str(index), f"{file_bytes} bytes", f"at least the {HEADER.size} bytes of a header"))
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(head)
    dtype = {code: dtype for dtype, code in CODES.items()}.get(code)
    if magic != MAGIC or version != 1 or dtype is None:
        raise InputError(Problem(str(index), f"magic {magic!r}, version {version}, type code {code}", f"{MAGIC!r}, 1, and 8 or 4"))
    size_bytes = HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if file_bytes != size_bytes:
        required = f"{size_bytes} for {num_sequences} sequences and {num_boundaries} boundaries"
        raise InputError(Problem(str(index), f"{file_bytes} bytes", required))
    return dtype, num_sequences, num_boundaries


class Reader:
    """Several pairs as one: tokens and documents by position. Files are memory-mapped, so only what is read takes memory.

    The reader checks nothing that `verify` checks: the pairs were verified when they were written.
    """

    def __init__(self, prefixes: Sequence[Path]):
        assert prefixes
        disk.allow_open_files(2 * len(prefixes))  # each map holds its file open
        self._tokens, self._starts = [], []
        for prefix in prefixes:
            dtype, num_documents, _ = _header(idx_path(prefix))
            self._tokens.append(np.memmap(bin_path(prefix), dtype, mode="r"))
            offset = HEADER.size + 4 * num_documents
            self._starts.append(np.memmap(idx_path(prefix), np.int64, mode="r", offset=offset, shape=(num_documents,)))
        # where each pair begins in tokens and in documents, and where the last one ends
        self._token_ends = [0, *accumulate(tokens.size for tokens in self._tokens)]
        self._document_ends = [0, *accumulate(starts.size for starts in self._starts)]
        self.num_tokens, self.num_documents = self._token_ends[-1], self._document_ends[-1]

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of a token, of the first pair."""
        return self._tokens[0].dtype

    def tokens(self, offset: int, count: int) -> np.ndarray:
        """Return `count` tokens from `offset` on. After the last pair the first follows again."""
        parts = []
        while count:
            pair = bisect_right(self._token_ends, offset) - 1
            first = offset - self._token_ends[pair]
            part = self._tokens[pair][first : first + count]
            parts.append(part)
            offset, count = (offset + part.size) % self.num_tokens, count - part.size
        return np.concatenate(parts)

    def document(self, offset: int) -> tuple[int, int]:
        """Return (document, token within it) of the token at an offset."""
        pair = bisect_right(self._token_ends, offset) - 1
        start = (offset - self._token_ends[pair]) * self._tokens[pair].itemsize
        document = bisect_right(self._starts[pair], start) - 1  # np.searchsorted would copy the whole unaligned index
        within = (start - int(self._starts[pair][document])) // self._tokens[pair].itemsize
        return self._document_ends[pair] + document, within

    def pair(self, document: int) -> tuple[int, int]:
        """Return (pair, document within it) of a document."""
        pair = bisect_right(self._document_ends, document) - 1
        return pair, document - self._document_ends[pair]

    def start(self, document: int) -> int:
        """Return the offset of a document's first token, the inverse of `document`. For num_documents: the end of the last one."""
        if document == self.num_documents:
            return self.num_tokens
        pair, within = self.pair(document)
        start = int(self._starts[pair][within])
        return self._token_ends[pair] + start // self._tokens[pair].itemsize

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each document (int64)."""
        ends = [np.append(starts[1:] // tokens.itemsize, tokens.size) for starts, tokens in zip(self._starts, self._tokens, strict=True)]
        return np.concatenate(
            [end - starts // tokens.itemsize for end, starts, tokens in zip(ends, self._starts, self._tokens, strict=True)]
        )

    def document_ids(self, offset: int, count: int) -> np.ndarray:
        """Return the document of each of `count` tokens from `offset` on, numbered from 0 (int32). The end of the last pair ends a document."""
        begins, done = np.zeros(count, np.int32), 0
        while done < count:
            pair = bisect_right(self._token_ends, offset) - 1
            starts, itemsize, first = self._starts[pair], self._tokens[pair].itemsize, offset - self._token_ends[pair]
            size = min(count - done, self._tokens[pair].size - first)
            low, high = (bisect_left(starts, token * itemsize) for token in (first, first + size))
            begins[done + np.asarray(starts[low:high]) // itemsize - first] = 1
            offset, done = (offset + size) % self.num_tokens, done + size
        begins[:1] = 0
        return np.cumsum(begins, dtype=np.int32)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync(stream: object) -> None:
    stream.flush()  # type: ignore[attr-defined]
    os.fsync(stream.fileno())  # type: ignore[attr-defined]
