"""Training computes what it did when tests/golden/figures.json was recorded: losses, gradient norms, which steps the guard passed over.

It was recorded on one processor, and another one rounds otherwise: hence a tolerance. tools/golden.py compares two revisions bit for bit on one
machine, and records anew where training is meant to compute something else.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from . import runs

ROOT = Path(__file__).resolve().parents[2]
RECORD = json.loads(runs.RECORD.read_text(encoding="utf-8"))
CASES, RECORDED = runs.cases(), RECORD["cases"]
FAST = ("dense", "hybrid", "dense_dp2_overlap_resume")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the inputs of every case."""
    folder = tmp_path_factory.mktemp("golden") / "home"
    runs.prepare(ROOT, folder)
    return folder


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES])
def test_training_computes_what_it_did(home: Path, name: str) -> None:
    difference = runs.first_difference(RECORDED[name], runs.run(ROOT, home, name), CASES[name].get("tolerance", runs.TOLERANCE))
    assert difference is None, f"{difference}; recorded with {RECORD['versions']}"


@pytest.mark.slow
def test_a_learning_rate_a_thousandth_higher_is_seen(home: Path) -> None:
    difference = runs.first_difference(RECORDED["dense"], runs.run(ROOT, home, "dense", "optimizer.lr=0.003003"), runs.TOLERANCE)
    assert difference is not None
    assert difference.startswith("step 2: ")  # the first step runs on the weights from the seed


def test_each_case_is_recorded_whole() -> None:
    assert list(RECORDED) == list(CASES)
    for figures in RECORDED.values():
        assert [*figures["loss"]] == [*figures["grad_norm"]] == [str(step) for step in range(1, 13)]


def test_the_guard_passed_over_and_went_back() -> None:
    """The same run skips and rewinds at the same step: it is the weights that it goes on with that differ."""
    skip, rewind = RECORDED["dense_skip"], RECORDED["dense_rewind"]
    first = min(map(int, skip["passed_over"]))
    assert first == min(map(int, rewind["passed_over"])) < 12
    assert next(int(step) for step in skip["loss"] if skip["loss"][step] != rewind["loss"][step]) == first + 1
    assert all(set(RECORDED[name]) == {"loss", "grad_norm", "valid_loss/up"} for name in CASES if "on_spike" not in str(CASES[name]))


# (metric, what becomes of its first value after step 5, the tolerance)
CHANGES = {
    "a loss": ("loss", lambda value: value + 3e-6, runs.TOLERANCE),
    "a gradient norm": ("grad_norm", lambda value: value * (1 + 3e-6), runs.TOLERANCE),
    "a validation loss": ("valid_loss/up", lambda value: value - 3e-6, runs.TOLERANCE),
    "a loss that is not a number": ("loss", lambda value: math.nan, runs.TOLERANCE),
    "a step that was taken": ("passed_over", lambda value: None, runs.TOLERANCE),
    "a step without a loss": ("loss", lambda value: None, runs.TOLERANCE),
    "the last bit of a loss": ("loss", lambda value: math.nextafter(value, 0), 0.0),
}


def changed(metric: str, change: Callable[[float], float | None]) -> tuple[str, runs.Figures]:
    """Return the record of a case with one figure changed, or left out, and that figure's step."""
    figures = copy.deepcopy(RECORDED["dense_skip"])
    step = next(step for step in figures[metric] if int(step) > 5)
    value = change(figures[metric].pop(step))
    return step, figures if value is None else {**figures, metric: {**figures[metric], step: value}}


@pytest.mark.parametrize(("metric", "change", "tolerance"), CHANGES.values(), ids=CHANGES)
def test_a_changed_figure_is_seen(metric: str, change: Callable[[float], float | None], tolerance: float) -> None:
    step, figures = changed(metric, change)
    difference = runs.first_difference(RECORDED["dense_skip"], figures, tolerance)
    assert difference is not None
    assert difference.startswith(f"step {step}: {metric} ")


def test_rounding_is_no_difference() -> None:
    assert runs.first_difference(RECORDED["dense_skip"], changed("loss", lambda value: value + 1e-6)[1], runs.TOLERANCE) is None
