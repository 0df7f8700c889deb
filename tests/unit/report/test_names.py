"""Two results of one study under one name are two results: only those of several studies (seeds) are averaged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.report import read
from megatron_prism.report.document import Measured, Section, Table, Value
from megatron_prism.report.material import Evaluation, Material, Result, Run
from megatron_prism.report.names import free
from megatron_prism.report.sections import benchmarks, changes, cost, retention, training
from tests.unit.report.study import task, weights, write, write_run

Rows = dict[str, dict[str, Value]]


def rows(section: Section, id: str) -> Rows:
    """Return a table's cells by row and column; of a measured figure its value."""
    tables = [block if isinstance(block, Table) else block.table for block in section.blocks]
    (table,) = (one for one in tables if one.id == id)
    names = [column.name for column in table.columns]
    plain = [[cell.value if isinstance(cell, Measured) else cell for cell in row] for row in table.rows]
    return {str(row[0]): dict(zip(names[1:], row[1:], strict=True)) for row in plain}


def evaluation(model: str, stage: str, tasks: Mapping[str, Any]) -> Evaluation:
    return Evaluation(model, stage, Path(), "", True, tasks)


def held_out(loss: float) -> dict[str, Any]:
    return {"score": None, "set": {"name": "held_out"}, "losses": {"math": {"loss": loss, "standard_error": 0.01, "num_sequences": 64}}}


def lm_eval(**scores: float) -> dict[str, Any]:
    parts = {name: {"score": score, "standard_error": 0.01, "num_questions": 1319} for name, score in scores.items()}
    return task(sum(scores.values()) / len(scores), "lm_eval", lm_eval={"tasks": parts})


def studies(*by_study: Sequence[Evaluation]) -> list[Material]:
    return [Material(f"seed_{number}", evaluations=tuple(own)) for number, own in enumerate(by_study)]


def test_two_evaluations_of_a_model_are_shown_beside_each_other_and_seeds_of_both_are_averaged() -> None:
    def seed(first: float, second: float) -> list[Evaluation]:
        losses = zip(("eval_8k", "eval_128k"), (first, second), strict=True)
        return [
            evaluation("mid", stage, {"losses": held_out(loss), "find_1": task(loss / 4), "find_2": task(0.5)}) for stage, loss in losses
        ]

    one, seeds = (retention.section(studies(*own), {}) for own in ([seed(1.0, 1.5)], [seed(1.0, 1.5), seed(2.0, 2.5)]))
    assert rows(one, "retention_loss") == {"mid": {"losses: math": 1.0, "losses (eval_128k): math": 1.5}}
    assert rows(seeds, "retention_loss") == {"mid": {"losses: math": 1.5, "losses (eval_128k): math": 2.0}}
    names = ("find at 1", "find at 2", "find (eval_128k) at 1", "find (eval_128k) at 2")
    assert rows(one, "retention_length") == {"mid": dict(zip(names, (25.0, 50.0, 37.5, 50.0), strict=True))}
    scores = benchmarks.section(studies(seed(1.0, 1.5)), {})
    assert rows(scores, "benchmarks")["mid"]["find_1 (eval_128k)"] == 37.5
    (table,) = (block for block in scores.blocks if isinstance(block, Table) and block.id == "benchmarks")
    assert "find_1 (eval_128k): n 150 questions x 4 responses" in table.note


def test_a_task_of_lm_eval_that_is_asked_twice_is_named_by_who_asked() -> None:
    asked = {"few": lm_eval(gsm8k=0.6, arc=0.8), "none": lm_eval(gsm8k=0.2), "arc": lm_eval(arc=0.9)}
    shown = rows(retention.section(studies([evaluation("mid", "e", asked)]), {}), "retention")["mid"]
    figures = {"few": 70.0, "gsm8k": 60.0, "arc": 80.0, "none": 20.0, "gsm8k (none)": 20.0, "arc (2)": 90.0}
    assert shown == pytest.approx(figures)
    alone = retention.section(studies([evaluation("mid", "e", {"arc": lm_eval(arc=0.9)})]), {})  # the task and its only part are one figure
    (table,) = (block for block in alone.blocks if isinstance(block, Table))
    assert table.rows == (("mid", Measured(90.0, pytest.approx(90 - 1.959964), pytest.approx(90 + 1.959964), 1319)),)


def test_two_trainings_of_one_model_are_two_runs_with_their_own_curves_and_hours(tmp_path: Path) -> None:
    stages = {}
    for number, steps in enumerate((20, 40)):
        run = write_run(tmp_path / f"mid{number}", steps)
        lines = [{"step": step, "loss": 2.0 - number, "step_s": 180.0 * (1 + number)} for step in (10, 20)]
        write(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        stages[f"mid/{number}"] = {"title": "t", "model": "mid", "job": "train", "after": [], "state": "done", "output": str(run)}
    record = {"kind": "study", "name": "s", "run_dir": str(tmp_path), "stages": stages, "claims": []}
    write(tmp_path / "study" / "study.json", record)
    of_study, of_folders = read.read([tmp_path]), read.read([write_run(tmp_path / name / "mid") for name in "ab"])
    curves = training.section(of_study, {})
    assert [row["step"] for row in rows(curves, "training_runs").values()] == ["20 of 20", "20 of 40"]
    assert list(rows(curves, "mid_loss_data").values()) == [{"mid": 2.0, "mid (mid/1)": 1.0}] * 2
    hours = {name: row["time"] for name, row in rows(cost.section(of_study, {}), "cost_runs").items()}
    assert hours == {"mid": pytest.approx(2.0), "mid (mid/1)": pytest.approx(4.0)}
    assert list(rows(cost.section(of_folders, {}), "cost_runs")) == ["mid", "mid (2)"]  # folders of one name are no seeds either


def test_rl_that_logs_every_tenth_step_has_the_tokens_of_all() -> None:
    plan = {"responses_per_step": 8, "world_size": 2}
    lines = [{"step": step, "loss": 0.1, "step_s": 36.0, "trained_tokens": 100.0, "response_tokens": 20.0} for step in (10, 20, 25)]
    run = Run("rl", "rl", is_rl=True, steps=25, plan=plan, records=tuple(lines), validations=())
    (row,) = rows(cost.section([Material("m", runs=(run,))], {}), "cost_runs").values()
    assert (row["trained"], row["sampled"], row["time"]) == (2500, 4000, pytest.approx(0.5))


def test_two_analyses_of_one_name_are_two_and_those_of_seeds_one() -> None:
    def material(*shares: float) -> Material:
        return Material("m", analyses={"weights": tuple(Result("weights", "mid", weights(share)) for share in shares)})

    tables = [
        [block.caption for block in changes.section(list(own), {}).blocks if isinstance(block, Table)]
        for own in ([material(0.9, 0.5)], [material(0.9), material(0.5)])
    ]
    assert any("weights (2)" in caption for caption in tables[0]) and not any("(2)" in caption for caption in tables[1])


def test_a_free_name_has_its_mark_before_a_number() -> None:
    assert [free("a", taken, mark) for taken, mark in (([], "m"), (["a"], "m"), (["a", "a (m)"], "m"), (["a"], ""))] == [
        "a",
        "a (m)",
        "a (m) (2)",
        "a (2)",
    ]
