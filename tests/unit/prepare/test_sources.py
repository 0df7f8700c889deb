from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import os
import resource
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import zstandard

from megatron_prism.core import log
from megatron_prism.core.config import DecontaminateConfig, PartConfig, SourceConfig
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


def problems(config: SourceConfig) -> list[str]:
    with pytest.raises(InputError) as caught:
        sources.find([config])
    return list(map(str, caught.value.problems))


def test_every_match_that_is_no_file_is_named(tmp_path: Path) -> None:
    """Under `path`, `valid_path` and `decontaminate.against` alike. A folder that the pattern itself goes into is no match to be read."""
    (tmp_path / "good.jsonl").write_text('{"text": "x"}')
    (tmp_path / "gone.jsonl").symlink_to("/nowhere/blob")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "spark.jsonl").mkdir()
    (tmp_path / "spark.jsonl" / "part-0.jsonl").write_text('{"text": "y"}')
    (tmp_path / "splits.jsonl" / "train").mkdir(parents=True)
    (tmp_path / "splits.jsonl" / "dataset_dict.json").write_text("{}")
    named = {
        "gone.jsonl": "a link to /nowhere/blob, which cannot be reached; required files that can be read; restore it",
        "loop.jsonl": "a link to loop.jsonl, which cannot be reached",
        "pipe.jsonl": "a pipe, a socket or a device",
        "spark.jsonl": f"without state.json; required a folder of Dataset.save_to_disk; name its files, as {tmp_path}/spark.jsonl/*",
        "splits.jsonl": "a DatasetDict with the splits (none)",
    }
    patterns = (str(tmp_path / "*.jsonl"),)
    against = DecontaminateConfig(against=(PartConfig(path=patterns),))
    for key, raises in (
        ("sources.0.path", lambda: sources.find([source(*patterns)])),
        ("sources.0.valid_path", lambda: sources.find([source(tmp_path / "good.jsonl", valid_path=patterns)])),
        ("decontaminate.against.0.path", lambda: documents.evaluation_files(against)),
    ):
        with pytest.raises(InputError) as caught:
            raises()
        said = list(map(str, caught.value.problems))
        assert [line.startswith(key) for line in said] == [True] * len(named)
        assert all(any(f"{tmp_path}/{name}" in line and words in line for line in said) for name, words in named.items())
    for name, words in named.items():  # named as it is, too
        assert words in problems(source(tmp_path / name))[0]


def test_a_glob_into_folders_reads_them_or_names_those_it_cannot_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        (tmp_path / "raw" / name / "x.jsonl").write_text(json.dumps({"text": name}))
    assert texts(source(tmp_path / "raw" / "**")) == texts(source(tmp_path / "raw" / "*" / "*.jsonl")) == ["a", "b"]
    assert texts(source(tmp_path / "raw" / "**" / "*.jsonl")) == ["a", "b"]
    said = problems(source(tmp_path / "raw" / "*"))
    assert [line.partition(" without")[0] for line in said] == [f"sources.0.path: {tmp_path}/raw/{name}: found a folder" for name in "ab"]
    (tmp_path / "raw" / "b" / "x.jsonl").unlink()  # what a glob sees of a folder that it may not read; the tests may run as root
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "b")
    assert problems(source(tmp_path / "raw" / "*" / "*.jsonl"))[0].startswith(
        f"sources.0.path: found {tmp_path}/raw/b, a folder that may not be read"
    )
    monkeypatch.undo()
    (tmp_path / "raw" / "disk").symlink_to("/mnt/not_mounted")
    for pattern in ("*/*.jsonl", "**/*.jsonl", "**"):
        assert f"{tmp_path}/raw/disk, a link to /mnt/not_mounted" in problems(source(tmp_path / "raw" / pattern))[0]


def test_a_glob_into_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    for pattern in ("missing/**/*.jsonl", "missing/**", "*/missing/**"):
        said = problems(source(tmp_path / pattern))
        assert len(said) == 1 and said[0].startswith(f"sources.0.path: found no file at '{tmp_path}/{pattern}'")


def test_a_second_link_to_a_file_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "blob").write_text('{"text": "x"}')
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").symlink_to("blob")
    pattern = tmp_path / "*.jsonl"
    with caplog.at_level(logging.WARNING, logger=log.NAME):
        assert texts(source(pattern, pattern)) == ["x"]  # a pattern given twice matches what it matched
        assert read(source(pattern, valid_path=(str(tmp_path / "a.jsonl"),)))[0] == [("x", "valid")]
    assert caplog.messages == [f"source s: {tmp_path}/b.jsonl is the file {tmp_path}/a.jsonl, and is not read again"] * 2


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.txt.zst", "b.json.gz", "b.parquet", "b.arrow"])
def test_a_file_of_0_bytes_is_refused_where_its_format_has_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (tmp_path / name).touch()
    said = problems(source(tmp_path / "a.jsonl", tmp_path / "b.*"))
    assert len(said) == 1 and f"{name}: found 0 bytes; required a {Path(name).suffix} file that can be read to its end" in said[0]
    assert "found 0 bytes" in problems(source(tmp_path / "a.jsonl", valid_path=(str(tmp_path / name),)))[0]


def test_an_empty_plain_file_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (tmp_path / "b.jsonl").touch()
    with caplog.at_level(logging.WARNING, logger=log.NAME):
        assert texts(source(tmp_path / "*.jsonl")) == ["x"]
    assert caplog.messages == [f"sources.0.path: {tmp_path}/b.jsonl is an empty file"]


@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json.gz", "a.json", "a.json.zst", "a.ndjson", "a.ndjson.gz"])
def test_names_that_json_lines_have(tmp_path: Path, name: str) -> None:
    lines = b'\n{"text": "one"}\n{"text": "two"}\n'
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(lines))
    assert texts(source(tmp_path / name)) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("document", ['[\n{"text": "x"},\n{"text": "y"}\n]', '[{"text": "x"}]', '\n{\n"text": "x"\n}'])
def test_one_json_document_is_refused_as_a_file(tmp_path: Path, name: str, document: str) -> None:
    (tmp_path / name).write_text(document)
    with pytest.raises(
        InputError, match=r"a.jsonl?: found one JSON document, an (array|object).*; required one JSON object a line; .*jq -c"
    ):
        read(source(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("a.jsonl.bz2", "unpack it, or compress it again and name it .gz or .zst"),
        ("a.jsonl.xz", "unpack it, or compress"),
        ("a.parquet.zst", "unpack it: such a file is compressed within"),
        ("part-00000", "rename or link it"),
        ("part-00000.gz", "rename or link it"),
        ("a.JSONL", "rename or link it"),
        ("a.csv", "rename or link it"),
    ],
)
def test_other_names_are_refused_with_the_way_out(tmp_path: Path, name: str, fix: str) -> None:
    (tmp_path / name).write_bytes(bz2.compress(b"x"))
    assert fix in problems(source(tmp_path / name))[0]


def frame(window_log: int, data: bytes) -> bytes:
    """Return a zstd frame of one raw block that asks for a window. Source: RFC 8878, 3.1.1."""
    return b"\x28\xb5\x2f\xfd\0" + bytes([(window_log - 10) << 3]) + (len(data) << 3 | 1).to_bytes(3, "little") + data


def test_a_zstd_window_as_long_as_the_tool_writes_is_read_in_bounded_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.zst"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for window_log in (20, 27, 28, 31):
        file.write_bytes(frame(window_log, b'{"text": "one"}\n') * 2)
        assert texts(source(file)) == ["one", "one"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB: a window holds what was written into it
    block = (1 << 20 | 1 << 1).to_bytes(3, "little") + b"\n"  # 4 bytes for 128 KiB of line breaks
    bomb = frame(27, b"")[:6] + block * 4096 + b"\1\0\0"
    assert max(map(len, islice(sources._inflate(io.BufferedReader(io.BytesIO(bomb))), 3))) <= 32 << 20
    file.write_bytes(frame(32, b'{"text": "one"}\n'))
    with pytest.raises(InputError, match=r"its window is larger than 2 GiB; compress it again with --long=31 or less"):
        read(source(file))
