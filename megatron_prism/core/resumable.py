"""A folder that a command fills over several starts: its manifest says from the start what it is of, and one process at a time holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_prism.core import disk
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.manifest import read_json, write_json

MANIFEST, LOCK = "manifest.json", ".lock"


@contextmanager
def held(root: Path, kind: str, command: str, describe: Callable[[], Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Hold a folder for this process, and yield its manifest, which is written where the folder is new. kind: the manifest's.

    Raises: EnvironmentFault where another process holds it, or it cannot be written. InputError where it holds anything else.
    """
    with disk.writing(root):
        root.mkdir(parents=True, exist_ok=True)
        with disk.held(root / LOCK, command):
            described = begun(root, kind, command)
            if described is None:
                described = describe()
                write_json(root / MANIFEST, described)
            yield described


def begun(root: Path, kind: str, command: str) -> Mapping[str, Any] | None:
    """Return the manifest of what a command has begun in a folder. None: the folder is new or empty.

    Raises: InputError where the folder holds anything else.
    """
    if not root.exists():
        return None
    problem = Problem(
        f"out ({root})", f"files that {command} did not write", f"a new folder, or one that {command} began", "choose another out"
    )
    if not root.is_dir():
        raise InputError(problem)
    if not (root / MANIFEST).is_file():
        if any(path.name != LOCK and not path.name.endswith(".tmp") for path in root.iterdir()):
            raise InputError(problem)
        return None
    try:
        described = read_json(root / MANIFEST)
        is_kind = described["kind"] == kind
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(problem) from None
    if not is_kind:
        raise InputError(problem)
    return described
