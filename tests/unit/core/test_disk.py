"""Copies and replaced files: what a copy that fails says, and two that replace one file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_prism.core import disk


def test_a_copy_onto_a_full_disk_names_both_files_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "from" / "inner").mkdir(parents=True)
    (tmp_path / "from" / "inner" / "a.json").write_text("{}")
    disk.copy_tree(tmp_path / "from", tmp_path / "whole")
    assert (tmp_path / "whole" / "inner" / "a.json").read_text() == "{}"

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    monkeypatch.setattr(disk.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        disk.copy_tree(tmp_path / "from", tmp_path / "to")
    where = Path("inner", "a.json")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == f"{tmp_path / 'to' / where}, a copy of {tmp_path / 'from' / where}"


def test_two_that_replace_a_file_at_once_do_not_share_what_they_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As jobs of a study do on two nodes, whose processes may have one number, in containers above all."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "study.json"
    with disk.replacing(path) as (first,):
        first.write_text("one")
        with disk.replacing(path) as (second,):
            second.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
