"""Claims: what a check says, what a claim's state is, and what several seeds say together."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from megatron_prism.core.config import CheckConfig, ClaimConfig
from megatron_prism.study.claims import judge, lines, lines_over, over_seeds

WORDS = {"name": "a", "says": "b", "source": "", "judged_at": "", "note": "", "state": "holds"}
RESULTS: dict[str, Any] = {
    "base": {"tasks": {"math": {"score": 0.2}, "skills": {"score": 0.9}}},
    "mid": {"tasks": {"math": {"score": 0.5}}, "passed": True, "worst": float("nan"), "list": [1.0, 3.0]},
    "weights": {"total": {"changed": {"0.01": 0.98}, "changed_dense_null": {"0.01": 0.982}}},
    "filter": [{"share": 0.1}, None],
    "gone": None,
}
MATH, SKILLS = "mid:tasks.math.score", "base:tasks.skills.score"


def check(value: Any, by: float = 0.0, **bound: Any) -> CheckConfig:
    return CheckConfig(value=value, by=by, **bound)


@pytest.mark.parametrize(
    ("one", "holds"),
    [
        (check(MATH, above=0.4), True),
        (check(MATH, above="base:tasks.math.score", by=0.2), True),
        (check(MATH, above="base:tasks.math.score", by=0.4), False),
        (check(MATH, below=0.5), False),
        (check(MATH, above=0.5), False),
        (check(MATH, above=0.25, by=0.25), False),
        (check(MATH, above=0.6, by=-0.11), True),
        (check(MATH, above=0.6, by=-0.09), False),
        (check(MATH, below=0.4, by=-0.11), True),
        (check(MATH, near=0.25, by=0.25), False),
        (check(MATH, near=0.75, by=0.26), True),
        (check("base:tasks.math.score", below=0.25, by=0.1), False),
        (check("base:tasks.math.score", below=MATH, by=0.25), True),
        (check('weights:total.changed."0.01"', near='weights:total.changed_dense_null."0.01"', by=0.01), True),
        (check('weights:total.changed."0.01"', near='weights:total.changed_dense_null."0.01"', by=0.001), False),
        (check("mid:passed", above=0.5), True),
        (check("mid:list.1", above=2), True),
        (check("mid:list.-1", above=2), True),
        (check("filter:0.share", above=0.05), True),
        (check("filter:1.share", above=0.05), None),
        (check("mid:worst", above=0), None),
        (check("mid:nothing.there", above=0), None),
        (check("mid:tasks", above=0), None),
        (check("gone:a", above=0), None),
        (check("mid:list.2", above=0), None),
        (check(1.0, above="gone:a"), None),
    ],
)
def test_a_check(one: CheckConfig, holds: bool | None) -> None:
    (row,) = judge([ClaimConfig(name="a", says="b", shows=(one,))], RESULTS)
    assert row["checks"][0]["holds"] is holds


GOOD, BAD, ABSENT = check(MATH, above=0.4), check(MATH, above=0.6), check("gone:a", above=0)


@pytest.mark.parametrize(
    ("requires", "shows", "null", "state"),
    [
        ((), (GOOD,), (), "holds"),
        ((GOOD,), (GOOD, GOOD), (GOOD,), "holds"),
        ((), (GOOD, BAD), (), "fails"),
        ((GOOD, BAD), (GOOD,), (), "prerequisite not met"),
        ((BAD,), (BAD,), (BAD,), "prerequisite not met"),
        ((GOOD,), (GOOD,), (GOOD, BAD), "no more than its null"),
        ((GOOD,), (BAD,), (BAD,), "fails"),
        ((), (GOOD, ABSENT), (), "not measured"),
        ((), (BAD, ABSENT), (), "fails"),
        ((ABSENT,), (BAD,), (), "not measured"),
        ((), (GOOD,), (ABSENT,), "not measured"),
        ((), (BAD,), (ABSENT,), "fails"),
    ],
)
def test_a_claims_state(requires: Any, shows: Any, null: Any, state: str) -> None:
    (row,) = judge([ClaimConfig(name="a", says="b", source="T5", requires=requires, shows=shows, null=null)], RESULTS)
    assert row["state"] == state and row["source"] == "T5"
    assert row["figures"] == {one.value: {MATH: 0.5}.get(one.value) for one in (*requires, *shows, *null)}
    assert next(lines([row])).startswith(state)


def test_several_seeds_give_states_means_ranges_and_intervals() -> None:
    claim = ClaimConfig(name="a", says="b", shows=(check("mid:x", above=0.4),))
    values = [0.5, 0.3, 0.7, None]
    (row,) = over_seeds([judge([claim], {"mid": {"x": value}}) for value in values])
    assert row["states"] == ["holds", "fails", "holds", "not measured"] and (row["num_holds"], row["num_studies"]) == (2, 4)
    figure = row["figures"]["mid:x"]
    assert figure["values"] == values and (figure["min"], figure["max"]) == (0.3, 0.7) and figure["mean"] == pytest.approx(0.5)
    half = 4.303 * statistics.stdev([0.5, 0.3, 0.7]) / 3**0.5  # Student's t of 2 degrees of freedom, to three digits
    assert figure["interval_95"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-4)
    (said,) = list(lines_over([row]))[1:]
    assert said.endswith("0.3 to 0.7, 95 % of the mean 0.003172 to 0.9968")


def test_a_figure_that_one_study_alone_has_is_shown_without_an_interval() -> None:
    rows = over_seeds([[{**WORDS, "figures": {"x": value}}] for value in (0.5, None)])
    assert list(lines_over(rows))[1:] == ["    x: mean 0.5, 0.5 to 0.5, of 1 study"]


@pytest.mark.parametrize("freedom", [*range(1, 11), 11, 19, 21, 60])
def test_an_interval_is_students(freedom: int) -> None:
    """Check it by its definition: 95 % of Student's density lies within it, by Simpson's rule."""
    (row,) = over_seeds([[{**WORDS, "figures": {"x": float(value)}}] for value in range(freedom + 1)])
    values = [*map(float, range(freedom + 1))]
    low, high = row["figures"]["x"]["interval_95"]
    t = (high - low) / 2 / (statistics.stdev(values) / len(values) ** 0.5)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    number, width = 4000, t / 4000
    heights = [scale * (1 + (index * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for index in range(number + 1)]
    inside = 2 * width / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
    assert abs(inside - 0.95) / (2 * heights[-1]) < 1e-6


def test_one_seed_has_no_interval_and_a_study_without_the_claim_is_told() -> None:
    claim = ClaimConfig(name="a", says="b", shows=(check("mid:x", above=0.4),))
    (row,) = over_seeds([judge([claim], {"mid": {"x": 0.5}}), []])
    assert row["states"] == ["holds", "not measured"] and row["figures"]["mid:x"]["interval_95"] is None


def test_a_figure_that_a_stage_did_not_give_is_shown_and_those_of_stages_to_come_are_counted() -> None:
    rows = judge([ClaimConfig(name=name, says="b", shows=(check(f"{name}:scoer", above=0.4),)) for name in ("mid", "later")], RESULTS)
    claim, why, rest = lines(rows, RESULTS)
    assert claim.split() == ["not", "measured", "mid:", "b"] and "mid:scoer = not there" in why
    assert rest.endswith(" 1 claim whose stages have given nothing yet")
