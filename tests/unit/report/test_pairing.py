"""Which changes of the report are paired by question, and what it says of those that are not."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from megatron_prism.report.document import Measured, Table
from megatron_prism.report.material import Evaluation, Material
from megatron_prism.report.sections import benchmarks
from tests.unit.report.study import task

OLD, NEW = range(50), range(52)  # of 100 questions, those that are right
PAIRED = 1.959964 * 100 * (0.02 * 0.98 / 99) ** 0.5  # two are won and none lost: half of the interval


def evaluation(model: str, name: str, right: Collection[int], first: int = 0, stage: str = "") -> Evaluation:
    questions = {str(first + number): float(number in right) for number in range(100)}
    of = task(len(right) / 100) | {"standard_error": 0.05, "num_questions": 100}
    return Evaluation(model, stage or model, Path(), "", True, {name: of}, {name: questions})


def changes(*evaluations: Evaluation) -> Table:
    blocks = benchmarks.section([Material("results", evaluations=evaluations)], {}).blocks
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
