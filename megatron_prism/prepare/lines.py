"""Read the records of a text stream, each within a bound. A longer one is skipped while it is read: its size is known, and it is never held."""

from __future__ import annotations

import io
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass, field
from gzip import GzipFile

BLOCK_BYTES, BEGIN_BYTES = 1 << 20, 64
UNBOUNDED = (1 << 62) - 1  # bytes of a record
Stream = io.BufferedReader | GzipFile


@dataclass(frozen=True)
class TooLong:
    """A record over the bound, in its place. num_bytes: its size. begin: its first bytes."""

    num_bytes: int
    begin: bytes = field(default=b"", compare=False)


def records(stream: Stream, split: str, max_bytes: int) -> Iterator[tuple[int, bytes | TooLong]]:
    """Yield each record's bytes with the number of its first line, from 1. Blank lines of a jsonl file are no records.

    split: `line`, `paragraph` (blank lines between records) or `file`. max_bytes: of a record; of a line, without its end.
    """
    if stream.peek(3).startswith(BOM_UTF8):
        stream.read(3)
    if split == "file":
        yield 1, _rest(stream, max_bytes)
    elif split == "paragraph":
        yield from _paragraphs(stream, max_bytes)
    else:
        yield from ((number, line) for number, line in enumerate(_lines(stream, max_bytes), 1) if not _is_blank(line))


def records_of_range(stream: io.BufferedReader, start: int, end: int, max_bytes: int) -> Iterator[tuple[int, bytes | TooLong]]:
    """Yield the lines whose first byte lies in [start, end) of a file, each with the place of that byte. Blank lines are no records."""
    stream.seek(max(start - 1, 0))  # the byte before tells whether a line begins at `start`
    if start == 0:
        position = stream.seek(len(BOM_UTF8) if stream.peek(3).startswith(BOM_UTF8) else 0)
        end = max(end, position + 1)  # the first line is this range's, however small it is
    else:
        position = start - 1 + _skip_line(stream)
    lines = _lines(stream, max_bytes)
    while position < end and (line := next(lines, None)) is not None:
        if not _is_blank(line):
            yield position, line
        position += line.num_bytes if isinstance(line, TooLong) else len(line)


def _lines(stream: Stream, max_bytes: int) -> Iterator[bytes | TooLong]:
    """Yield each line with its end, or its whole size where it is too long."""
    while line := stream.readline(max_bytes + 1):
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield line
        else:
            yield TooLong(len(line) + _skip_line(stream), line[:BEGIN_BYTES])


def _skip_line(stream: Stream) -> int:
    """Read to the end of the line and return the number of bytes read."""
    num_bytes = 0
    while block := stream.readline(BLOCK_BYTES):
        num_bytes += len(block)
        if block.endswith(b"\n"):
            break
    return num_bytes


def _is_blank(line: bytes | TooLong) -> bool:
    return isinstance(line, bytes) and line.isspace()


def _paragraphs(stream: Stream, max_bytes: int) -> Iterator[tuple[int, bytes | TooLong]]:
    held: list[bytes] = []  # the paragraph's lines; none once it is too long
    first = num_bytes = 0  # its first line, and its size (0: no paragraph has begun)
    for number, line in enumerate(_lines(stream, max_bytes), 1):
        if _is_blank(line):
            if num_bytes:
                yield first, _paragraph(held, num_bytes, max_bytes)
            held, num_bytes = [], 0
            continue
        first = first if num_bytes else number
        num_bytes += len(line) if isinstance(line, bytes) else max(line.num_bytes, max_bytes + 1)
        if isinstance(line, bytes) and num_bytes <= max_bytes:
            held.append(line)
        else:
            held = []
    if num_bytes:
        yield first, _paragraph(held, num_bytes, max_bytes)


def _paragraph(held: list[bytes], num_bytes: int, max_bytes: int) -> bytes | TooLong:
    return b"".join(held).rstrip(b"\r\n") if num_bytes <= max_bytes else TooLong(num_bytes)


def _rest(stream: Stream, max_bytes: int) -> bytes | TooLong:
    """Return the rest of a stream, or its size where that is more than max_bytes."""
    blocks: list[bytes] = []
    num_bytes = 0
    while block := stream.read(BLOCK_BYTES):
        num_bytes += len(block)
        if num_bytes <= max_bytes:
            blocks.append(block)
        else:
            blocks.clear()
    return b"".join(blocks) if num_bytes <= max_bytes else TooLong(num_bytes)
