"""A study's graph: its tasks in order, what depends on what, the longest path."""

from __future__ import annotations

from typing import Any

from megatron_prism.core.config import StageConfig
from megatron_prism.study.graph import longest_path, needed, tasks


def stage(name: str, *after: str, **more: Any) -> StageConfig:
    return StageConfig(name=name, command=("train", f"{name}.yaml"), after=after, **more)


GRAPH = tasks(
    [
        stage("report", "evaluate"),
        stage("base"),
        stage("filter", "base", array=(("out=a",), ("out=b",))),
        stage("mix", "filter"),
        stage("evaluate", "base"),
    ]
)


def test_a_task_comes_after_those_it_waits_for_and_an_element_is_a_task_of_its_own() -> None:
    names = [task.name for task in GRAPH]
    assert names == ["base", "filter/0", "filter/1", "mix", "evaluate", "report"], (
        "the given order, but where a stage waits for a later one"
    )
    assert all(names.index(before) < names.index(task.name) for task in GRAPH for before in task.after)
    by_name = {task.name: task for task in GRAPH}
    assert by_name["filter/1"].words == ("train", "filter.yaml", "out=b") and by_name["filter/1"].after == ("base",)
    assert by_name["mix"].after == ("filter/0", "filter/1")


def test_what_is_needed_are_the_named_stages_and_all_before_them() -> None:
    assert needed(GRAPH, ["mix"]) == {"mix", "filter/0", "filter/1", "base"}
    assert needed(GRAPH, ["filter"]) == {"filter/0", "filter/1", "base"}
    assert needed(GRAPH, ["filter/1"]) == {"filter/1", "base"}


def test_the_longest_path_is_that_of_the_most_time_not_of_the_most_stages() -> None:
    seconds = {"base": 10.0, "filter/0": 1.0, "filter/1": 2.0, "mix": 1.0, "evaluate": 5.0}
    assert longest_path(GRAPH, seconds)[0] == 15.0 and longest_path(GRAPH, seconds)[1][:2] == ["base", "evaluate"]
    assert longest_path(GRAPH, {**seconds, "filter/1": 7.0}) == (18.0, ["base", "filter/1", "mix"])
