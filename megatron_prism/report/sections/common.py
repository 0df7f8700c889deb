"""What sections share: figures over seeds, the paper's tables as the report's, names for files and anchors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from megatron_prism.report.document import Column, Measured, Section, Table
from megatron_prism.report.material import Material, Result
from megatron_prism.report.paper import PaperTable
from megatron_prism.report.statistics import by_error, over

K = TypeVar("K", bound=Hashable)
Paper = Mapping[str, PaperTable]
UNITS = {"percent": "%", "percentage points": "points", "relative change": "relative"}
SEEDS = "Each figure is the mean over those of {n} studies (seeds) that have it, with Student's 95 % interval of that mean."


def over_studies(materials: Sequence[Material], read: Callable[[Material], Iterable[tuple[K, Measured]]]) -> dict[K, Measured]:
    """Return each figure, of several studies its mean over those that have it, in the order in which they are met."""
    values: dict[K, list[Measured]] = {}
    for material in materials:
        for key, value in read(material):
            values.setdefault(key, []).append(value)
    return {key: mean for key, of in values.items() if (mean := over(of)) is not None}


def seeds(materials: Sequence[Material]) -> str:
    """Return the sentence that says what the figures are of, where they are of several studies."""
    return SEEDS.format(n=len(materials)) if len(materials) > 1 else ""


def analyses(materials: Sequence[Material], name: str) -> list[list[Result]]:
    """Return the results of an analysis: a list for each that studies have in common, by name."""
    by_name: dict[str, list[Result]] = {}
    for material in materials:
        for result in material.analyses.get(name, ()):
            by_name.setdefault(result.name, []).append(result)
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
