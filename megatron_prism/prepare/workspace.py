"""The work folder beside `out`, which a later run resumes in, and which is renamed to `out` when the mixture is whole.

One process at a time writes it, or several tasks, each its own shards.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_prism.core import disk, log
from megatron_prism.core.errors import EnvironmentFault, InputError
from megatron_prism.prepare import duplicates, limits, shards

LOCK, TASK_LOCK = ".lock", ".task{}.lock"


@contextmanager
def folder(out: Path) -> Iterator[Path]:
    """Yield `out`.partial, which becomes `out` on a clean exit. On an error it is kept if it holds whole shards, else removed.

    Raises: EnvironmentFault where another process writes it, or the disk is full or cannot be written. InputError where `out` is a mount point.
    """
    with _held(out, LOCK, TASK_LOCK.format("*")) as (work, out):
        try:
            yield work
            disk.sync([work])
            work.rename(out)
            for lock in out.glob(".*lock"):
                lock.unlink()
            disk.sync([out.parent])
        except BaseException:
            _leave(work)
            raise


@contextmanager
def of_task(out: Path, task: int) -> Iterator[Path]:
    """Yield `out`.partial for one of several tasks that write it at the same time. It stays as it is.

    Raises: EnvironmentFault where the same task runs already, or the mixture is being finished, or the disk is full or cannot be written.
    """
    with _held(out, TASK_LOCK.format(task), LOCK) as (work, _):
        yield work


@contextmanager
def _held(out: Path, lock: str, other: str) -> Iterator[tuple[Path, Path]]:
    """Yield `out`.partial and `out` while `lock` is held and none of the `other` locks is. Both sides take their own before they look."""
    out = out.resolve()  # beside a link would be another disk than the one that it leads to
    if problem := disk.unfit_output(out):
        raise InputError(problem)
    work = out.with_name(f"{out.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with disk.held(work / lock, "prism prepare"):
            if held := [path for path in work.glob(other) if disk.is_held(path)]:
                raise EnvironmentFault(
                    f"{work}: {held[0].read_text() or 'another process'} writes there; wait for it, or choose another out"
                )
            yield work, out
    except OSError as error:  # readers raise InputError, so this came from writing
        raise EnvironmentFault(f"{error.filename or work}: {error.strerror or error}; nothing was written to {out}") from error


def tidy(work: Path, num_shards: Mapping[str, int], num_tables: Mapping[str, int]) -> None:
    """Remove what only a resume needs, and the leftovers of an earlier config: other sources, and surplus shards of a source.

    num_tables: of each source, how many shards' tables stay, for a later mixture that reads more of it.
    """
    for folder in [path for path in work.iterdir() if path.is_dir()]:
        if folder.name not in num_shards:
            shutil.rmtree(folder)
            continue
        shutil.rmtree(folder / duplicates.SCRATCH, ignore_errors=True)
        for path in folder.iterdir():
            number, _, rest = path.name.partition(".")
            is_surplus = number.isdigit() and int(number) >= num_shards[folder.name]
            is_table = rest in shards.TABLES and int(number) >= num_tables[folder.name]
            is_part = number == ""  # a hidden file: what a killed process had not written whole, or a lock
            if is_surplus or is_table or is_part or path.name == limits.FILE:
                path.unlink()


def _leave(work: Path) -> None:
    num_shards = sum(1 for path in work.glob("*/*.json"))
    if num_shards:
        log.get().warning("%d whole shards stay in %s: run the same command again to go on from them", num_shards, work)
    else:
        shutil.rmtree(work, ignore_errors=True)
