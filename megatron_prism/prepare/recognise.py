"""What a data file is that its name does not say, by its first bytes: what a download, a copy or another tool leaves in a file's place."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO

from megatron_prism.core.errors import InputError, Problem

HEAD_BYTES, LEAST_TEXT_BYTES = 512, 8  # the least: a file cut after its magic number is damaged, not text
SMALL_BYTES = 1 << 16  # pointers and error pages are no larger, mostly: files of this size are looked into before any work
DOWNLOADED = "fetch the file itself: hf download, with a login where the data set asks for one"
STUBS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (  # a file that stands for the data, what it is, what to do
    (re.compile(rb"version https://git-lfs"), "a Git-LFS pointer, not the file", "fetch the file itself: git lfs pull, or hf download"),
    (re.compile(rb"\.?[./]*(\.git)?/annex/objects/"), "a pointer of git-annex, not the file", "fetch the file itself: git annex get"),
    (re.compile(rb"\s*(<!doctype html|<html)", re.I), "a web page, not the file", DOWNLOADED),
    (re.compile(rb"\s*<\?xml[^>]*>\s*<error>", re.I), "an error message of a file store, not the file", DOWNLOADED),
    (re.compile(rb"\0{64}"), "zeros, as a broken download or copy leaves", "fetch or copy it again"),
)
PACKED: tuple[tuple[re.Pattern[bytes], str, str], ...] = (  # a file in another format: what it is, the end of the name that says so
    (re.compile(rb"\x1f\x8b\x08"), "a gzip file", ".gz"),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), "a zstd file", ".zst"),
    (re.compile(rb"PAR1[\0-\x1f]"), "a Parquet file", ".parquet"),
    (re.compile(rb"\xff\xff\xff\xff.{2}\0\0", re.S), "an Arrow stream", ".arrow"),
    (re.compile(rb"ARROW1\0\0"), "an Arrow file (Feather), not an Arrow stream", ""),
    (re.compile(rb"BZh[1-9]1AY&SY"), "a bzip2 file", ""),
    (re.compile(rb"\xfd7zXZ\0"), "an xz file", ""),
    (re.compile(rb"\x04\x22\x4d\x18"), "an lz4 file", ""),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive", ""),
    (re.compile(rb"PK\x03\x04"), "a zip archive", ""),
    (re.compile(rb".{257}ustar(\0|  \0)", re.S), "a tar archive", ""),
    (re.compile(rb"%PDF-\d\.\d\s"), "a PDF", ""),
)
COMPRESSIONS = (".gz", ".zst")
READ = tuple(end for _, _, end in PACKED if end)
WIDE: tuple[tuple[re.Pattern[bytes], str], ...] = (  # encodings, by their mark or by four ASCII characters; iconv's names
    (re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff", re.S), "UTF-32"),
    (re.compile(rb"([^\0]\0\0\0){2}", re.S), "UTF-32LE"),
    (re.compile(rb"(\0\0\0[^\0]){2}", re.S), "UTF-32BE"),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "UTF-16"),
    (re.compile(rb"([^\0]\0){4}", re.S), "UTF-16LE"),
    (re.compile(rb"(\0[^\0]){4}", re.S), "UTF-16BE"),
)


def head(stream: BinaryIO) -> bytes:
    """Return the first bytes of an open file, without moving in it."""
    return os.pread(stream.fileno(), HEAD_BYTES, 0)


def refusal(path: Path) -> Problem | None:
    """Return why a file is not what its name says, None where it may be, and where it cannot be opened."""
    try:
        with path.open("rb") as stream:
            return _problem(path, head(stream), path.suffix)
    except OSError:
        return None  # whoever reads it says so


def refuse(path: Path, first: bytes, is_unpacked: bool = False) -> None:
    """Raise InputError where a file whose first bytes are `first` is not what its name says.

    is_unpacked: they are those behind the compression that the name tells of.
    """
    if problem := _problem(path, first, "" if is_unpacked else path.suffix):
        raise InputError(problem)


def _problem(path: Path, first: bytes, suffix: str) -> Problem | None:
    """Return why a file is not what its name says. suffix: the format that the bytes should have; "" behind a compression."""
    expected = suffix if suffix in READ else ""
    text = "UTF-8 text" if path.suffix == ".txt" or not suffix else "JSON lines"
    required = f"a {suffix} file that can be read to its end" if expected else text
    for pattern, what, fix in STUBS:
        if pattern.match(first):
            return Problem(str(path), what, required, fix)
    for pattern, what, end in PACKED:
        if pattern.match(first):
            return None if end and end == expected else Problem(str(path), what, required, _way_out(path, end, suffix))
    if expected:
        fix = f"name it {path.stem}" if expected in COMPRESSIONS else "name it .jsonl if it holds JSON lines, or fetch it again"
        return Problem(str(path), "plain text", required, fix) if _is_text(first) else None
    if encoding := next((name for pattern, name in WIDE if pattern.match(first)), None):
        return Problem(str(path), f"{encoding} text", required, f"write it as UTF-8: iconv -f {encoding} -t UTF-8 OLD > NEW")
    return None


def _way_out(path: Path, end: str, suffix: str) -> str:
    """Return what to do with a file in another format than its name says. end: of the names of that format, "" where it is not read."""
    if not suffix:
        return "unpack it: it is packed once more within"
    if not end or (end in COMPRESSIONS and suffix in (".parquet", ".arrow")):
        return "unpack it, or write its records as JSON lines or as .parquet"
    plain = path.stem if suffix in COMPRESSIONS else path.name
    return f"name it {plain + end if end in COMPRESSIONS else Path(plain).stem + end}"


def _is_text(first: bytes) -> bool:
    """Say whether these bytes are UTF-8 without control characters, which a compressed or columnar file is full of."""
    if len(first) < LEAST_TEXT_BYTES:
        return False
    text = first.decode(errors="ignore")  # the last character may be cut
    return len(text.encode()) > len(first) - 4 and not re.search(r"[\0-\x08\x0e-\x1f]", text)
