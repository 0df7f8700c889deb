"""Cut a source's files into pieces, order them by lot, and hash what is read of them.

A piece is a range of bytes of an uncompressed file of JSON lines (a line belongs to the range that holds its first byte), a range of row groups of
a .parquet file, or a whole file. The lot spreads over all files: any number of pieces from its start holds about the same share of each file.
It depends on the seed, the source's name, and the files' names and sizes, not on where their folder lies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.core.errors import InputError, Problem
from megatron_prism.prepare import pool, recognise
from megatron_prism.prepare.sources import JSON_LINES, Input

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData

SHARE = 2048  # pieces of a source, about, where the bounds allow
LEAST_BYTES, MOST_BYTES = 16 << 10, 64 << 20  # of a piece: the least reads little too much, the most is a shard of some 16 million tokens
BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is read at once. num_bytes: its bytes; of row groups, their share of the file by what they hold uncompressed."""

    file: Input
    num_bytes: int


def whole(file: Input) -> Piece:
    """Return a whole file as a piece."""
    return Piece(file, file.path.stat().st_size)


def piece_bytes(source_bytes: int) -> int:
    """Return the size of a source's pieces: a power of two, so that a source that grows a little is cut as before."""
    share = max(source_bytes // SHARE, 1)
    return min(max(1 << share.bit_length() - 1, LEAST_BYTES), MOST_BYTES)


def in_lot_order(files: Sequence[Input], seed: int, source: str) -> tuple[Piece, ...]:
    """Return a source's files held out, whole, then the pieces of its other files in the order of their lots.

    Of a file's n pieces in their own random order, the k-th has its lot between k / n and (k + 1) / n.
    Raises: InputError naming a .parquet file without a readable footer.
    """
    train = [file for file in files if not file.is_held_out]
    size_bytes = piece_bytes(sum(file.path.stat().st_size for file in train))
    root = os.path.commonpath([file.path.absolute().parent for file in train]) if train else ""
    lots: list[tuple[float, bytes, Piece]] = []
    for file in train:
        name = os.path.relpath(file.path.absolute(), root)
        drawn = [(_draw(seed, source, name, piece.file.span), piece) for piece in _cut(file, size_bytes)]
        drawn.sort(key=lambda pair: pair[0])
        lots += [((place + _fraction(draw)) / len(drawn), draw, piece) for place, (draw, piece) in enumerate(drawn)]
    lots.sort(key=lambda lot: lot[:2])
    return (*(whole(file) for file in files if file.is_held_out), *(piece for _, _, piece in lots))


def sha256(piece: Input) -> str:
    """Return the sha256 of a piece's bytes as hex; of row groups, of the file's footer and their columns' bytes.

    Raises: InputError naming a file that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with piece.path.open("rb") as stream:
            for start, end in _byte_ranges(piece):
                stream.seek(start)
                while start < end and (block := stream.read(min(BLOCK_BYTES, end - start))):
                    digest.update(block)
                    start += len(block)
    except OSError as error:
        raise InputError(Problem(str(piece.path), error.strerror or str(error), "a file that can be read")) from None
    return digest.hexdigest()


def add_sha256(known: dict[str, str], files: Iterable[Input], run: pool.Map[Any, Any]) -> None:
    """Add to `known` the hash of each piece that is not in it, by its name."""
    missing = list({file.name: file for file in files if file.name not in known}.values())
    known.update(zip((file.name for file in missing), run(sha256, missing), strict=True))


def _draw(seed: int, source: str, name: str, span: tuple[int, int] | None) -> bytes:
    return hashlib.blake2b(repr((seed, source, name, span)).encode(), digest_size=16).digest()


def _fraction(draw: bytes) -> float:
    """Return a second random number of a draw, from 0 to below 1: the draw itself is small where its place is early."""
    return int.from_bytes(hashlib.blake2b(draw, digest_size=6).digest(), "big") / 2**48


def _cut(file: Input, size_bytes: int) -> Iterator[Piece]:
    file_bytes = file.path.stat().st_size
    groups = _group_bytes(file.path) if file.path.suffix == ".parquet" and file_bytes > size_bytes else []
    if file.path.suffix in JSON_LINES and file_bytes > size_bytes:
        for start in range(0, file_bytes, size_bytes):
            end = min(start + size_bytes, file_bytes)
            yield Piece(dataclasses.replace(file, span=(start, end)), end - start)
    elif groups:
        first, held, scale = 0, 0.0, file_bytes / max(sum(groups), 1)
        for index, group_bytes in enumerate(groups):
            held += group_bytes * scale
            if held >= size_bytes or index == len(groups) - 1:
                yield Piece(dataclasses.replace(file, span=(first, index + 1)), round(held))
                first, held = index + 1, 0.0
    else:
        yield Piece(file, file_bytes)


def _byte_ranges(piece: Input) -> Iterator[tuple[int, int]]:
    size_bytes = piece.path.stat().st_size
    if piece.span is None:
        yield 0, size_bytes
    elif piece.path.suffix != ".parquet":
        yield piece.span
    else:
        footer = _footer(piece.path)
        yield size_bytes - footer.serialized_size - 8, size_bytes  # 8: the footer's length and the magic number
        for index in range(*piece.span):
            group = footer.row_group(index)
            for column in map(group.column, range(group.num_columns)):
                start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
                yield start, start + column.total_compressed_size


def _group_bytes(path: Path) -> list[int]:
    footer = _footer(path)
    return [footer.row_group(index).total_byte_size for index in range(footer.num_row_groups)]


def _footer(path: Path) -> FileMetaData:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        damaged = Problem(str(path), f"damaged parquet file: {' '.join(str(error).split())}", "a file that can be read to its end")
        raise InputError(recognise.refusal(path) or damaged) from None
