"""The folder of an evaluation: results.jsonl, summary.json and manifest.json, and beside them what is kept of samples and grades.

The manifest says from the start which model it is of, and a folder is one model's. results.jsonl and summary.json are written whole at the end,
in the order of the config's tasks; summary.json holds the sum of results.jsonl, so that the two are one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_prism.core import disk
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.manifest import read_json, sha256_file, write_json
from megatron_prism.eval.question import Result, to_line

RESULTS, SUMMARY, MANIFEST, LOCK = "results.jsonl", "summary.json", "manifest.json", ".lock"
SAMPLES, GRADES, TASKS, ANSWERS = "samples", "grades", "tasks", "answers"  # folders of what is kept (cache.py)
KIND = "evaluation"
AGAIN = "start prism evaluate again: it goes on"


@contextmanager
def held(root: Path, describe: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Hold an evaluation's folder for this process, and write the manifest of a new one.

    Raises: EnvironmentFault where another process evaluates there, or it cannot be written. InputError where it is another model's.
    """
    with disk.writing(root):
        root.mkdir(parents=True, exist_ok=True)
        with disk.held(root / LOCK, "prism evaluate"):
            described, begun_as = describe(), begun(root)
            if begun_as is None:
                write_json(root / MANIFEST, described)
            elif begun_as["model"]["sha256"] != described["model"]["sha256"]:
                found, required = (
                    f"the evaluation of {begun_as['model'].get('path')}",
                    f"that of {described['model'].get('path')}, whose weights differ",
                )
                raise InputError(Problem(f"out ({root})", found, required, "choose another out"))
            yield


def begun(root: Path) -> Mapping[str, Any] | None:
    """Return the manifest of an evaluation that has begun in a folder. None: the folder is new or empty.

    Raises: InputError where the folder holds anything else.
    """
    if not root.exists():
        return None
    problem = Problem(f"out ({root})", "files that prism evaluate did not write", "a new folder, or an evaluation's", "choose another out")
    if not root.is_dir():
        raise InputError(problem)
    if not (root / MANIFEST).is_file():
        if any(path.name != LOCK and not path.name.endswith(".tmp") for path in root.iterdir()):
            raise InputError(problem)
        return None
    try:
        described = read_json(root / MANIFEST)
        if described["kind"] != KIND or not isinstance(described["model"]["sha256"], str):
            raise InputError(problem)
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(problem) from None
    return described


def finish(root: Path, results: Iterable[Result], summary: Mapping[str, Any]) -> None:
    """Write results.jsonl, then summary.json with its sum. A kill between the two is seen by `summary_of`, and made good by the next start."""
    temporary = root / f".{RESULTS}.{os.getpid()}.tmp"
    with disk.writing(root):
        try:
            with temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:  # a lone surrogate becomes JSON's own escape
                stream.writelines(map(to_line, results))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(root / RESULTS)
        finally:
            temporary.unlink(missing_ok=True)
        write_json(root / SUMMARY, {**summary, "results_sha256": sha256_file(root / RESULTS)})
        disk.sync([root])


def summary_of(root: Path) -> Mapping[str, Any]:
    """Return the summary of an evaluation that has ended. Raises: InputError where it has not, or results.jsonl is not as it was written."""
    where = str(root / SUMMARY)
    try:
        summary = read_json(root / SUMMARY)
        if summary["kind"] != KIND:
            raise InputError(Problem(where, f"a summary of kind {summary['kind']!r}", "that of an evaluation"))
        sha256 = sha256_file(root / RESULTS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(Problem(where, f"{type(error).__name__}: {error}", "the summary of an evaluation that has ended", AGAIN)) from None
    if sha256 != summary["results_sha256"]:
        raise InputError(Problem(str(root / RESULTS), f"sha256 {sha256}", f"{summary['results_sha256']}, as {SUMMARY} says", AGAIN))
    return summary
