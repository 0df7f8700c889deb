"""The learning rate at its corners, for every kind, and the paper's own run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prism.core.config import OptimizerConfig, ScheduleConfig
from megatron_prism.train.schedule import lr_at

KINDS = ["cosine", "linear", "exponential", "wsd", "constant"]


def schedule(kind: Any, warmup: int = 10, final: float = 0.1, decay: int = 30) -> ScheduleConfig:
    return ScheduleConfig(kind=kind, warmup_steps=warmup, final_factor=final, wsd_decay_steps=decay if kind == "wsd" else None)


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_is_linear_and_ends_at_lr(kind: str) -> None:
    assert [lr_at(step, 110, 2.0, schedule(kind)) for step in (1, 5, 10)] == [0.2, 1.0, 2.0]
    assert lr_at(10, 10, 2.0, schedule(kind)) == 2.0  # nothing but warm-up


@pytest.mark.parametrize(
    ("kind", "middle", "end"),
    [
        ("cosine", 0.55, 0.1),
        ("linear", 0.55, 0.1),
        ("exponential", (0.9 * math.exp(0.5) + 0.1 * math.e - 1) / (math.e - 1), 0.1),
        ("wsd", 1.0, 0.1),
        ("constant", 1.0, 1.0),
    ],
)
def test_start_middle_and_end(kind: str, middle: float, end: float) -> None:
    found = [lr_at(step, 110, 1.0, schedule(kind)) for step in (60, 110)]
    assert found == pytest.approx([middle, end], rel=1e-12)
    assert end <= lr_at(11, 110, 1.0, schedule(kind)) <= 1.0
    assert lr_at(1, 100, 1.0, schedule(kind, warmup=0)) <= 1.0  # no warm-up: no division by it


def test_wsd_falls_linearly_over_its_last_steps() -> None:
    assert [lr_at(step, 110, 1.0, schedule("wsd")) for step in (80, 95, 110)] == pytest.approx([1.0, 0.55, 0.1], rel=1e-12)


@given(kind=st.sampled_from(KINDS), steps=st.integers(1, 2000), final=st.floats(0, 1), data=st.data())
def test_after_warmup_it_never_rises_and_ends_at_its_floor(kind: str, steps: int, final: float, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    settings = schedule(kind, warmup, final, data.draw(st.integers(1, steps - warmup)))
    step = data.draw(st.integers(max(warmup, 1), steps))
    now, later = (lr_at(at, steps, 1.0, settings) for at in (step, min(step + 1, steps)))
    floor = 1.0 if kind == "constant" else final
    assert floor - 1e-12 <= later <= now + 1e-12 <= 1.0 + 2e-12
    assert lr_at(steps, steps, 1.0, settings) == pytest.approx(floor, abs=1e-12)


@given(ratio=st.floats(0, 1), step=st.integers(1, 1000))
def test_exponential_is_the_formula_of_lm_engine(ratio: float, step: int) -> None:
    e = math.e
    formula = (1 - ratio) * e / (e - 1) * math.exp(-step / 1000) + (ratio * e - 1) / (e - 1)
    assert lr_at(step, 1000, 1.0, schedule("exponential", 0, ratio)) == pytest.approx(formula, abs=1e-12)


def test_the_papers_run() -> None:
    """Table 16: 25,000 steps, 500 of warm-up, cosine from 5e-5 to a tenth."""
    paper, lr = ScheduleConfig(warmup_steps=500), OptimizerConfig().lr
    found = [lr_at(step, 25_000, lr, paper) for step in (1, 500, 12_750, 25_000)]
    assert found == pytest.approx([1e-7, 5e-5, 2.75e-5, 5e-6], rel=1e-12)
