"""The sum of what a stage gives: it changes with the contents, and with nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core import manifest
from megatron_prism.study import sums
from megatron_prism.study.sums import FileSums, of_output


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def files(tmp_path: Path) -> FileSums:
    return FileSums(tmp_path / "sums.json")


def test_a_folders_sum_is_that_of_its_files_names_and_contents(tmp_path: Path, files: FileSums) -> None:
    out = tmp_path / "out"
    assert of_output(out, files) is None
    out.mkdir()
    assert of_output(out, files) is None  # empty
    write(out / "a", "1"), write(out / "deep" / "b", "2")
    first = of_output(out, files)
    write(out / ".lock", "x"), write(out / "c.tmp", "x"), write(out / "tensorboard" / "e", "x")
    assert of_output(out, files) == first
    (out / "a").rename(out / "z")
    assert of_output(out, files) != first
    (out / "z").rename(out / "a")
    write(out / "deep" / "b", "3")
    assert of_output(out, files) != first


def test_what_two_jobs_have_read_is_kept_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of TBs is read once, though another job began before it was, and ends after."""
    corpus, other = write(tmp_path / "corpus", "1"), write(tmp_path / "other", "2")
    one, two = FileSums(tmp_path / "sums.json"), FileSums(tmp_path / "sums.json")
    first = one.of_file(corpus), two.of_file(other)
    one.save(), two.save()
    monkeypatch.setattr(sums, "sha256_file", lambda path: pytest.fail(f"{path} is read again"))
    third = FileSums(tmp_path / "sums.json")
    assert (third.of_file(corpus), third.of_file(other)) == first


def test_a_manifest_counts_without_its_time_and_versions(tmp_path: Path, files: FileSums) -> None:
    described = {"kind": "prompts", "created": "now", "versions": {"a": 1}, "git_commit": "x", "sha256": "1"}
    first = of_output(write(tmp_path / "out" / "manifest.json", described).parent, files)
    write(tmp_path / "out" / "manifest.json", described | {"created": "later", "versions": {}, "git_commit": None})
    assert of_output(tmp_path / "out", files) == first
    write(tmp_path / "out" / "manifest.json", described | {"sha256": "2"})
    assert of_output(tmp_path / "out", files) != first


def test_a_run_is_its_newest_checkpoint_and_a_sealed_folder_its_sums(tmp_path: Path, files: FileSums) -> None:
    run = tmp_path / "run"
    for step in (2, 10):
        write(run / "checkpoints" / f"step_{step:08d}" / sums.SUMS, f"{step}  a\n")
    first = of_output(run, files)
    write(run / "metrics.jsonl", "x"), write(run / "checkpoints" / "step_00000002" / sums.SUMS, "9  a\n")
    assert of_output(run, files) == first == of_output(run / "checkpoints" / "step_00000010", files)
    write(run / "checkpoints" / "step_00000010" / sums.SUMS, "11  a\n")
    assert of_output(run, files) != first


@pytest.mark.parametrize(("name", "kind"), [sums.PREPARED, sums.EVALUATION])
def test_a_file_that_holds_the_sums_of_the_others_stands_for_them(tmp_path: Path, files: FileSums, name: str, kind: str) -> None:
    out = write(tmp_path / "out" / name, {"kind": kind, "sha256": "1"}).parent
    first = of_output(out, files)
    write(out / "samples" / "a", "x")
    assert of_output(out, files) == first
    write(out / name, {"kind": "other", "sha256": "1"})
    assert of_output(out, files) != first  # all files count


@pytest.mark.parametrize("kept", [[1, "x"], 5, None, {"a": 1}])
def test_kept_sums_that_are_none_are_passed_over(tmp_path: Path, kept: Any) -> None:
    path = write(tmp_path / "big", "1")
    write(tmp_path / "sums.json", {"files": {str(path): kept}})
    assert of_output(path, FileSums(tmp_path / "sums.json")) == manifest.sha256_file(path)


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, files: FileSums, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(sums, "sha256_file", lambda path: hashed.append(path) or manifest.sha256_file(path))
    path = write(tmp_path / "big", "1")
    first = of_output(path, files)
    files.save()
    again = FileSums(tmp_path / "sums.json")
    assert of_output(path, again) == first and len(hashed) == 1
    facts = path.stat()
    path.write_text("2")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))  # of the same size
    assert of_output(path, again) != first and len(hashed) == 2
