"""The paper's numeric tables as data (configs/studies/paper, a file a table), to be shown beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from megatron_prism.core.errors import InputError, Problem, raise_problems

Quality = Literal["stated", "derived", "read from picture"]
REQUIRED = ("table", "title", "quality", "unit", "keys", "columns", "rows")
OPTIONAL = ("note", "units")


@dataclass(frozen=True)
class PaperTable:
    """A table. cells: the numbers of a row by column (None: the paper has none), by the row's keys, in order.

    table: its number in the paper, or where else it stands. unit: of all columns but those in `units`. quality: how the numbers are known.
    """

    name: str
    table: str
    title: str
    quality: Quality
    unit: str
    units: Mapping[str, str]
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, ...], Mapping[str, float | None]]
    note: str = ""


def read(folder: Path) -> dict[str, PaperTable]:
    """Return all tables of a folder by name. Raises: InputError with every file that holds none."""
    problems: list[Problem] = []
    tables = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            tables[path.stem] = _read(path)
        except InputError as error:
            problems += error.problems
    if not tables and not problems:
        problems = [Problem(str(folder), "no .yaml file", "the paper's tables")]
    raise_problems(problems)
    return tables


def _read(path: Path) -> PaperTable:
    try:
        values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(Problem(str(path), " ".join(str(error).split()), "a table as YAML")) from None
    keys = set(values) if isinstance(values, dict) else set()
    if set(REQUIRED) - keys or keys - {*REQUIRED, *OPTIONAL}:
        raise InputError(
            Problem(str(path), f"the keys {', '.join(keys) or '(none)'}", f"{', '.join(REQUIRED)}; {', '.join(OPTIONAL)} may be")
        )
    if values["quality"] not in get_args(Quality):
        raise InputError(Problem(f"{path}:quality", repr(values["quality"]), f"one of {', '.join(get_args(Quality))}"))
    names, columns = tuple(values["keys"]), tuple(values["columns"])
    cells: dict[tuple[str, ...], dict[str, float | None]] = {}
    for number, row in enumerate(values["rows"]):
        if not isinstance(row, list) or len(row) != len(names) + len(columns) or not all(map(_is_number, row[len(names) :])):
            raise InputError(Problem(f"{path}:rows.{number}", repr(row), f"{len(names)} keys, then {len(columns)} numbers or null"))
        key = tuple(map(str, row[: len(names)]))
        if key in cells:
            raise InputError(Problem(f"{path}:rows.{number}", f"the keys {', '.join(key)} again", "each row once"))
        cells[key] = dict(zip(columns, row[len(names) :], strict=True))
    facts = {name: values[name] for name in ("table", "title", "quality", "unit")}
    return PaperTable(
        path.stem, **facts, units=values.get("units", {}), keys=names, columns=columns, cells=cells, note=values.get("note", "")
    )


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
