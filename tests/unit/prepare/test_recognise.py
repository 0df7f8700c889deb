from __future__ import annotations

import bz2
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_prism.core.config import PartConfig
from megatron_prism.core.errors import InputError
from megatron_prism.prepare import pieces, recognise, sources
from megatron_prism.prepare.sources import Input

LINES = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(20))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"
FORBIDDEN = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'


def parquet() -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two"]}), written)
    return written.getvalue()


def arrow_file() -> bytes:
    table, written = pa.table({"text": ["one", "two"]}), io.BytesIO()
    with pa.ipc.new_file(written, table.schema) as writer:
        writer.write_table(table)
    return written.getvalue()


def refused(path: Path, *, read: bool) -> str:
    """Return the message for a file: before any work, or (read) while it is read, as a large one is."""
    part, problems = PartConfig(path=(str(path),)), []
    if not read:
        sources.files(part, "path", problems)
        return "; ".join(map(str, problems))
    with pytest.raises(InputError) as caught:
        list(sources.read_records(Input(path, part, span=(30, 40) if path.suffix == ".jsonl" else None)))
    return str(caught.value)


# mtime=0: a test is known by its bytes, which must be those of every worker
@pytest.mark.parametrize(
    ("name", "held", "found", "fix"),
    [
        *[(f"a{end}", LFS, "a Git-LFS pointer", "git lfs pull") for end in (".jsonl", ".json", ".txt", ".jsonl.gz", ".txt.zst", ".parquet", ".arrow")],
        *[(f"a{end}", PAGE, "a web page", "hf download") for end in (".jsonl", ".txt", ".json.gz", ".parquet")],
        ("a.jsonl", FORBIDDEN, "an error message of a file store", "hf download"),
        ("a.jsonl", b"/annex/objects/SHA256E-s10--0.jsonl\n", "a pointer of git-annex", "git annex get"),
        ("a.txt", bytes(5000), "zeros", "fetch or copy it again"),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0), "a gzip file", "name it a.jsonl.gz"),
        ("a.jsonl.gz", zstandard.compress(LINES.encode()), "a zstd file", "name it a.jsonl.zst"),
        ("a.jsonl", bz2.compress(LINES.encode()), "a bzip2 file", "unpack it"),
        ("a.jsonl.gz", LINES.encode(), "plain text", "name it a.jsonl"),
        ("a.parquet", LINES.encode(), "plain text", "name it .jsonl"),
        ("a.parquet", gzip.compress(parquet(), mtime=0), "a gzip file", "unpack it"),
        ("a.jsonl", parquet(), "a Parquet file", "name it a.parquet"),
        ("a.arrow", arrow_file(), "an Arrow file (Feather)", "as .parquet"),
        ("a.jsonl", LINES.encode("utf-16"), "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "four characters".encode("utf-16-le"), "UTF-16LE text", "iconv -f UTF-16LE"),
        ("a.txt", "four characters".encode("utf-16-be"), "UTF-16BE text", "iconv -f UTF-16BE"),
        ("a.jsonl", LINES.encode("utf-32"), "UTF-32 text", "iconv -f UTF-32"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_its_name_says_is_named_with_the_way_out(
    tmp_path: Path, name: str, held: bytes, found: str, fix: str
) -> None:
    """A .txt of most of these was one document, and a text of UTF-16 without a mark too; the others were lines that are not JSON."""
    (tmp_path / name).write_bytes(held)
    for read in (False, True):
        message = refused(tmp_path / name, read=read)
        assert f"{name}: found {found}" in message and fix in message


@pytest.mark.parametrize("within", [gzip.compress(LINES.encode(), mtime=0), LINES.encode("utf-16"), PAGE])
def test_what_is_within_a_compressed_file_is_looked_at_too(tmp_path: Path, within: bytes) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(within))
    message = refused(tmp_path / "a.jsonl.gz", read=True)
    assert any(f"found {found}; required UTF-8 text" in message for found in ("a gzip file", "UTF-16 text", "a web page, not the file"))


def test_a_large_page_named_parquet_is_refused_where_its_footer_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(PAGE + b" " * pieces.LEAST_BYTES)
    with pytest.raises(InputError, match="a.parquet: found a web page"):
        pieces.in_lot_order([Input(tmp_path / "a.parquet", PartConfig())], 0, "s")


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("a.txt", b"hi"),
        ("a.txt", b"version 1 of <html>, %PDF-1.7 and PAR1"),
        ("a.txt", b"m".rjust(257) + b"ustard"),
        ("a.txt", "\u4f60\u597d".encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.jsonl.zst", b"\x50\x2a\x4d\x18\x04\0\0\0size" + zstandard.compress(LINES.encode())),  # as pzstd writes
    ],
)
def test_what_its_name_says_is_read(tmp_path: Path, name: str, held: bytes) -> None:
    (tmp_path / name).write_bytes(held)
    assert recognise.refusal(tmp_path / name) is None
    assert list(sources.read_records(Input(tmp_path / name, PartConfig())))
