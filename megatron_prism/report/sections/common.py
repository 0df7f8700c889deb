"""What sections share: figures over seeds, the paper's tables as the report's, names for files and anchors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from megatron_prism.report.document import Column, Measured, Section, Table
from megatron_prism.report.material import Figures, Material, Result
from megatron_prism.report.names import free
from megatron_prism.report.paper import PaperTable
from megatron_prism.report.statistics import by_error, over

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Paper = Mapping[str, PaperTable]
UNITS = {"percent": "%", "percentage points": "points", "relative change": "relative"}
SEEDS = "Each figure is the mean over those of {n} studies (seeds) that have it, with Student's 95 % interval of that mean."


def over_studies(materials: Sequence[Material], read: Callable[[Material], Iterable[tuple[K, Measured]]]) -> dict[K, Measured]:
    """Return each figure, of several studies its mean over those that have it, in the order in which they are met.

    read: a study has a figure once. What it has twice under one name is no seed, and is told apart before (`apart`).
    """
    values: dict[K, list[Measured]] = {}
    for material in materials:
        for key, value in dict(read(material)).items():
            values.setdefault(key, []).append(value)
    return {key: mean for key, of in values.items() if (mean := over(of)) is not None}


@dataclass(frozen=True)
class Asked:
    """A task as an evaluation asked it. of: its part of the summary; questions: the mean score of each question."""

    task: str
    of: Figures
    questions: Mapping[str, float]


def tasks(material: Material) -> Iterator[tuple[tuple[str, str], Asked]]:
    """Yield each task of a study under its model and its name. A task that a model has twice is named by its stage too."""
    return apart(
        (one.name, task, "" if one.stage == one.name else one.stage, Asked(task, of, one.questions.get(task, {})))
        for one in material.evaluations
        for task, of in one.tasks.items()
    )


def apart(results: Iterable[tuple[str, str, str, V]]) -> Iterator[tuple[tuple[str, str], V]]:
    """Yield results of one study, given as model, name, mark, value, under the model and a name that is free among the model's (`names.free`)."""
    taken: dict[str, set[str]] = {}
    for model, name, mark, value in results:
        names = taken.setdefault(model, set())
        own = free(name, names, mark)
        names.add(own)
        yield (model, own), value


def seeds(materials: Sequence[Material]) -> str:
    """Return the sentence that says what the figures are of, where they are of several studies."""
    return SEEDS.format(n=len(materials)) if len(materials) > 1 else ""


def analyses(materials: Sequence[Material], name: str) -> list[list[Result]]:
    """Return the results of an analysis: a list for each that studies have in common, by name. Two of one study have names of their own."""
    by_name: dict[str, list[Result]] = {}
    for material in materials:
        for (_, own), result in apart(("", result.name, "", result) for result in material.analyses.get(name, ())):
            by_name.setdefault(own, []).append(replace(result, name=own))
    return list(by_name.values())


def mean_at(
    group: Sequence[Result], *keys: str | int, error: Sequence[str | int] = (), count: Sequence[str | int] = (), factor: float = 1.0
) -> Measured | None:
    """Return the figure at a place of a result, in the mean over the studies that have it. error, count: where its standard error and n stand."""
    values = []
    for result in group:
        value, own, num = (number_at(result.values, place) for place in (keys, error, count))
        if value is not None:
            values.append(by_error(value, own, None if num is None else int(num)).times(factor))
    return over(values)


def number_at(values: Any, keys: Sequence[str | int]) -> float | None:
    """Return the finite number at a place of a result: keys of objects, places in lists. None: there is none."""
    for key in keys:
        if isinstance(values, Mapping):
            values = values.get(key)
        else:
            values = values[key] if isinstance(values, list) and isinstance(key, int) and key < len(values) else None
    return float(values) if isinstance(values, int | float) and not isinstance(values, bool) and math.isfinite(values) else None


def absent(id: str, title: str, why: str) -> Section:
    """Return a section that has nothing to show."""
    return Section(id, title, absent=why)


def slug(text: str, used: set[str] | None = None) -> str:
    """Return a text as a name of a file and an anchor: lower case, digits, - and _; another number where it is used already."""
    base = re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")[:60] or "x"
    name, number = base, 2
    while used is not None and name in used:
        name, number = f"{base}-{number}", number + 1
    if used is not None:
        used.add(name)
    return name


def from_paper(paper: Paper, name: str, id: str) -> list[Table]:
    """Return a table of the paper as the report's, none where its file is not there."""
    if name not in paper:
        return []
    of = paper[name]
    units = {column: of.units.get(column, of.unit) for column in of.columns}
    columns = (*(Column(key) for key in of.keys), *(Column(column, UNITS.get(unit, unit), ".4g") for column, unit in units.items()))
    rows = tuple((*key, *(cells[column] for column in of.columns)) for key, cells in of.cells.items())
    known = "" if of.quality == "stated" else f" The numbers are {of.quality}."
    return [Table(id, f"The paper, {of.table}: {of.title}", columns, rows, f"{of.note}{known}".strip(), len(of.keys), is_paper=True)]
