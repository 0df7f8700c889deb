"""What the disk promises: one process at a time in a folder, and that what was written stays."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_prism.core import log
from megatron_prism.core.errors import InputError, Problem


@contextmanager
def held(path: Path, job: str) -> Iterator[None]:
    """Hold the lock file `path`, which says who does; the kernel lets go of it when its holder ends, however it ends.

    Raises: InputError where another process holds it. OSError where it cannot be written.
    """
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise InputError(Problem(str(path.parent), f"a folder that {holder} writes", f"one {job} at a time", "wait for it, or choose another")) from None
        except OSError as error:
            log.get().warning("%s: this file system has no locks (%s): make sure that no other %s writes there", path, error.strerror, job)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def sync(paths: Iterable[Path]) -> None:
    """Bring files and folders to the disk (fsync)."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
