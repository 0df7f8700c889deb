"""SHA256SUMS: what it lists, every byte that it sees, and how ranks share the reading."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_prism.checkpoint import integrity
from megatron_prism.core import disk
from megatron_prism.core.errors import EnvironmentFault

CONTENTS = {
    "prism.json": b'{"step": 5}',
    "state/__0_0.distcp": bytes(range(256)) * 8,
    "state/.metadata": b"\x80\x04N.",
    "hf/tokenizer.json": b"{}",
    "empty": b"",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path, data in CONTENTS.items():
        (tmp_path / "ckpt" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ckpt" / path).write_bytes(data)
    integrity.seal(tmp_path / "ckpt")
    return tmp_path / "ckpt"


def test_a_sealed_folder_holds_and_sha256sum_says_so_too(root: Path) -> None:
    assert integrity.check(root) == []
    wanted = {f"{hashlib.sha256(data).hexdigest()}  {path}" for path, data in CONTENTS.items()}
    assert set((root / integrity.SUMS).read_text().splitlines()) == wanted
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "-c", "--strict", integrity.SUMS], cwd=root, capture_output=True).returncode == 0


def test_known_sums_are_taken_as_they_are(root: Path) -> None:
    integrity.seal(root, {"prism.json": "0" * 64})
    assert [Path(problem.where).name for problem in integrity.check(root)] == ["prism.json"]


def test_a_written_file_that_is_not_there_is_waited_for_and_then_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network's file system may list late; to seal the folder without the file would be to lose it."""
    late = threading.Timer(0.5, lambda: (root / "late").write_text("x"))
    late.start()
    integrity.seal(root, {"late": "1" * 64})
    assert f"{'1' * 64}  late" in (root / integrity.SUMS).read_text().splitlines()
    monkeypatch.setattr(disk, "await_path", partial(disk.await_path, timeout_s=0.1))
    with pytest.raises(FileNotFoundError, match="never"):
        integrity.seal(root, {"never": "1" * 64})


def test_what_cannot_be_read_now_is_not_called_damaged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    integrity.seal(root)
    for name in (errno.EIO, errno.ESTALE, errno.EMFILE):
        monkeypatch.setattr(
            integrity, "sha256_file", lambda path, name=name: (_ for _ in ()).throw(OSError(name, os.strerror(name), str(path)))
        )
        with pytest.raises(EnvironmentFault, match="whether the checkpoint is whole is unknown"):
            integrity.check(root)


def test_every_single_flipped_bit_is_seen(root: Path) -> None:
    """Of the small files and of the sums themselves all bits, of the large one some."""
    for path in [*CONTENTS, integrity.SUMS]:
        data = (root / path).read_bytes()
        for position in range(0, len(data), 1 if len(data) < 1000 else 37):
            for bit in range(8):
                damaged = bytearray(data)
                damaged[position] ^= 1 << bit
                (root / path).write_bytes(damaged)
                assert integrity.check(root), f"{path}: byte {position}, bit {bit}"
        (root / path).write_bytes(data)
    assert integrity.check(root) == []


FAULTS: dict[str, Callable[[Path], object]] = {
    "a file is gone": lambda root: (root / "empty").unlink(),
    "a file too many": lambda root: (root / "state" / "x.distcp").write_bytes(b""),
    "a file cut off": lambda root: os.truncate(root / "state/__0_0.distcp", 100),
    "two files swapped": lambda root: [
        (root / "a").write_bytes(b""),
        os.replace(root / "prism.json", root / "a"),
        os.replace(root / "hf/tokenizer.json", root / "prism.json"),
        os.replace(root / "a", root / "hf/tokenizer.json"),
    ],
    "a link in a file's place": lambda root: [
        os.replace(root / "prism.json", root.parent / "p"),
        os.symlink(root.parent / "p", root / "prism.json"),
    ],
    "a link to a folder": lambda root: os.symlink(root / "hf", root / "other"),
    "no sums": lambda root: (root / integrity.SUMS).unlink(),
    "empty sums": lambda root: (root / integrity.SUMS).write_bytes(b""),
    "the sums twice": lambda root: (root / integrity.SUMS).write_text((root / integrity.SUMS).read_text() * 2),
    "no last line break": lambda root: (root / integrity.SUMS).write_bytes((root / integrity.SUMS).read_bytes()[:-1]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_and_named(root: Path, fault: str) -> None:
    FAULTS[fault](root)
    problems = integrity.check(root)
    assert problems and all(str(root) in problem.where for problem in problems)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_the_reading(root: Path, world_size: int) -> None:
    """Each file is read by one rank: a flipped bit is seen by exactly one, a missing file by all."""
    (root / "prism.json").write_bytes(b'{"step": 6}')
    seen = [rank for rank in range(world_size) if integrity.check(root, rank, world_size)]
    assert len(seen) == 1
    (root / "empty").unlink()
    assert all(integrity.check(root, rank, world_size) for rank in range(world_size))
