"""What a record says of a task's next start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.errors import InputError
from megatron_prism.study import record
from megatron_prism.study.record import Decision, Record, decide

INPUTS = {"command": "1", "output of a": "2"}
CHANGED = {"command": "1", "output of a": "3"}


def kept(state: Any, **more: Any) -> Record:
    return Record(**({"state": state, "inputs": INPUTS, "output_sum": "x" if state in record.ENDED else None} | more))


@pytest.mark.parametrize(
    ("before", "inputs", "output_sum", "resumes", "decision"),
    [
        (None, INPUTS, None, False, Decision(True, "not run yet")),
        (kept("done"), INPUTS, "x", False, Decision(False)),
        (kept("no-go"), INPUTS, "x", False, Decision(False)),
        (kept("done"), INPUTS, "y", False, Decision(False)),  # what follows is told by its own inputs
        (kept("done"), CHANGED, "x", True, Decision(True, "changed: output of a", "aside")),  # never resumed with other data
        (kept("running"), CHANGED, "x", True, Decision(True, "changed: output of a", "aside")),
        (kept("done"), {**INPUTS, "new": "4"}, "x", False, Decision(True, "changed: new", "aside")),
        (kept("done"), {"command": "1"}, "x", False, Decision(True, "changed: output of a", "aside")),
        (kept("running"), INPUTS, "x", True, Decision(True, "it was interrupted")),
        (kept("running"), INPUTS, "x", False, Decision(True, "it was interrupted", "remove")),
        (kept("failed"), INPUTS, None, False, Decision(True, "it failed", "remove")),
        (kept("stopped"), INPUTS, "x", True, Decision(True, "it was stopped")),
        (kept("done"), INPUTS, None, False, Decision(True, "its output or its result is not there any more", "remove")),
        (kept("done"), INPUTS, None, True, Decision(True, "its output or its result is not there any more")),
    ],
)
def test_whether_a_task_runs_and_what_becomes_of_its_output(
    before: Record | None, inputs: dict[str, str], output_sum: str | None, resumes: bool, decision: Decision
) -> None:
    assert decide(before, inputs, output_sum, resumes) == decision


@pytest.mark.parametrize(
    ("differing", "output"), [("config", "keep"), ("command", "keep"), ("output of a", "aside"), ("policy.yaml", "aside")]
)
def test_an_output_that_grows_is_kept_where_the_words_alone_changed(differing: str, output: str) -> None:
    assert decide(kept("done"), {**INPUTS, differing: "9"}, "x", True, grows=True) == Decision(True, f"changed: {differing}", output)
    assert decide(kept("done"), {**INPUTS, differing: "9"}, "x", True).output == "aside"


def test_a_record_is_read_as_it_was_written_and_no_other_file_is_one(tmp_path: Path) -> None:
    assert record.read(tmp_path / "a") is None
    whole = kept("done", seconds=1.5, num_starts=2, exit_code=0)
    record.write(tmp_path / "a", whole)
    assert record.read(tmp_path / "a") == whole
    text = (tmp_path / "a" / record.RECORD).read_text()
    for damaged in (
        text[: len(text) // 2],
        text.replace(record.KIND, "other"),
        text.replace("num_starts", "num"),
        "[]",
        text.replace("done", "dne"),
        text.replace("1.5", '"x"'),
    ):
        (tmp_path / "a" / record.RECORD).write_text(damaged)
        with pytest.raises(InputError, match="the record of a stage"):
            record.read(tmp_path / "a")
