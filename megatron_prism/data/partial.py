"""The folder beside `out` that a mixture is prepared in: one process at a time writes it, a later run goes on in it, whole it becomes `out`."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megatron_prism.core import log
from megatron_prism.core.errors import EnvironmentFault, InputError, Problem

LOCK = ".lock"


@contextmanager
def folder(out: Path) -> Iterator[Path]:
    """Yield `out`.partial, which becomes `out` on a clean exit; on any other it stays where it holds whole shards, and else goes away.

    Raises: InputError where another process writes it; EnvironmentFault where the disk is full or cannot be written.
    """
    out = out.absolute()
    work = out.with_name(f"{out.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with (work / LOCK).open("a+") as lock:
            _take(lock, work)
            try:
                yield work
                _sync(work)
                work.rename(out)
                (out / LOCK).unlink()
                _sync(out.parent)
            except BaseException:
                _leave(work)
                raise
    except OSError as error:  # readers raise InputError: what is left is writing
        raise EnvironmentFault(f"{error.filename or work}: {error.strerror or error}; nothing was written to {out}") from error


def tidy(work: Path, num_shards: Mapping[str, int]) -> None:
    """Remove what only going on needs, and what an earlier config left there: other sources, and shards beyond those of a source."""
    for folder in [path for path in work.iterdir() if path.is_dir()]:
        if folder.name not in num_shards:
            shutil.rmtree(folder)
            continue
        for path in folder.iterdir():
            number, _, rest = path.name.partition(".")
            if rest == "keys.npy" or (number.isdigit() and int(number) >= num_shards[folder.name]):
                path.unlink()


def _take(lock: TextIO, work: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise InputError(Problem(str(work), f"a folder that {holder} writes", "one prism prepare at a time", "wait for it, or choose another out")) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()


def _leave(work: Path) -> None:
    num_shards = sum(1 for path in work.glob("*/*.json"))
    if num_shards:
        log.get().warning("%d whole shards stay in %s: run the same command again to go on from them", num_shards, work)
    else:
        shutil.rmtree(work, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
