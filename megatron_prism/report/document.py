"""A report before it is HTML, Markdown or CSV: sections of tables and figures, whose numbers know their unit, n and error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_prism.core.errors import printable

Mark = Literal["good", "bad", "open", ""]
MARKS: dict[str, Mark] = {  # words that a page colours; the word itself always stands there
    **dict.fromkeys(("GO", "holds", "done", "finished", "yes"), "good"),
    **dict.fromkeys(("NO-GO", "no-go", "fails", "failed", "no"), "bad"),
    **dict.fromkeys(("INCONCLUSIVE", "no more than its null", "prerequisite not met", "not measured", "not finished"), "open"),
    **dict.fromkeys(("to run", "changed", "running", "stopped", "blocked"), "open"),
}
NOTHING = "\N{EN DASH}"  # of a cell without a value


@dataclass(frozen=True)
class Measured:
    """A figure with its 95 % interval. n: what it is the mean of, where it is one. None: not known."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def times(self, factor: float) -> Measured:
        """Return the figure in another unit."""
        low, high = (None if end is None else end * factor for end in (self.low, self.high))
        return Measured(self.value * factor, low, high, self.n)


Value = str | float | int | Measured | None


@dataclass(frozen=True)
class Column:
    """A column. unit: of its numbers. form: how Python formats them. signed: with a plus."""

    name: str
    unit: str = ""
    form: str = ".3g"
    signed: bool = False

    @property
    def title(self) -> str:
        """Return the name with its unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def shown(self, value: Value) -> str:
        """Return a value as a reader sees it: 48.7 [45.1, 52.3]."""
        if isinstance(value, Measured):
            ends = (
                ""
                if value.low is None or value.high is None or value.low == value.high
                else f" [{self._number(value.low)}, {self._number(value.high)}]"
            )
            return self._number(value.value) + ends
        if value is None:
            return NOTHING
        return self._number(value) if isinstance(value, int | float) else printable(str(value))  # a damaged result may hold anything

    def _number(self, value: float) -> str:
        if not math.isfinite(value):
            return NOTHING
        if isinstance(value, int) and not self.signed:
            return f"{value:,}"
        text = format(value, ("+" if self.signed else "") + self.form)
        return text.lstrip("+-") if float(value) != 0 and not text.strip("+-0.,") else text  # what rounds to 0 has no sign


@dataclass(frozen=True)
class Table:
    """A table. Its first `num_keys` columns name the row. id: unique in the report, and the name of its CSV file. is_paper: the paper's numbers."""

    id: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    note: str = ""
    num_keys: int = 1
    is_paper: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure, and the table of what it shows. title: what a reader sees in it, for those who do not."""

    id: str
    title: str
    table: Table
    svg: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A part of the report. absent: why it has nothing to show; empty where it has."""

    id: str
    title: str
    text: tuple[str, ...] = ()
    blocks: tuple[Table | Figure, ...] = ()
    absent: str = ""


@dataclass(frozen=True)
class Document:
    """The report."""

    title: str
    lead: tuple[str, ...]
    sections: tuple[Section, ...]

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Return all figures."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Figure))

    @property
    def tables(self) -> tuple[Table, ...]:
        """Return all tables, those of the figures among them."""
        blocks = [block for section in self.sections for block in section.blocks]
        return tuple(block.table if isinstance(block, Figure) else block for block in blocks)


def is_number(table: Table, place: int) -> bool:
    """Say whether a column has numbers."""
    return any(isinstance(row[place], int | float | Measured) for row in table.rows)


def without(table: Table, name: str = "") -> Table:
    """Return a table without the column of that name, and without columns that have no value in any row."""
    empty = {place for place in range(table.num_keys, len(table.columns)) if all(row[place] is None for row in table.rows)}
    places = [place for place, column in enumerate(table.columns) if column.name != name and place not in empty]
    if len(places) == len(table.columns):
        return table
    num_keys = sum(place < table.num_keys for place in places)
    rows = tuple(tuple(row[place] for place in places) for row in table.rows)
    return replace(table, columns=tuple(table.columns[place] for place in places), rows=rows, num_keys=num_keys)


def number_of(value: Value) -> float | None:
    """Return the number of a value. None: it has none."""
    if isinstance(value, Measured):
        return value.value
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def flat(table: Table) -> list[list[str]]:
    """Return a table's rows for CSV, the header first: a measured column becomes four, numbers are whole."""
    is_measured = [any(isinstance(row[place], Measured) for row in table.rows) for place in range(len(table.columns))]
    has_n = [
        wide and any(isinstance(row[place], Measured) and row[place].n is not None for row in table.rows)  # type: ignore[union-attr]
        for place, wide in enumerate(is_measured)
    ]
    header: list[str] = []
    for column, wide, counted in zip(table.columns, is_measured, has_n, strict=True):
        header += [
            _plain(column.title),  # it may name a task
            *([_plain(f"{column.name} low"), _plain(f"{column.name} high")] if wide else []),
            *([_plain(f"{column.name} n")] if counted else []),
        ]
    rows = [_flat_row(row, is_measured, has_n) for row in table.rows]
    return [header, *rows]


def _flat_row(row: Sequence[Value], is_measured: Sequence[bool], has_n: Sequence[bool]) -> list[str]:
    cells: list[str] = []
    for value, wide, counted in zip(row, is_measured, has_n, strict=True):
        if not wide:
            cells.append(_plain(value))
            continue
        one = value if isinstance(value, Measured) else Measured(float(value)) if isinstance(value, int | float) else None
        ends = ("", "", "") if one is None else (_plain(one.value), _plain(one.low), _plain(one.high))
        cells += [*ends, *([_plain(one.n if one else None)] if counted else [])]
    return cells


def _plain(value: Value) -> str:
    if value is None or isinstance(value, Measured):
        return ""
    if isinstance(value, float):
        return f"{value:.10g}" if math.isfinite(value) else ""
    text = printable(str(value))
    return f"'{text}" if isinstance(value, str) and text.lstrip().startswith(("=", "+", "-", "@")) else text  # a sheet would compute it
