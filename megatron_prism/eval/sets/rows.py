"""Read the records of an evaluation set as it was published: JSON lines (plain, .gz, .zst), CSV, parquet, Arrow.

A Row is one record with its place. What a reader asks of it and it lacks becomes a Problem, so that one pass names everything that is wrong.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prism.core.config import PartConfig
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.prepare import arrow, records, sources
from megatron_prism.prepare.lines import TooLong
from megatron_prism.prepare.records import BadRecord

CSV_FIELD_CHARS = 1 << 24


@dataclass
class Row:
    """A record, where it stands, and what was found wrong with it."""

    record: dict[str, Any]
    place: str
    problems: list[Problem] = field(default_factory=list)

    def get(self, name: str) -> Any:
        """Return a field's value, or None where the record has none."""
        value = self.record.get(name)
        return None if isinstance(value, float) and value != value else value  # a columnar file's missing number

    def text(self, *names: str, may_be_empty: bool = False) -> str:
        """Return the first of these fields that the record has, as text: a text, or an integer's digits."""
        name = next((name for name in names if self.get(name) is not None), None)
        if name is None:
            has = ", ".join(map(repr, self.record)) or "none"
            return self.wrong(f"no field {' or '.join(map(repr, names))}", f"one of them; the record has {has}")
        value = self.record[name]
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            return self.wrong(f"field {name!r} of type {type(value).__name__}", "a text")
        if not value.strip() and not may_be_empty:
            return self.wrong(f"field {name!r} that is empty", "a text")
        return value

    def json(self, name: str) -> Any:
        """Return a field's value, parsed where it is a text that holds JSON. None where it is missing or no JSON."""
        value = self.get(name)
        if value is None:
            self.wrong(f"no field {name!r}", "JSON")
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            self.wrong(f"field {name!r}, which is no JSON ({error})", "JSON")
            return None

    def wrong(self, found: str, required: str) -> str:
        """Note a problem, and return an empty text in the missing value's place."""
        self.problems.append(Problem(self.place, found, required))
        return ""


def read(path: Path, names: Sequence[str]) -> Iterator[Row]:
    """Yield the records of a file. names: the fields that are wanted of a columnar file; of those, the ones that it lacks are left out.

    Raises: InputError for a file that cannot be read; a line that is no JSON object is a Row with a problem.
    """
    if not path.is_file():
        raise InputError(Problem(str(path), "no such file", "a set in its published form: .jsonl, .csv, .parquet or .arrow"))
    if path.suffix == ".csv":
        yield from _of_csv(path)
        return
    problems: list[Problem] = []
    part = PartConfig(path=(str(path),), text="".join(f"{{{name}}}" for name in _present(path, names)))
    files = sources.files(part, "path", problems)
    if problems:
        raise InputError(problems)
    for file in files:
        for number, record in sources.read_records(file):
            assert not isinstance(record, TooLong)  # there is no bound
            row = Row({}, file.place(number))
            try:
                row.record = {key: _decoded(value) for key, value in records.row_of(record).items()}
            except BadRecord as error:
                row.wrong(error.found, error.required)
            except UnicodeDecodeError as error:
                row.wrong(f"invalid UTF-8 ({error.reason})", "UTF-8 text")
            yield row


def _present(path: Path, names: Sequence[str]) -> list[str]:
    """Return those of the wanted columns that a columnar file has. JSON lines are read whole."""
    if path.suffix not in arrow.FORMATS:
        return list(names)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            has = pq.read_schema(path).names
        else:
            with pa.OSFile(str(path)) as raw, pa.ipc.open_stream(raw) as stream:
                has = stream.schema.names
    except (pa.ArrowException, OSError) as error:
        raise InputError(Problem(str(path), " ".join(str(error).split()), f"a {path.suffix} file that can be read")) from None
    present = [name for name in names if name in has]
    if not present:
        raise InputError(Problem(str(path), f"the columns {', '.join(map(repr, has))}", f"some of {', '.join(map(repr, names))}"))
    return present


def _of_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(CSV_FIELD_CHARS)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            for record in reader:
                row = Row({key: value for key, value in record.items() if isinstance(key, str)}, f"{path}:{reader.line_num}")
                if None in record:
                    row.wrong("more cells than the header names", f"{len(reader.fieldnames or ())} cells")
                yield row
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise InputError(Problem(str(path), str(error), "a CSV file in UTF-8 that can be read to its end")) from None


def _decoded(value: Any) -> Any:
    """Return a value of a columnar file as JSON would have it."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _decoded(part) for key, part in value.items()}
    return [_decoded(part) for part in value] if isinstance(value, list) else value
