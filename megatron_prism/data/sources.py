"""Read a source's documents, streamed: `.jsonl` and `.txt`, plain or compressed as `.gz` or `.zst`, and the files of columns.py.

A document is train or valid by its file or by its text alone, so neither order nor the number of workers moves it.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_prism.core.config import SourceConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.data import columns

Split = Literal["train", "valid"]
OnBad = Callable[[Problem], None]  # told of each bad record; raising refuses the source, returning skips the record
OpenFile = Callable[[Path], io.BufferedReader]
FORMATS = (".jsonl", ".txt", *columns.FORMATS)
COMPRESSIONS = (".gz", ".zst")
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFiles:
    """The files of one source, in reading order; one held out for validation is not in `train`."""

    train: tuple[Path, ...]
    valid: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """One document's text, and the side of the split it is on."""

    text: str
    split: Split


class _BadRecord(Exception):
    """A record that gives no document: what was found, what is required, and how many lines into the record it stands."""

    def __init__(self, found: str, required: str, line: int = 0):
        self.found, self.required, self.line = found, required, line


def find(sources: Sequence[SourceConfig]) -> tuple[SourceFiles, ...]:
    """Return the files of each source, globs expanded and sorted, a folder of Dataset.save_to_disk as its data files.

    Raises: InputError with every pattern that matches no file, every format not read and every template without a field.
    """
    problems: list[Problem] = []
    found = []
    for index, source in enumerate(sources):
        train = _expand(source.path, f"sources.{index}.path", problems)
        valid = _expand(source.valid_path, f"sources.{index}.valid_path", problems)
        held_out = {path.resolve() for path in valid}
        found.append(SourceFiles(tuple(path for path in train if path.resolve() not in held_out), valid))
        if any(_format(path) != ".txt" for path in train + valid) and not PLACEHOLDER.search(source.text):
            problems.append(Problem(f"sources.{index}.text", repr(source.text), "at least one {field} of the records"))
    raise_problems(problems)
    return tuple(found)


def read(source: SourceConfig, files: SourceFiles, on_bad: OnBad, open_file: OpenFile | None = None) -> Iterator[Document]:
    """Yield the documents of one source in file order; `open_file` opens a file's raw bytes (a progress bar watches there).

    Raises: InputError naming a file that cannot be read or ends in the middle of its compressed stream.
    """
    for path in files.train:
        for text in _texts(path, source, on_bad, open_file or _open_raw):
            yield Document(text, "valid" if is_held_out(text, source.valid_percent) else "train")
    for path in files.valid:
        for text in _texts(path, source, on_bad, open_file or _open_raw):
            yield Document(text, "valid")


def is_held_out(text: str, valid_percent: float) -> bool:
    """Return whether a document is among the valid_percent held out, by a hash of its text: equal texts stay together."""
    if not valid_percent:
        return False
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") * 100 < valid_percent * 2**64


def _expand(patterns: Sequence[str], key: str, problems: list[Problem]) -> tuple[Path, ...]:
    paths: dict[Path, None] = {}  # in order, and a file that two patterns match is read once
    for pattern in patterns:
        if Path(pattern).is_dir():
            try:
                paths |= dict.fromkeys(columns.saved_files(Path(pattern)))
            except InputError as error:
                problems += [dataclasses.replace(problem, where=f"{key}: {problem.where}") for problem in error.problems]
            continue
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            problems.append(Problem(key, f"no file at {pattern!r}", "a file, or a glob that matches files", "correct the path"))
        for path in files:
            if _format(path) not in FORMATS:
                problems.append(Problem(key, str(path), "a .jsonl or .txt file, plain or as .gz or .zst, .parquet, or .arrow"))
        paths |= dict.fromkeys(files)
    return tuple(paths)


def _format(path: Path) -> str:
    """Return the format, without the compression of a text format; a compressed columnar file keeps its name's end, and is refused."""
    inner = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    return path.suffix if inner in columns.FORMATS else inner


def _texts(path: Path, source: SourceConfig, on_bad: OnBad, open_file: OpenFile) -> Iterator[str]:
    # The pieces of a template alternate between literal text and field names; a .txt file has none.
    pieces = None if _format(path) == ".txt" else PLACEHOLDER.split(source.text)
    rows: Iterator[tuple[int, bytes | Mapping[str, object]]]
    try:
        with open_file(path) as raw, _decompress(path, raw) as stream:
            if pieces and path.suffix in columns.FORMATS:
                rows, unit = columns.records(path, raw, pieces[1::2]), " row "
            else:
                rows, unit = _records(stream, source.split if pieces is None else "line"), ""
            for number, record in rows:
                try:
                    text = _text(record, pieces)
                except _BadRecord as bad:
                    on_bad(Problem(f"{path}:{unit}{number + bad.line}", bad.found, bad.required, "correct it, or set on_bad_record: skip"))
                    continue
                yield text
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(Problem(str(path), " ".join(str(error).split()), "a file that can be read to its end")) from None


def _records(stream: io.BufferedReader | gzip.GzipFile, split: str) -> Iterator[tuple[int, bytes]]:
    """Yield each record's bytes with the number of its first line; blank lines of a jsonl file carry none."""
    if stream.peek(3).startswith(BOM_UTF8):
        stream.read(3)
    if split == "file":
        yield 1, stream.read()
        return
    lines: list[bytes] = []
    number = 0
    for number, line in enumerate(stream, 1):
        blank = not line.strip()
        if split == "line" and not blank:
            yield number, line
        elif split == "paragraph" and not blank:
            lines.append(line)
        elif lines:
            yield number - len(lines), b"".join(lines).rstrip(b"\r\n")
            lines = []
    if lines:
        yield number - len(lines) + 1, b"".join(lines).rstrip(b"\r\n")


def _text(record: bytes | Mapping[str, object], pieces: Sequence[str] | None) -> str:
    try:
        if isinstance(record, bytes):
            text = record.decode()
            text = text if pieces is None else _render(json.loads(text), pieces)
        else:
            text = _render(record, pieces or ())
        text.encode()  # a JSON escape can spell half a surrogate pair, which is no text
    except UnicodeDecodeError as error:
        line = record.count(b"\n", 0, error.start) if isinstance(record, bytes) else 0
        raise _BadRecord(f"invalid UTF-8 ({error.reason})", "UTF-8 text", line) from None
    except UnicodeEncodeError:
        raise _BadRecord("half a surrogate pair", "text that UTF-8 can spell") from None
    except (ValueError, RecursionError) as error:
        raise _BadRecord(f"a line that is not JSON ({error})", "one JSON object a line") from None
    if not text.strip():
        raise _BadRecord("an empty text", "text other than white space")
    return text


def _render(record: object, pieces: Sequence[str]) -> str:
    if not isinstance(record, dict):
        raise _BadRecord(f"a JSON {type(record).__name__}", "one JSON object a line")
    return "".join(_field(record, piece) if index % 2 else piece for index, piece in enumerate(pieces))


def _field(record: dict, name: str) -> str:
    if name not in record:
        raise _BadRecord(f"no field {name!r}", f"the fields of `text`; the record has {', '.join(map(repr, record)) or 'none'}")
    value = record[name].decode() if isinstance(record[name], bytes) else record[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _BadRecord(f"field {name!r} of type {type(value).__name__}", "a string or a number")
    return str(value)


def _open_raw(path: Path) -> io.BufferedReader:
    return io.BufferedReader(io.FileIO(path), BLOCK_BYTES)


def _decompress(path: Path, raw: io.BufferedReader) -> io.BufferedReader | gzip.GzipFile:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(_Zstd(raw), BLOCK_BYTES) if path.suffix == ".zst" else raw


class _Zstd(io.RawIOBase):
    """A zstd file of one or more frames; zstandard's own stream reader takes a truncated file for a whole one."""

    def __init__(self, raw: io.BufferedReader):
        self._blocks = _inflate(raw)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _inflate(raw: io.BufferedReader) -> Iterator[bytes]:
    from zstandard import ZstdDecompressor, ZstdError

    frame = None
    while block := raw.read(64 << 10):  # small: a block may inflate a thousandfold
        while block:
            frame = frame or ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(block)
            except ZstdError as error:
                raise OSError(str(error)) from None
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("Compressed file ended before the end of a zstd frame")
