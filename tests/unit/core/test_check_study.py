"""What a study may not say: every problem at once, each with its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.check.study import check_study, check_variables, parts_of
from megatron_prism.core.config import CheckConfig, ClaimConfig, StageConfig, StudyConfig
from megatron_prism.core.load import load


def stage(name: str, *after: str, **more: Any) -> StageConfig:
    return StageConfig(**({"name": name, "command": ("train", "a.yaml"), "after": after} | more))


def study(*stages: StageConfig, **more: Any) -> StudyConfig:
    return StudyConfig(**({"name": "s", "run_dir": Path("runs/s"), "stages": stages} | more))


def claim(*shows: CheckConfig, **more: Any) -> ClaimConfig:
    return ClaimConfig(**({"name": "c", "says": "It rises.", "shows": shows} | more))


ARRAY = stage("filter", "a", array=(("x=1",), ("x=2",)))
GOOD = claim(CheckConfig(value="a:b.c", above=0.5), CheckConfig(value="filter:1.n", near="a:n", by=1.0))


def test_a_study_that_is_right_has_no_problem() -> None:
    assert check_study(study(stage("a"), ARRAY, claims=(GOOD,), environment={"OMP_NUM_THREADS": "1"})) == []


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (study(), ["stages"]),
        (study(stage("a", "b"), stage("b", "a")), ["stages"]),
        (study(stage("a", "c"), stage("a")), ["stages.0.after", "stages.1.name"]),
        (study(stage("a", command=())), ["stages.0.command"]),
        (study(stage("a", command=("train", "a.yaml", "--json", "b"))), ["stages.0.command"]),
        (study(stage("a", array=(("x",),), output=Path("b"))), ["stages.0.output"]),
        (study(stage("a"), num_parallel=0), ["num_parallel"]),
        (study(stage("a"), environment={"a b": "1"}), ["environment.a b"]),
        (study(stage("a"), claims=(claim(), claim(CheckConfig(value=1.0, above=0.0)))), ["claims.0.shows", "claims.1.name"]),
        (study(stage("a"), claims=(claim(CheckConfig(value=1.0)),)), ["claims.0.shows.0"]),
        (study(stage("a"), claims=(claim(CheckConfig(value=1.0, above=0.0, below=2.0)),)), ["claims.0.shows.0"]),
        (study(stage("a"), claims=(claim(CheckConfig(value=1.0, near=0.0)),)), ["claims.0.shows.0.by"]),
        (study(stage("a"), claims=(claim(CheckConfig(value="b:c", above="a")),)), ["claims.0.shows.0.value", "claims.0.shows.0.above"]),
        (study(stage("a"), ARRAY, claims=(claim(CheckConfig(value="filter:2.n", above=0.0)),)), ["claims.0.shows.0.value"]),
        (study(stage("a"), ARRAY, claims=(claim(CheckConfig(value="filter:n", above=0.0)),)), ["claims.0.shows.0.value"]),
    ],
)
def test_what_is_wrong_is_told_by_its_key(config: StudyConfig, where: list[str]) -> None:
    assert [problem.where for problem in check_study(config)] == where


def test_a_figure_is_a_stage_and_keys_of_which_one_with_a_dot_is_quoted() -> None:
    assert parts_of('weights.a:total.changed."0.01".x') == ("weights.a", ["total", "changed", "0.01", "x"])
    assert parts_of('cka:pairs."MCS -> RL".min') == ("cka", ["pairs", "MCS -> RL", "min"])
    for text in ("a", ":b", "a:", "a:b..c", "a:.b", "a: b", "a:b - a:c", "a:b:c"):
        with pytest.raises(ValueError, match="no STAGE:KEY"):
            parts_of(text)


def test_the_key_null_needs_no_quotes_in_a_yaml(write: Any) -> None:
    text = "{name: s, run_dir: r, stages: [{name: a, command: [b]}], claims: [{name: c, says: d, shows: [], KEY: [{value: 1, above: 0}]}]}"
    for key in ("null", '"null"'):
        assert load(write("s.yaml", text.replace("KEY", key)), StudyConfig).claims[0].null == (CheckConfig(value=1, above=0),)
    assert load(write("s.yaml", text.replace("KEY", "null").replace("[b]", "[b], output: null")), StudyConfig).stages[0].output is None


def test_a_variable_that_no_text_uses_is_refused() -> None:
    file = {
        "run_dir": "runs/${variables.seed}",
        "variables": {"seed": "1", "other": "10${.seed}", "a-b": ""},
        "stages": ["${variables[other]}"],
    }
    layers = [("s.yaml", {**file, "name": "${variables.a-b}"}), ("override", {"variables": {"seed": "2"}})]
    assert check_variables(layers) == []
    said = list(map(str, check_variables([*layers, ("override", {"variables": {"sed": "3"}}), ("t.yaml", {"variables": {"x": "4"}})])))
    assert (
        said[0]
        == "override:variables.sed: found an unknown variable; required one that the study uses: seed, other, a-b; did you mean 'seed'?"
    )
    assert said[1].startswith("t.yaml:variables.x: found") and "write ${variables.x} where it is meant" in said[1] and len(said) == 2
    chosen = {"name": "${variables.${variables.seed}}", "variables": {"seed": "a", "a": "1", "b": "2"}}  # b is used under seed=b
    assert check_variables([("s.yaml", chosen)]) == []
