from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from megatron_prism.core.config import SourceConfig
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.prepare import documents, sources


def source(*path: Path | str, **changes) -> SourceConfig:
    return SourceConfig(**{"name": "s", "path": tuple(map(str, path)), "weight": 100.0, **changes})


def read(config: SourceConfig) -> tuple[list[tuple[str, str]], list[Problem]]:
    """Return (text, side of the split) of each document, and what is bad."""
    bad: list[Problem] = []
    found = []
    for file in sources.find([config])[0]:
        for text, _ in documents.read_texts(file, sources.read_records(file), Counter(), bad):
            found.append((text, "valid" if file.is_held_out or documents.is_held_out(text, config.valid_percent) else "train"))
    return found, bad


def held_out_texts(file: Path, valid_percent: float) -> set[str]:
    return {text for text, split in read(source(file, valid_percent=valid_percent))[0] if split == "valid"}


def texts(config: SourceConfig) -> list[str]:
    found, bad = read(config)
    assert not bad
    return [text for text, _ in found]


def test_template_substitutes_plain_fields_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"q": "{a} {0.__class__}", "a": 2.5, "n": 7}) + "\n\n" + json.dumps({"q": "x", "a": "y", "n": 1}))
    assert texts(source(file, text="{q}|{a}|{n}|{}|{{n}}")) == ["{a} {0.__class__}|2.5|7|{}|{7}", "x|y|1|{}|{1}"]


def test_txt_whole_or_by_paragraph(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf\n one\ntwo \n\n \t\n\nthree\r\n\r\nfour")
    assert texts(source(file, split="paragraph")) == [" one\ntwo ", "three", "four"]
    assert texts(source(file)) == ["\n one\ntwo \n\n \t\n\nthree\r\n\r\nfour"]


def test_compressed_files_read_as_plain_ones(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {index} " + "x" * index}) + "\n" for index in range(3000)]
    plain = "".join(lines).encode()
    half = len("".join(lines[:1500]).encode())
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl").write_bytes(plain)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain[:half]) + gzip.compress(plain[half:]))
    (tmp_path / "c.jsonl.zst").write_bytes(pack(plain[:half]) + pack(plain[half:]))
    expected = texts(source(tmp_path / "a.jsonl"))
    assert len(expected) == 3000
    assert texts(source(tmp_path / "b.jsonl.gz")) == texts(source(tmp_path / "c.jsonl.zst")) == expected


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [1, 200])
def test_truncated_compressed_file_is_refused(tmp_path: Path, suffix: str, cut: int) -> None:
    plain = b"".join(b'{"text": "%d"}\n' % (index**5) for index in range(2000))
    packed = gzip.compress(plain) if suffix == ".gz" else zstandard.ZstdCompressor().compress(plain)
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(packed[:-cut])
    with pytest.raises(InputError, match=f"a.jsonl{suffix}: .*read to its end"):
        read(source(file))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(InputError, match=f"a.jsonl{suffix}"):
        read(source(file))


@pytest.mark.parametrize(
    ("line", "found"), [(b"{broken", "not JSON"), (b'{"text": null}', "type NoneType"), (b'{"text": "\xff"}', "UTF-8")]
)
def test_bad_jsonl_record_is_named_by_file_and_line(tmp_path: Path, line: bytes, found: str) -> None:
    """What makes a record bad is tests/unit/prepare/test_records.py's."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n')
    found_texts, bad = read(source(file))
    assert [text for text, _ in found_texts] == ["first", "last"]
    assert [problem.where for problem in bad] == [f"{file}:3"]
    assert found in bad[0].found


def test_bad_text_is_named_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\n\ntwo\ntw\xffo\n\nthree\n")
    found, bad = read(source(file, split="paragraph"))
    assert [text for text, _ in found] == ["one", "three"]
    assert [problem.where for problem in bad] == [f"{file}:4"]
    assert read(source(file))[1][0].where == f"{file}:4"
    file.write_bytes(b" \n")
    assert read(source(file))[1][0].where == f"{file}:1"


def test_find_expands_sorts_and_reads_a_file_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "[odd].txt", "c.jsonl"):
        (tmp_path / name).write_text("x")
    found = sources.find([source(tmp_path / "b.txt", tmp_path / "?.txt", tmp_path / "[odd].txt", text="{t}")])
    assert [file.path.name for file in found[0]] == ["b.txt", "a.txt", "[odd].txt"]


def test_find_names_every_problem_by_key(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.gz").write_text("x")
    (tmp_path / "a.jsonl").write_text("x")
    first = source(tmp_path / "no*.txt", tmp_path / "a.parquet.gz", valid_path=("absent.txt",))
    with pytest.raises(InputError) as caught:
        sources.find([first, source(tmp_path / "a.jsonl", text="fixed")])
    keys = [problem.where.removeprefix("sources.") for problem in caught.value.problems]
    assert keys == ["0.valid_path", "0.path", "0.path", "1.text"]


def test_valid_files_are_kept_out_of_training(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    found, _ = read(source(tmp_path / "*.txt", valid_path=(str(tmp_path / "b.txt"),)))
    assert found == [("b", "valid"), ("a", "train")]  # held out first


def test_valid_percent_depends_on_the_text_alone(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {index}"}) for index in range(4000)]
    forward, backward = tmp_path / "f.jsonl", tmp_path / "b.jsonl"
    forward.write_text("\n".join(lines))
    backward.write_text("\n".join(reversed(lines)))
    held_out = held_out_texts(forward, 5.0)
    assert held_out == held_out_texts(backward, 5.0)
    assert 140 < len(held_out) < 260
    assert held_out < held_out_texts(forward, 10.0)  # a larger share keeps what was held out
    assert not held_out_texts(forward, 0.0)
