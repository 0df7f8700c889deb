"""Locks and fsync: one process at a time in a folder, and what was written stays written."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_prism.core import log
from megatron_prism.core.errors import EnvironmentFault


@contextmanager
def held(path: Path, job: str) -> Iterator[None]:
    """Hold the lock file `path`, which names its holder. The kernel releases it when the holder ends, however it ends.

    The lock belongs to this process only. A forked child does not inherit it (lockf; flock would), so a child that outlives the run
    does not block the next one.
    Raises: EnvironmentFault where another process holds it. OSError where it cannot be written.
    """
    with path.open("a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of them is the file system's choice
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise EnvironmentFault(
                f"{path.parent}: {holder} writes there: one {job} at a time; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            log.get().warning("%s: this file system has no locks (%s): make sure that no other %s writes there", path, error.strerror, job)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def is_held(path: Path) -> bool:
    """Say whether another process holds the lock file `path`.

    Never call this from the process that holds the lock: closing the file would release it.
    """
    try:
        with path.open("r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no such file, or no locks
        return False
    return False


def await_path(path: Path, timeout_s: float = 90.0) -> None:
    """Wait until a path that another node has made appears here. A network file system may hide it for a minute.

    Raises: FileNotFoundError where it does not appear.
    """
    end = time.monotonic() + timeout_s
    while not os.path.lexists(path):
        if time.monotonic() > end:
            raise FileNotFoundError(errno.ENOENT, "what another process has written does not appear here", str(path))
        time.sleep(0.2)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block, give an error of the operating system a message that names the file, or the path where the error does not.

    Raises: EnvironmentFault where the disk is full or cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(f"{error.filename or path}: {error.strerror or error}") from error


def sync(paths: Iterable[Path]) -> None:
    """Sync files and folders to the disk (fsync)."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
