"""The sums of what a task is given and of what it gives: of words, of files, and of folders by what they say of themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import folder
from megatron_prism.checkpoint.integrity import SUMS
from megatron_prism.core.manifest import read_json, sha256_file, sha256_json, write_json

VOLATILE = ("created", "versions", "git_commit")  # keys of a manifest that say when it was made, and not of what
PREPARED, EVALUATION = ("manifest.json", "prepared"), ("summary.json", "evaluation")
PASSED_OVER = ("tensorboard", "slurm", "__pycache__")
MAX_JSON_BYTES = 1 << 24


class FileSums:
    """The sums of files, kept by path, size and time of change, so that a file of several GB is read once. Several jobs may keep theirs."""

    def __init__(self, path: Path):
        self._path, self._kept = path, _kept(path)
        self._new: dict[str, list[Any]] = {}

    def of_file(self, path: Path) -> str:
        """Return the sum of a file; of a manifest, without what says when it was made."""
        facts = path.stat()
        key = [facts.st_size, facts.st_mtime_ns]
        kept = self._kept.get(str(path.absolute()))
        if kept is not None and kept[:2] == key:
            return str(kept[2])
        is_manifest = path.suffix == ".json" and facts.st_size < MAX_JSON_BYTES
        total = (_of_manifest(path) if is_manifest else None) or sha256_file(path)
        self._new[str(path.absolute())] = self._kept[str(path.absolute())] = [*key, total]
        return total

    def save(self) -> None:
        """Keep the sums for the next start, beside those that another job has kept meanwhile."""
        if self._new:
            write_json(self._path, {"files": _kept(self._path) | self._new})
            self._new = {}


def _kept(path: Path) -> dict[str, list[Any]]:
    """Return the sums of a file; none where it is not there or damaged: it only saves time."""
    try:
        listed = dict(read_json(path)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: kept for name, kept in listed.items() if isinstance(kept, list) and len(kept) == 3}


def _of_manifest(path: Path) -> str | None:
    """Return the sum of a JSON object that says when it was made, without that. None: it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or VOLATILE[0] not in values:
        return None
    return sha256_json({key: value for key, value in values.items() if key not in VOLATILE})


def of_output(path: Path, files: FileSums) -> str | None:
    """Return the sum of a file or a folder; None where it is not there or is empty.

    A sealed folder's is that of its SHA256SUMS, a run's that of its newest checkpoint, a mixture's and an evaluation's that of the file which holds
    the sums of the others. Of any other folder every file is read, once.
    """
    if path.is_file():
        return files.of_file(path)
    if not path.is_dir():
        return None
    for place in (path, *reversed(folder.steps(path / "checkpoints"))):
        if (place / SUMS).is_file():
            return files.of_file(place / SUMS)
    for name, kind in (PREPARED, EVALUATION):
        if _kind(path / name) == kind:
            return files.of_file(path / name)
    listed = {name: files.of_file(path / name) for name in _files(path)}
    return sha256_json(listed) if listed else None


def is_there(path: Path) -> bool:
    """Say whether `of_output` would return a sum, without reading a file's contents."""
    return path.is_file() or any(True for _ in _files(path))


def _kind(path: Path) -> Any:
    try:
        return read_json(path).get("kind") if path.is_file() else None
    except (OSError, ValueError, AttributeError):
        return None


def _files(root: Path) -> Iterator[str]:
    """Yield the paths of a folder's files within it, but not locks and files that are being written."""
    for here, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in PASSED_OVER)
        for name in sorted(names):
            path = Path(here, name)
            if name != ".lock" and not name.endswith(".tmp") and path.is_file():
                yield str(path.relative_to(root))


def of_paths(paths: Iterable[Path], files: FileSums) -> dict[str, str]:
    """Return the sum of each file and folder that is there, by its path."""
    return {str(path): total for path in paths if (total := of_output(path, files)) is not None}
