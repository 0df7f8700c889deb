"""What is kept of a task: FOLDER/{record.json, result.json, log.txt}; and what follows from it: whether the task runs again, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from megatron_prism.core.errors import InputError, Problem
from megatron_prism.core.load import build
from megatron_prism.core.manifest import read_json, write_json

FOLDER, STUDY, LOCK, SUMS = "study", "study.json", ".lock", "sums.json"
RECORD, RESULT, LOG = "record.json", "result.json", "log.txt"
KIND = "study stage"
State = Literal["submitted", "running", "done", "no-go", "failed", "stopped"]
WORDS = ("command", "config")  # the inputs that are a task's own words
ENDED: tuple[State, ...] = ("done", "no-go")


@dataclass(frozen=True, kw_only=True)
class Record:
    """How a task began, and how it ended. inputs: the sum of each; of one that is submitted to Slurm, of those that are known by then.

    output_sum: None until it has ended well.
    seconds, cpu_s, num_starts: of all starts with these inputs.
    """

    state: State
    inputs: dict[str, str] = field(default_factory=dict)
    output: str | None = None
    output_sum: str | None = None
    started: str = ""
    ended: str | None = None
    seconds: float = 0.0
    cpu_s: float = 0.0
    num_starts: int = 0
    exit_code: int | None = None
    failure: str | None = None


def read(folder: Path) -> Record | None:
    """Return the record of a task, None where it never began. Raises: InputError where it cannot be read."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        if values["kind"] != KIND:
            raise ValueError(f"kind {values['kind']!r}")
        return build({item.name: values[item.name] for item in fields(Record)}, Record, lambda key: ".".join(map(str, key)))
    except (OSError, ValueError, KeyError, TypeError, InputError) as error:
        fix = "remove it: the stage then runs again, where its output is removed too"
        raise InputError(Problem(str(path), f"{type(error).__name__}: {error}", "the record of a stage", fix)) from None


def write(folder: Path, record: Record) -> None:
    """Write the record of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, {"kind": KIND, **asdict(record)})


def result(folder: Path) -> dict[str, Any] | None:
    """Return a task's result; None where there is none, or none that is whole JSON."""
    try:
        return dict(read_json(folder / RESULT))
    except (OSError, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class Decision:
    """Whether a task runs, why, and what becomes of an output that is there: kept (a job resumes in it), removed, or put aside."""

    runs: bool
    reason: str = ""
    output: Literal["keep", "remove", "aside"] = "keep"


def decide(record: Record | None, inputs: Mapping[str, str], output_sum: str | None, resumes: bool, grows: bool = False) -> Decision:
    """Say whether a task runs. inputs: the sums now. output_sum: of the output now; None where it is not there. resumes: its job goes on by itself.

    An output of other inputs is put aside, never resumed; but one that grows is kept where its words alone changed, for its job takes from it only
    what is the same. One of the same inputs that was not finished is resumed, or else removed.
    """
    if record is None:
        return Decision(True, "not run yet")
    known = inputs if record.state != "submitted" else {name: inputs[name] for name in record.inputs if name in inputs}
    if differing := differences(record.inputs, known):
        return Decision(True, f"changed: {', '.join(differing)}", "keep" if grows and {*differing} <= {*WORDS} else "aside")
    if record.state not in ENDED:
        words = {"running": "was interrupted", "failed": "failed", "stopped": "was stopped", "submitted": "was submitted, and is not done"}[
            record.state
        ]
        return Decision(True, f"it {words}", "keep" if resumes else "remove")
    if record.output_sum is not None and output_sum is None:
        return Decision(True, "its output or its result is not there any more", "keep" if resumes else "remove")
    return Decision(False)


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the inputs that are others than they were, that are new, or that are gone."""
    return [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
