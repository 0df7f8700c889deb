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

from megatron_prism.core import disk, resumable
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.manifest import read_json, sha256_file, write_json
from megatron_prism.eval.question import Result, to_line

RESULTS, SUMMARY, MANIFEST = "results.jsonl", "summary.json", resumable.MANIFEST
SAMPLES, GRADES, TASKS, ANSWERS = "samples", "grades", "tasks", "answers"  # folders of what is kept (cache.py)
KIND, COMMAND = "evaluation", "prism evaluate"
AGAIN = "start prism evaluate again: it goes on"


@contextmanager
def held(root: Path, describe: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Hold an evaluation's folder for this process, and write the manifest of a new one.

    Raises: EnvironmentFault where another process evaluates there, or it cannot be written. InputError where it is another model's.
    """
    described = describe()
    with resumable.held(root, KIND, COMMAND, lambda: described):
        begun_as = begun(root)
        assert begun_as is not None
        if begun_as["model"]["sha256"] != described["model"]["sha256"]:
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
    described = resumable.begun(root, KIND, COMMAND)
    model = None if described is None else described.get("model")
    if described is not None and not (isinstance(model, Mapping) and isinstance(model.get("sha256"), str)):
        raise InputError(Problem(f"out ({root})", "a manifest without the sum of a model", f"that of {COMMAND}", "choose another out"))
    return described


def finish(root: Path, results: Iterable[Result], summary: Mapping[str, Any]) -> None:
    """Write results.jsonl, then summary.json with its sum. A kill between the two is seen by `summary_of`, and made good by the next start."""
    with disk.writing(root):
        with disk.replacing(root / RESULTS) as (temporary,), temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.writelines(map(to_line, results))  # a lone surrogate becomes JSON's own escape
        write_json(root / SUMMARY, {**summary, "results_sha256": sha256_file(root / RESULTS)})
        disk.sync([root])


def summary_of(root: Path) -> Mapping[str, Any]:
    """Return the summary of an evaluation that has ended. Raises: InputError where it has not, or results.jsonl is not as it was written."""
    where = str(root / SUMMARY)
    try:
        with disk.reading(root):
            summary = read_json(root / SUMMARY)
        if summary["kind"] != KIND:
            raise InputError(Problem(where, f"a summary of kind {summary['kind']!r}", "that of an evaluation"))
        for task, part in summary["tasks"].items():
            if not all(isinstance(value, Mapping) for value in (part, part.get("protocol") or {}, part.get("set") or {})):
                raise InputError(Problem(f"{where}:tasks.{task}", "a protocol or a set that is no object", "a task as evaluate writes it"))
        with disk.reading(root):
            sha256, written = sha256_file(root / RESULTS), summary["results_sha256"]
    except OSError as error:
        fix = AGAIN if os.path.isfile(root / MANIFEST) else f"{COMMAND} makes one"
        raise InputError(Problem(str(root), disk.unread(root, error), "the folder of an evaluation that has ended", fix)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(Problem(where, f"{type(error).__name__}: {error}", "the summary of an evaluation that has ended", AGAIN)) from None
    if sha256 != written:
        raise InputError(Problem(str(root / RESULTS), f"sha256 {sha256}", f"{written}, as {SUMMARY} says", AGAIN))
    return summary
