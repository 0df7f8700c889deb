"""The work folder beside `out`. One process at a time writes it, a later run resumes in it, and the whole mixture is renamed to `out`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_prism.core import disk, log
from megatron_prism.core.errors import EnvironmentFault, InputError

LOCK = ".lock"


@contextmanager
def folder(out: Path) -> Iterator[Path]:
    """Yield `out`.partial, which becomes `out` on a clean exit. On an error it is kept if it holds whole shards, else removed.

    Raises: EnvironmentFault where another process writes it, or the disk is full or cannot be written. InputError where `out` is a mount point.
    """
    out = out.resolve()  # beside a link would be another disk than the one that it leads to
    if problem := disk.unfit_output(out):
        raise InputError(problem)
    work = out.with_name(f"{out.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with disk.held(work / LOCK, "prism prepare"):
            try:
                yield work
                disk.sync([work])
                work.rename(out)
                (out / LOCK).unlink()
                disk.sync([out.parent])
            except BaseException:
                _leave(work)
                raise
    except OSError as error:  # readers raise InputError, so this came from writing
        raise EnvironmentFault(f"{error.filename or work}: {error.strerror or error}; nothing was written to {out}") from error


def tidy(work: Path, num_shards: Mapping[str, int]) -> None:
    """Remove what only a resume needs, and the leftovers of an earlier config: other sources, and surplus shards of a source."""
    for folder in [path for path in work.iterdir() if path.is_dir()]:
        if folder.name not in num_shards:
            shutil.rmtree(folder)
            continue
        for path in folder.iterdir():
            number, _, rest = path.name.partition(".")
            if rest == "keys.npy" or (number.isdigit() and int(number) >= num_shards[folder.name]):
                path.unlink()


def _leave(work: Path) -> None:
    num_shards = sum(1 for path in work.glob("*/*.json"))
    if num_shards:
        log.get().warning("%d whole shards stay in %s: run the same command again to go on from them", num_shards, work)
    else:
        shutil.rmtree(work, ignore_errors=True)
