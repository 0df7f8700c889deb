"""Whether a checkpoint folder still holds what was written: SHA256SUMS lists every other file in it (`sha256sum -c SHA256SUMS`).

Megatron-Core silently loads a flipped bit, or files of two saves mixed. So a folder is sealed when it is whole, and checked before
anything in it is loaded. The check reads bytes and unpickles nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_prism.core import disk
from megatron_prism.core.errors import EnvironmentFault, Problem
from megatron_prism.core.manifest import sha256_file

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)\n")


def seal(root: Path, known: Mapping[str, str] | None = None) -> None:
    """Write SHA256SUMS over all files of a folder, and sync files and folders to the disk.

    known: the sums of files that their writers, perhaps on other nodes, have hashed and synced already, by path within the folder.
    """
    known = known or {}
    for path in known:
        disk.await_path(root / path)
    paths = sorted({*_files(root), *known})  # a network file system may list a file late
    ours = [path for path in paths if path not in known]
    with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
        hashed = dict(zip(ours, pool.map(lambda path: sha256_file(root / path), ours), strict=True))
    sums = {**{path: known[path] for path in paths if path in known}, **hashed}
    (root / SUMS).write_text("".join(f"{sums[path]}  {path}\n" for path in paths), encoding="utf-8")
    disk.sync([root / path for path in (*ours, SUMS)])
    disk.sync(sorted({root, *((root / path).parent for path in paths)}))


def check(root: Path, rank: int = 0, world_size: int = 1) -> list[Problem]:
    """Return what is wrong with a sealed folder. Several ranks share the work: each hashes its part of the files, all compare the names.

    Raises: EnvironmentFault where the folder cannot be read now. Nothing is then known about it.
    """
    try:
        sums = _read(root / SUMS)
        present = _files(root)
    except OSError as error:
        return [_absent(error, root / SUMS, "the sums of a whole checkpoint")]
    except ValueError as error:
        return [Problem(str(root / SUMS), str(error), "a sha256 and a path a line")]
    problems = [Problem(str(root / path), "no such file", f"the file that {SUMS} lists") for path in sums if path not in present]
    problems += [Problem(str(root / path), f"a file that {SUMS} does not list", "no other files") for path in present if path not in sums]
    mine = _share(root, [path for path in present if path in sums], rank, world_size)
    with ThreadPoolExecutor(4) as pool:
        problems += [problem for problem in pool.map(lambda path: _check_file(root / path, sums[path]), mine) if problem]
    return problems


def _check_file(path: Path, sha256: str) -> Problem | None:
    if path.is_symlink() or not path.is_file():
        return Problem(str(path), "a link, or no file at all", "a file")
    try:
        actual = sha256_file(path)
    except OSError as error:
        return _absent(error, path, "a file that can be read")
    return (
        None if actual == sha256 else Problem(str(path), f"sha256 {actual}", f"{sha256}, as {SUMS} says", "the file was changed or damaged")
    )


def _absent(error: OSError, path: Path, required: str) -> Problem:
    if error.errno not in disk.NOT_THERE:
        unknown = f"{error.filename or path}: {error.strerror or error}: whether the checkpoint is whole is unknown"
        raise EnvironmentFault(
            f"{unknown}; if it stays so, move that folder away by hand, and the run resumes from the one before"
        ) from error
    return Problem(str(path), error.strerror or str(error), required)


def _share(root: Path, paths: Sequence[str], rank: int, world_size: int) -> list[str]:
    """Return one rank's files: dealt out in order of size."""
    ordered = sorted(paths, key=lambda path: ((root / path).lstat().st_size, path))
    return ordered[rank::world_size]


def _read(path: Path) -> dict[str, str]:
    """Read SHA256SUMS strictly: every byte of it counts.

    Raises: ValueError, OSError.
    """
    text = path.read_bytes().decode("utf-8")
    sums: dict[str, str] = {}
    position = 0
    while position < len(text):
        line = _LINE.match(text, position)
        if line is None or line[2] in sums:
            raise ValueError(f"line {len(sums) + 1}: {text[position : position + 80]!r}")
        sums[line[2]] = line[1]
        position = line.end()
    if not sums:
        raise ValueError("no lines")
    return sums


def _files(root: Path) -> list[str]:
    """Return the paths of all files below a folder but SHA256SUMS. A link, or a file of another kind, is listed too, and then fails the check."""
    paths: list[str] = []
    for folder, names, files in os.walk(root, onerror=_raise):
        here = Path(folder)
        links = [name for name in names if (here / name).is_symlink()]
        paths += [str((here / name).relative_to(root)) for name in (*files, *links)]
    return sorted(path for path in paths if path != SUMS)


def _raise(error: OSError) -> None:
    raise error
