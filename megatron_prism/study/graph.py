"""The graph of a study: its tasks in an order in which they can run, what a task needs, and the longest path through it.

A task is what runs as one process: a stage, or an element of a stage's array.
"""

from __future__ import annotations

import graphlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_prism.core.config import StageConfig


@dataclass(frozen=True)
class Task:
    """A stage, or an element of its array. after: the names of tasks."""

    name: str
    stage: StageConfig
    words: tuple[str, ...]
    after: tuple[str, ...] = ()


def tasks(stages: Sequence[StageConfig]) -> list[Task]:
    """Return the tasks, each after those it waits for, otherwise in the given order. Raises: graphlib.CycleError."""
    by_name = {stage.name: stage for stage in stages}
    return [task for name in _order(by_name) for task in _of_stage(by_name[name], by_name)]


def _order(by_name: Mapping[str, StageConfig]) -> Iterator[str]:
    """Yield the stages: always the first in the given order of those that wait for no other any more."""
    places = {name: place for place, name in enumerate(by_name)}
    sorter = graphlib.TopologicalSorter({name: stage.after for name, stage in by_name.items()})
    sorter.prepare()
    ready: set[str] = set()
    while sorter.is_active():
        ready |= {*sorter.get_ready()}
        first = min(ready, key=places.__getitem__)
        ready.remove(first)
        yield first
        sorter.done(first)


def _of_stage(stage: StageConfig, by_name: Mapping[str, StageConfig]) -> Iterable[Task]:
    after = tuple(name for before in stage.after for name in names(by_name[before]))
    for name, words in zip(names(stage), stage.array or ((),), strict=True):
        yield Task(name, stage, (*stage.command, *words), after)


def names(stage: StageConfig) -> list[str]:
    """Return the names of a stage's tasks."""
    return [f"{stage.name}/{index}" for index in range(len(stage.array))] if stage.array else [stage.name]


def needed(graph: Sequence[Task], wanted: Collection[str]) -> set[str]:
    """Return the tasks of these names (of tasks or of stages) and all that they need."""
    reached = {task.name for task in graph if task.name in wanted or task.stage.name in wanted}
    for task in reversed(graph):
        if task.name in reached:
            reached |= set(task.after)
    return reached


def longest_path(graph: Sequence[Task], seconds: Mapping[str, float]) -> tuple[float, list[str]]:
    """Return the time of the path that takes longest, which no number of machines shortens, and its tasks. seconds: by task; others take none."""
    best: dict[str, tuple[float, list[str]]] = {}
    for task in graph:
        before = max((best[name] for name in task.after), key=lambda path: path[0], default=(0.0, []))
        best[task.name] = (before[0] + seconds.get(task.name, 0.0), [*before[1], task.name])
    return max(best.values(), key=lambda path: path[0], default=(0.0, []))
