"""Which changes of the report are paired by question, and what it says of those that are not."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prism.report import read
from megatron_prism.report.document import Measured, Table
from megatron_prism.report.material import Evaluation, Material
from megatron_prism.report.sections import benchmarks
from tests.unit.report.study import task, write

OLD, NEW = range(50), range(52)  # of 100 questions, those that are right
PAIRED = 1.959964 * 100 * (0.02 * 0.98 / 99) ** 0.5  # two are won and none lost: half of the interval


def evaluation(model: str, name: str, right: Collection[int], first: int = 0, stage: str = "") -> Evaluation:
    questions = {str(first + number): float(number in right) for number in range(100)}
    of = task(len(right) / 100) | {"standard_error": 0.05, "num_questions": 100}
    return Evaluation(model, stage or model, Path(), "", True, {name: of}, {name: questions})


def changes(*evaluations: Evaluation, num_studies: int = 1) -> Table:
    blocks = benchmarks.section([Material("results", evaluations=evaluations)] * num_studies, {}).blocks
    return next(block for block in blocks if isinstance(block, Table) and block.id == "benchmarks_change")


def halves(table: Table) -> dict[str, float]:
    """Return half of each change's interval, of the only row."""
    (row,) = table.rows
    cells = {column.name: cell for column, cell in zip(table.columns, row, strict=True)}
    return {name: cell.high - cell.value for name, cell in cells.items() if isinstance(cell, Measured) and cell.high is not None}


def test_each_evaluation_of_a_model_is_paired_and_so_is_a_task_that_it_has_twice() -> None:
    base, mid = (
        [evaluation(model, "math", right), evaluation(model, "code", right), evaluation(model, "math", right, first=500)]
        for model, right in (("base", OLD), ("mid", NEW))
    )
    assert halves(changes(*base, *mid)) == pytest.approx(dict.fromkeys(("math", "code", "math (2)"), PAIRED))
    other = evaluation("mid", "math", NEW, first=501)  # the control: the second time not the same questions
    assert halves(changes(*base, *mid[:2], other))["math (2)"] > 5 * PAIRED


def write_scored(folder: Path, right: Collection[int], text: str = "") -> Path:
    lines = [{"task": "math", "id": str(number), "sample": 0, "score": float(number in right), "text": text} for number in range(100)]
    of = task(len(right) / 100) | {"standard_error": 0.05, "num_questions": 100}
    write(folder / "summary.json", {"kind": "evaluation", "model": {"sha256": folder.name}, "tasks": {"math": of}})
    with (folder / "results.jsonl").open("w") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def read_changes(*folders: Path) -> tuple[Table, tuple[str, ...]]:
    (one,) = read.read(folders)
    return changes(*one.evaluations), one.told


def test_results_of_any_size_are_paired(tmp_path: Path) -> None:
    base, mid = write_scored(tmp_path / "base", OLD), write_scored(tmp_path / "mid", NEW, "x" * 2_800_000)
    assert (mid / "results.jsonl").stat().st_size > 1 << 28  # more than any other JSON of a report may have
    table, told = read_changes(base, mid)
    (mid / "results.jsonl").unlink()
    assert halves(table) == pytest.approx({"math": PAIRED}) and not table.note and not told


def test_a_change_that_is_not_paired_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, mid = write_scored(tmp_path / "base", OLD), write_scored(tmp_path / "mid", NEW)
    whole = (mid / "results.jsonl").read_text()
    for text, why, is_told in (
        (whole, "", False),
        (None, "one of the two has no scores by question", False),
        (f'{whole}{{"task": "ma', "one of the two has no scores by question", True),
        (whole.replace('"id": "7"', '"id": "700"'), "not the same questions", False),
        (whole.splitlines()[0], "not the same questions", False),
    ):
        (mid / "results.jsonl").unlink(missing_ok=True)
        if text is not None:
            write(mid / "results.jsonl", text)
        table, told = read_changes(base, mid)
        assert (halves(table)["math"] == pytest.approx(PAIRED)) is (why == "")
        assert table.note == (f"Taken as independent: {why} (mid since base: math)." if why else "")
        assert [line.partition(" (")[0] for line in told] == ["mid: results.jsonl is damaged"] * is_told
    write(mid / "results.jsonl", whole)
    monkeypatch.setattr(read, "MAX_LINE_CHARS", 60)  # a line of another file's size is not read whole
    assert "line 1 is no whole JSON object" in read_changes(base, mid)[1][0]


def test_why_changes_are_not_paired_is_said_once_for_all_of_them() -> None:
    models = {"base": ("math", "code"), "mid": ("math", "code"), "other": ("code",)}
    evaluations = [replace(evaluation(model, name, OLD), questions={}) for model, names in models.items() for name in names]
    elsewhere = evaluation("base", "chem", OLD), evaluation("mid", "chem", OLD)
    elsewhere[1].tasks["chem"]["set"]["sha256"] = "b"  # type: ignore[index]
    assert changes(*evaluations, *elsewhere).note == (
        "Taken as independent: one of the two has no scores by question (mid since base: math, code; other since base: code); "
        "not the same set (mid since base: chem)."
    )
    assert not changes(*evaluations, num_studies=2).note  # whose interval is that of the seeds
