"""Find a source's files and stream their records: JSON lines and `.txt`, plain, `.gz` or `.zst`, and the columnar files of arrow.py.

Whatever a pattern matches is read, or it is a problem that names it.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_prism.core import log
from megatron_prism.core.config import PartConfig, SourceConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.prepare import arrow, lines, recognise, records
from megatron_prism.prepare.lines import UNBOUNDED, TooLong

Record = bytes | Mapping[str, object] | TooLong  # a line or a document of a text file; or a row's columns, with strings still as bytes
OpenFile = Callable[[Any], io.BufferedReader]  # of an Input
JSON_LINES = (".jsonl", ".json", ".ndjson")  # .json: the name of JSON lines in C4, Dolma and Megatron-LM's examples
FORMATS = (*JSON_LINES, ".txt", *arrow.FORMATS)
COMPRESSIONS = (".gz", ".zst")
OTHER_COMPRESSIONS = (".bz2", ".xz", ".lzma", ".lz4", ".br", ".zip", ".7z", ".gzip", ".zstd", ".snappy", ".sz", ".Z")
BLOCK_BYTES = 1 << 20
WINDOW_BYTES = 1 << 31  # the largest window of a zstd frame that is read: that of `zstd --long=31`, the most that the tool writes


@dataclass(frozen=True)
class Input:
    """One file of a source, or a range of it, and how its records become texts.

    span: the file's bytes (.jsonl) or row groups (.parquet), from the first to before the second; None is the whole file. limits: the
    largest lot of each group, once `part.sample` is drawn.
    """

    path: Path
    part: PartConfig
    is_held_out: bool = False
    limits: Mapping[str, int] | None = None
    span: tuple[int, int] | None = None

    @property
    def is_plain(self) -> bool:
        """Say whether a record is itself the text."""
        return _format(self.path) == ".txt"

    def place(self, number: int) -> str:
        """Return the name of a record in messages. number: from 1."""
        kind = " row " if self.path.suffix in arrow.FORMATS else "byte " if self.span else ""
        return f"{self.path}:{kind}{number}"

    @property
    def name(self) -> str:
        """Return the file, and the range of it that is read."""
        kind = "row groups" if self.path.suffix in arrow.FORMATS else "bytes"
        return f"{self.path} [{kind} {self.span[0]} to {self.span[1]}]" if self.span else str(self.path)


def parts(source: SourceConfig) -> tuple[PartConfig, ...]:
    """Return the parts of a source. A source that lists none is its own only part."""
    own = PartConfig(**{field.name: getattr(source, field.name) for field in dataclasses.fields(PartConfig)})
    return source.parts or (own,)


def how_read(part: PartConfig) -> dict[str, Any]:
    """Return how a part's records become texts: its keys but those that say where its files come from."""
    return {key: value for key, value in dataclasses.asdict(part).items() if key not in ("path", "hf_id", "hf_files")}


def dedup(source: SourceConfig) -> Literal["none", "exact", "minhash"]:
    """Return the dedup of a source. `sample` chooses among distinct texts, so it implies at least `exact`."""
    is_sampled = any(part.sample for part in parts(source))
    return "exact" if source.dedup == "none" and is_sampled else source.dedup


def find(sources: Sequence[SourceConfig]) -> tuple[tuple[Input, ...], ...]:
    """Return the files of each source in reading order. Held-out files come first, so `dedup` drops the training copy.

    Globs are expanded and sorted. A folder of Dataset.save_to_disk stands for its data files. No file is read twice.
    Raises: InputError with every pattern that matches no file, and every match that is not read.
    """
    problems: list[Problem] = []
    inputs = []
    for index, source in enumerate(sources):
        own, key = parts(source), f"sources.{index}"
        valid = files(dataclasses.replace(own[0], path=source.valid_path, sample=None), f"{key}.valid_path", problems, is_held_out=True)
        known = {file.path.resolve(): file.path for file in valid}
        train = []
        for number, part in enumerate(own):
            for file in files(part, f"{key}.parts.{number}.path" if source.parts else f"{key}.path", problems):
                first = known.setdefault(file.path.resolve(), file.path)
                if first is file.path:
                    train.append(file)
                elif first != file.path:  # two links to one file, as the hub's cache has of equal files
                    log.get().warning("source %s: %s is the file %s, and is not read again", source.name, file.path, first)
        inputs.append((*valid, *train))
    raise_problems(problems)
    return tuple(inputs)


def files(part: PartConfig, key: str, problems: list[Problem], is_held_out: bool = False, text_key: str = "") -> tuple[Input, ...]:
    """Return the files of a part's patterns, and append what is wrong to `problems`. text_key: of its text; without it, the `text` beside `key`."""
    inputs = tuple(Input(path, part, is_held_out) for path in _expand(part.path, key, problems))
    if any(not file.is_plain for file in inputs) and not records.fields(dataclasses.replace(part, keep=(), sample=None)):
        problems.append(Problem(text_key or f"{key.rpartition('.')[0]}.text", repr(part.text), "at least one {field} of the records"))
    if plain := [file.path.name for file in inputs if file.is_plain and (part.keep or part.turns or part.sample)]:
        problems.append(Problem(key, f"{plain[0]}, which has no fields", "records with fields for keep, turns and sample"))
    return inputs


def read_records(file: Input, open_file: OpenFile | None = None, max_bytes: int = UNBOUNDED) -> Iterator[tuple[int, Record]]:
    """Yield a file's records and their numbers (of lines and rows from 1; in a range of a text file, the byte where the record begins).

    `open_file` opens the raw bytes, so that a progress bar can count them. A record of more than max_bytes comes as its size.
    Raises: InputError naming a file that cannot be read, ends in the middle of its compressed stream, or is one JSON document.
    """
    path = file.path
    try:
        with (open_file or open_raw)(file) as raw, _decompress(path, raw) as stream:
            recognise.refuse(path, recognise.head(raw))
            if path.suffix in COMPRESSIONS:
                recognise.refuse(path, stream.peek(recognise.HEAD_BYTES), is_unpacked=True)
            if path.suffix in arrow.FORMATS:
                yield from arrow.records(path, raw, records.fields(file.part), max_bytes, file.span)
            elif file.is_plain:
                yield from lines.records(stream, file.part.split, max_bytes)
            elif file.span:
                yield from _of_lines(file, lines.records_of_range(raw, *file.span, max_bytes))
            else:
                yield from _of_lines(file, lines.records(stream, "line", max_bytes))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(Problem(str(path), " ".join(str(error).split()), "a file that can be read to its end")) from None


class Watched(io.FileIO):
    """A file that reports the bytes read. The sum is its size (or that of the range read), although a columnar reader skips some bytes and rereads others."""

    def __init__(self, path: Path, advance: Callable[[int], None], num_bytes: int | None = None):
        super().__init__(path)
        self._advance, self._left = advance, path.stat().st_size if num_bytes is None else num_bytes

    @classmethod
    def opener(cls, advance: Callable[[int], None], num_bytes: Mapping[str, int]) -> OpenFile:
        """Return a function that opens a file and reports to `advance`. num_bytes: of each input that is read, by its name."""
        return lambda file: io.BufferedReader(cls(file.path, advance, num_bytes[file.name]), BLOCK_BYTES)

    def readinto(self, buffer: Any) -> int:
        return self._count(super().readinto(buffer) or 0)

    def readall(self) -> bytes:
        data = super().readall()
        self._count(len(data))
        return data

    def close(self) -> None:
        if not self.closed:
            self._count(self._left)
        super().close()

    def _count(self, count: int) -> int:
        step = min(count, self._left)
        self._left -= step
        self._advance(step)
        return count


def open_raw(file: Input) -> io.BufferedReader:
    """Open a file's bytes."""
    return io.BufferedReader(io.FileIO(file.path), BLOCK_BYTES)


def _expand(patterns: Sequence[str], key: str, problems: list[Problem]) -> tuple[Path, ...]:
    paths: dict[Path, None] = {}  # a dict: ordered, and without duplicates
    others: list[Path] = []
    for pattern in patterns:
        is_literal = os.path.lexists(pattern)
        matches = [Path(match) for match in ([pattern] if is_literal else _matches(pattern))]
        if not matches:
            problems.append(Problem(key, f"no file at {pattern!r}", "a file, or a glob that matches files", "correct the path"))
        for match in matches:
            if os.path.isfile(match):
                paths[match] = None
            elif is_literal or os.path.isfile(match / "state.json"):
                paths |= dict.fromkeys(_saved_files(match, key, problems))
            elif not (os.path.isdir(match) and Path(pattern).name == "**"):  # which matches what the folder holds, too
                others.append(match)
        others += [] if is_literal else _not_entered(pattern)
    entered = {folder for path in paths for folder in path.parents}  # another pattern may have gone in
    for match in dict.fromkeys(others):
        if match not in entered:
            _saved_files(match, key, problems)
    problems += [problem for path in paths if (problem := _not_read(path, key))]
    return tuple(paths)


def _not_entered(pattern: str) -> list[Path]:
    """Return what a glob matches on its way and cannot enter. It says nothing of the files behind."""
    parts = Path(pattern).parts
    leading = [os.path.join(*parts[:end]) for end in range(1, len(parts) + 1) if glob.has_magic(parts[end - 1])]
    matches = [Path(match) for part in leading for match in _matches(part)]
    return [match for match in matches if not os.path.exists(match) or (match.is_dir() and not os.access(match, os.R_OK | os.X_OK))]


def _matches(pattern: str) -> list[str]:
    """Return what a glob matches, sorted. On Python 3.11 `missing/**` matches a folder that is not there."""
    return [match for match in sorted(glob.glob(pattern, recursive=True)) if os.path.lexists(match)]


def _saved_files(match: Path, key: str, problems: list[Problem]) -> tuple[Path, ...]:
    """Return the data files of a folder that `datasets` saved. Of any other match that is no file, append to `problems` what it is."""
    if os.path.islink(match) and not os.path.exists(match):
        found, fix = f"{match}, a link to {os.readlink(match)}, which cannot be reached", "restore it, or remove the link"
    elif not os.path.isdir(match):
        found, fix = f"{match}, a pipe, a socket or a device", "write it to a file: a file is read more than once"
    elif not os.access(match, os.R_OK | os.X_OK):
        found, fix = f"{match}, a folder that may not be read", "allow it (chmod u+rx)"
    else:
        try:
            return arrow.saved_files(match)
        except InputError as error:
            problems += [dataclasses.replace(problem, where=f"{key}: {problem.where}") for problem in error.problems]
            return ()
    problems.append(Problem(key, found, "files that can be read", fix))
    return ()


def _not_read(path: Path, key: str) -> Problem | None:
    """Return why a file is not read, if so. A plain file may be empty; the other formats have no file of 0 bytes."""
    kind = _format(path)
    if kind in FORMATS:
        if num_bytes := path.stat().st_size:
            return recognise.refusal(path) if num_bytes <= recognise.SMALL_BYTES else None
        if kind == path.suffix and kind not in arrow.FORMATS:
            log.get().warning("%s: %s is an empty file", key, path)
            return None
        return Problem(str(path), "0 bytes", f"a {path.suffix} file that can be read to its end", "fetch it again, or leave it out")
    required = "JSON lines (.jsonl, .json or .ndjson) or .txt, plain or as .gz or .zst, .parquet, or .arrow"
    fix = "if it holds one of these, rename or link it: the end of a name says how a file is read"
    if path.suffix in OTHER_COMPRESSIONS:
        fix = "unpack it, or compress it again and name it .gz or .zst"
    elif kind == path.suffix and kind in COMPRESSIONS and path.with_suffix("").suffix in arrow.FORMATS:
        fix = "unpack it: such a file is compressed within"
    return Problem(key, str(path), required, fix)


def _format(path: Path) -> str:
    """Return a file's format: the suffix without a text file's compression. A compressed columnar file keeps `.gz`, and is refused."""
    inner = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    return path.suffix if inner in arrow.FORMATS else inner


def _of_lines(file: Input, numbered: Iterator[tuple[int, bytes | TooLong]]) -> Iterator[tuple[int, bytes | TooLong]]:
    """Yield the lines of a file.

    Raises: InputError for a file that is one JSON document. As lines it would be bad records, and a few good ones.
    """
    is_begin = file.span is None or file.span[0] == 0
    for number, line in numbered:
        begin = line.begin if isinstance(line, TooLong) else line
        if is_begin and (begin.strip() == b"{" or begin.lstrip().startswith(b"[")):
            what = "an array" if begin.lstrip().startswith(b"[") else "an object over several lines"
            fix = "write it as JSON lines: jq -c '.[]' for an array, jq -c . for an object"
            raise InputError(Problem(str(file.path), f"one JSON document, {what}", "one JSON object a line", fix))
        is_begin = False
        yield number, line


def _decompress(path: Path, raw: io.BufferedReader) -> io.BufferedReader | gzip.GzipFile:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(_Zstd(raw), BLOCK_BYTES) if path.suffix == ".zst" else raw


class _Zstd(io.RawIOBase):
    """A zstd file of one or more frames. (zstandard's own stream reader accepts a truncated file.)"""

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
    while block := raw.read(1 << 10):  # small: 4 bytes of it may inflate to 128 KiB
        while block:
            frame = frame or ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj()
            try:
                yield frame.decompress(block)
            except ZstdError as error:
                too_large = "too much memory" in str(error)
                hint = (
                    f": its window is larger than {WINDOW_BYTES >> 30} GiB; compress it again with --long=31 or less" if too_large else ""
                )
                raise OSError(f"{error}{hint}") from None
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("Compressed file ended before the end of a zstd frame")
