"""`prism analyze spectra`: of which rank updates are, and whether they turn the leading directions, beside a Gaussian of their norm."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prism.report import draw
from megatron_prism.report.document import Column, Figure, Measured, Section, Table, Value, number_of
from megatron_prism.report.draw import Series
from megatron_prism.report.material import Material, Result
from megatron_prism.report.sections.common import Paper, absent, analyses, mean_at, seeds, slug

ID, TITLE = "spectra", "Spectra of the updates"
TEXT = "Means over a component's matrices. The null is a Gaussian update of the same shape and norm: a low-rank update has a lower rank, and one along the weights' own directions turns them less."
FIGURES = {
    "stable_rank": Column("stable rank"),
    "effective_rank": Column("effective rank"),
    "share_in_leading": Column("norm in leading", "share", ".3f"),
    "share_on_principal": Column("norm on principal", "share", ".3f"),
    "principal_angle_left_max": Column("largest angle", "rad", ".3f"),
    "singular_value_shift_mean": Column("shift of values", "relative", ".2g"),
}


def section(materials: Sequence[Material], paper: Paper) -> Section:
    """Return a table for each pair of models, and the stable rank as a figure."""
    groups = analyses(materials, "spectra")
    if not groups:
        return absent(ID, TITLE, "No result of prism analyze spectra was given.")
    used: set[str] = set()
    blocks: list[Table | Figure] = []
    for group in groups:
        blocks += _of_pair(group, slug(group[0].name, used))
    return Section(ID, TITLE, tuple(filter(None, (TEXT, seeds(materials)))), tuple(blocks))


def _mean(group: Sequence[Result], component: str, key: str) -> Measured | None:
    return mean_at(group, "components", component, key)


def _of_pair(group: Sequence[Result], id: str) -> list[Table | Figure]:
    components = list(group[0].values["components"])
    columns = [
        Column("component"),
        *(Column(f"{word}{column.name}", column.unit, column.form) for column in FIGURES.values() for word in ("", "null: ")),
    ]
    rows: list[tuple[Value, ...]] = [
        (name, *(_mean(group, name, f"{prefix}{key}") for key in FIGURES for prefix in ("", "null_"))) for name in components
    ]
    name = group[0].name
    blocks: list[Table | Figure] = [Table(f"spectra_{id}", f"{name}: by component", tuple(columns), tuple(rows))]
    for key in ("stable_rank", "share_on_principal"):
        series = [
            Series(words, (), tuple(_mean(group, part, f"{prefix}{key}") for part in components), bool(prefix))
            for prefix, words in (("", "the update"), ("null_", "Gaussian of its norm"))
        ]
        if any(number_of(value) is not None for value in series[0].y):
            blocks.append(
                draw.dots(
                    f"spectra_{id}_{key}", f"{name}: {FIGURES[key].name} of the update", FIGURES[key], components, series, "component"
                )
            )
    return blocks
