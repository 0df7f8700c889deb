"""What a checkpoint's writers may rely on: memory that stays as it was, and a rank that is still there."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_prism.checkpoint import writers
from megatron_prism.core import disk


def request(preload: Any) -> Any:
    """Return what Megatron-Core asks to be written, as far as Writers reads it: one file, whose tensors `preload` brings to the host."""
    return types.SimpleNamespace(preload_fn=preload, async_fn=types.SimpleNamespace(args=([],)), async_fn_args=None, finalize_fns=[])


def test_staged_memory_is_held_until_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory is shared with a forked process: let go of, it would be the next batch's while it is being written."""
    staged: list[Any] = []

    def preload() -> Any:
        tensor = torch.arange(1000.0).share_memory_()
        staged.append(weakref.ref(tensor))
        return [(str(tmp_path / "file"), "file", ([], [(None, tensor)]))]

    monkeypatch.setattr(writers, "_write", lambda transforms, number, bucket, pipe: (time.sleep(0.5), pipe.send((None, [], "0" * 64))))
    writing = writers.Writers(request(preload), 60.0)
    assert writing.poll() and staged[0]() is not None
    while writing.poll(0.1):
        pass
    assert writing.failure is None and staged[0]() is None


def test_a_child_that_is_stuck_at_its_start_is_forked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A lock that another thread of the rank held at the fork is never released in the child."""
    lock, forks = threading.Lock(), []
    start = multiprocessing.context.ForkProcess.start

    def with_a_thread_holding(process: Any) -> None:
        forks.append(process)
        with lock if len(forks) == 1 else nullcontext():
            start(process)

    def rehearse() -> None:
        with lock:
            pass

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", with_a_thread_holding)
    monkeypatch.setattr(writers, "_rehearse", rehearse)
    monkeypatch.setattr(writers, "READY_S", 0.5)
    monkeypatch.setattr(writers, "_write", lambda transforms, number, bucket, pipe: pipe.send((None, [], "0" * 64)))
    writing = writers.Writers(request(lambda: [(str(tmp_path / "file"), "file", ([], []))]), 60.0)
    while writing.poll(0.1):
        pass
    assert writing.failure is None and writing.sums == {"file": "0" * 64}
    assert len(forks) == 2 and not forks[0].is_alive()
    assert "in rehearse" in capfd.readouterr().err


def test_a_child_that_is_stuck_later_is_an_error_that_shows_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stuck_here(transforms: Any, number: int, bucket: Any, pipe: Any) -> None:
        time.sleep(600)

    monkeypatch.setattr(writers, "_write", stuck_here)
    writing = writers.Writers(request(lambda: [(str(tmp_path / "file"), "file", ([], []))]), 0.2)
    time.sleep(0.3)
    assert not writing.poll() and writing.failure is not None and "not written after 0.2 s (save.timeout_s)" in writing.failure
    assert "in stuck_here" in capfd.readouterr().err


def test_memory_that_a_forked_process_shares_is_copied() -> None:
    own, shared = torch.arange(8.0), torch.arange(8.0).share_memory_()
    views = [writers.uncopied(tensor) for tensor in (own, shared)]
    own.zero_(), shared.zero_()
    assert views[0].sum() == 0, "a host's own memory is not copied: the fork does it"
    assert views[1].sum() == 28


CHILD = """
import os, sys, time
from pathlib import Path
from megatron_prism.checkpoint import writers
from megatron_prism.core import disk
with disk.held(Path(sys.argv[1]), "prism train"):
    if os.fork() == 0:
        if sys.argv[2] == "writer":
            writers._end_with(os.getppid())
        print(os.getpid(), flush=True)
        time.sleep(600)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["writer", "any other child"])
def test_a_process_that_outlives_its_rank_holds_no_lock_and_a_writer_does_not_outlive_it(tmp_path: Path, kind: str) -> None:
    lock = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", CHILD, str(lock), kind], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        child = psutil.Process(int(rank.stdout.readline()))
        with pytest.raises(disk.EnvironmentFault, match=f"process {rank.pid} on .* writes there"), disk.held(lock, "prism train"):
            pass
        rank.send_signal(signal.SIGKILL)
        rank.wait()
        try:
            with disk.held(lock, "prism train"):
                assert lock.read_text().startswith(f"process {os.getpid()} ")
            if kind == "writer":
                child.wait(10)
            else:
                assert child.is_running()
        finally:
            if child.is_running():
                child.kill()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "no space left on device ("),
        (errno.EDQUOT, "Disk quota exceeded (your quota there is used up)"),
        (errno.EFBIG, "File too large (see ulimit -f)"),
    ],
)
def test_a_quota_and_a_limit_of_the_process_are_no_full_disk(code: int, said: str, tmp_path: Path) -> None:
    error = RuntimeError("the archive's writer failed")
    error.__cause__ = OSError(code, os.strerror(code))
    assert writers.describe(tmp_path / "a.distcp", error).startswith(f"{tmp_path / 'a.distcp'}: {said}")
