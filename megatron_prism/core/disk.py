"""Locks and fsync: one process at a time in a folder, and what was written stays written."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_prism.core import log
from megatron_prism.core.errors import EnvironmentFault, Problem

SPARE_FILES = 256  # beyond those asked for: sockets, logs, the files of libraries
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)  # any other error says nothing about what a file holds
REFUSED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, None)  # None: a library's own OSError


@contextmanager
def held(path: Path, job: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, which names its holder. The kernel releases it when the holder ends, however it ends.

    wait: wait for another holder to release it, instead of raising.
    The lock belongs to this process only. A forked child does not inherit it (lockf; flock would), so a child that outlives the run
    does not block the next one.
    Raises: EnvironmentFault where another process holds it. OSError where it cannot be written.
    """
    with path.open("a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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


def link_or_copy(path: Path, to: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links or `to` is on another one."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copy2(path, to)
        sync([to])


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files, as far as it may, so that `count` more can be open. Many systems begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + count + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block, give an error of the operating system a message that names the file, or the path where the error does not.

    Raises: EnvironmentFault where the disk is full or cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(f"{error.filename or path}: {error.strerror or error}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the block, an error of the operating system other than an absent or a forbidden file is the machine's fault, and may pass.

    Raises: EnvironmentFault that names the file. OSError where the file is absent or forbidden: the input is wrong.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (*NOT_THERE, *REFUSED):
            raise
        raise EnvironmentFault(
            f"{error.filename or path}: {error.strerror}: it cannot be read now, and what it holds is unknown"
        ) from error


def unread(folder: Path, error: OSError) -> str:
    """Return in words why a file of a folder cannot be read, for a problem whose place is the folder."""
    name = Path(str(error.filename)).name if error.filename else "its files"
    if error.errno not in NOT_THERE or os.path.isdir(folder):
        return f"no {name}" if error.errno == errno.ENOENT else f"{name}: {error.strerror or error}"
    return "a file" if os.path.exists(folder) else "no such folder"


def unfit_output(path: Path) -> Problem | None:
    """Return a problem where a new folder cannot be renamed to `path`: it is where a disk is mounted."""
    if not path.resolve().is_mount():  # a link is none itself
        return None
    required = "a folder that can be made as a whole, then renamed"
    return Problem(str(path), "the mount point of a disk", required, f"choose a folder on it: {path / 'out'}")


def sync(paths: Iterable[Path]) -> None:
    """Sync files and folders to the disk (fsync)."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes. Raises: OSError that names both files: shutil's names the source, also where the target's disk is full."""
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), f"{target}, a copy of {source}") from error


def copy_tree(source: Path, target: Path) -> None:
    """Copy the files of a folder and its subfolders into `target`. Raises: OSError of the first that fails: shutil.copytree's is a list."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        if path.is_dir():
            (target / path.relative_to(source)).mkdir(parents=True, exist_ok=True)
        else:
            copy(path, target / path.relative_to(source))


@contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Yield a temporary path beside each path, to be written in the block. Then they are synced, and renamed to the paths in this order.

    A reader sees an old file or a new one, never a part. Where the block raises, no path changes. In both cases no temporary file stays.
    """
    own = secrets.token_hex(4)  # not the process's number, which a process of another node may have
    temporaries = tuple(path.with_name(f".{path.name}.{own}.tmp") for path in paths)
    try:
        yield temporaries
        sync(temporaries)
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
