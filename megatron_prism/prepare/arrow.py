"""Read the records of columnar files: `.parquet`, and the `.arrow` streams of a folder that `datasets` saved to disk.

A damaged file raises OSError here, whatever Arrow raises, so a reader of texts handles all formats alike.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.prepare.lines import UNBOUNDED, TooLong

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = (".parquet", ".arrow")
BATCH_ROWS, BATCH_BYTES = (
    256,
    8 << 20,
)  # for parquet: small, since documents may be long; an Arrow stream comes in the batches it was written in
BUFFER_BYTES = 1 << 20
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # Source: Arrow columnar format, IPC streaming format, end-of-stream marker


def saved_files(folder: Path) -> tuple[Path, ...]:
    """Return the data files of a folder written by `datasets.Dataset.save_to_disk`, in the order of its rows.

    Raises: InputError for any other folder (a DatasetDict too), and for a missing file.
    """
    state = folder / "state.json"
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
        raise InputError(Problem(str(folder), f"a DatasetDict with the splits {splits or '(none)'}", "the folder of one split"))
    if not state.is_file():
        raise InputError(
            Problem(
                str(folder),
                "a folder without state.json",
                "a folder of Dataset.save_to_disk",
                f"name its files, as {folder}/*{folder.suffix if folder.suffix in FORMATS else ''}",
            )
        )
    try:
        saved_state = json.loads(state.read_bytes())
        names = [str(file["filename"]) for file in saved_state["_data_files"]]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise InputError(Problem(str(state), f"no list of data files ({error})", "_data_files, as save_to_disk writes it")) from None
    if not names or saved_state.get("_indices_data_files"):  # an old writer put the choice and order of rows in the indices file
        raise InputError(
            Problem(
                str(state),
                "no data files" if not names else "rows behind _indices_data_files",
                "data files alone",
                "save it again with a newer `datasets`",
            )
        )
    inside = {path.name for path in folder.glob("*.arrow") if path.is_file()}  # so a name that leads out of the folder is refused
    raise_problems([Problem(f"{state}: _data_files", repr(name), "an .arrow file in the folder") for name in names if name not in inside])
    return tuple(folder / name for name in names)


def records(
    path: Path, raw: io.BufferedReader, names: Sequence[str], max_bytes: int = UNBOUNDED, groups: tuple[int, int] | None = None
) -> Iterator[tuple[int, dict[str, Any] | TooLong]]:
    """Yield each row's number, from 1, and its values in the columns that the fields `names` lie in (records.py says what a dot means).

    A row of more than max_bytes comes as its size.
    A string comes as bytes, within lists and structs too. A null comes as None. Values of a struct
    that JSON lacks are left out. groups: the row groups of a parquet file, None for all.
    Raises: InputError naming each column that is missing or of a type that JSON lacks. OSError for a damaged file.
    """
    import pyarrow as pa

    names = tuple(dict.fromkeys(names))
    try:
        for number, batch in _parquet(path, raw, names, groups) if path.suffix == ".parquet" else _stream(path, raw, names):
            columns = {name: _plain(batch.column(name)) for name in _columns(batch.schema, names)}
            may_be_long = sum(column.nbytes for column in columns.values()) > max_bytes
            for row in range(batch.num_rows):
                if may_be_long and (num_bytes := sum(column.slice(row, 1).nbytes for column in columns.values())) > max_bytes:
                    yield number + row, TooLong(num_bytes)
                else:
                    yield number + row, {name: column[row].as_py() for name, column in columns.items()}
    except (pa.ArrowException, UnicodeDecodeError, OverflowError, MemoryError) as error:  # MemoryError: a damaged file may ask for any size
        raise OSError(f"damaged {path.suffix[1:]} file: {error}") from None


def _parquet(
    path: Path, raw: io.BufferedReader, names: Sequence[str], groups: tuple[int, int] | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield batches of rows, each with the number of its first row."""
    import pyarrow.parquet as pq

    # pre_buffer would read a row group's whole columns at once.
    file = pq.ParquetFile(raw, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
    _check(path, file.schema_arrow, names)
    number = 1
    for index in range(file.num_row_groups):
        group = file.metadata.row_group(index)
        if groups and not groups[0] <= index < groups[1]:
            number += group.num_rows
            continue
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
        for batch in file.iter_batches(rows, row_groups=[index], columns=_columns(file.schema_arrow, names), use_threads=False):
            yield number, batch
            number += batch.num_rows


def _stream(path: Path, raw: io.BufferedReader, names: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    import pyarrow as pa

    with pa.ipc.open_stream(raw) as stream:
        _check(path, stream.schema, names)
        number = 1
        for batch in stream:
            yield number, batch
            number += batch.num_rows
        raw.seek(-len(STREAM_END), io.SEEK_END)
        if raw.read() != STREAM_END:  # Arrow accepts a file that is cut between two batches
            raise EOFError("the Arrow stream has no end")


def _columns(schema: pa.Schema, names: Sequence[str]) -> list[str]:
    """Return the columns that fields lie in, each once: the column of a field's whole name, else that of its first part."""
    return list(dict.fromkeys(name if name in schema.names else name.partition(".")[0] for name in names))


def _check(path: Path, schema: pa.Schema, names: Sequence[str]) -> None:
    problems = []
    for name in names:
        (column,) = _columns(schema, [name])
        if (count := len(schema.get_all_field_indices(column))) != 1:
            found = f"{count} columns {column!r}" if count else f"no column {column!r}"
            columns = ", ".join(map(repr, schema.names)) or "none"
            problems.append(Problem(str(path), found, f"one for each field that the config reads; the file has {columns}"))
            continue
        kind, is_inner = _type_of(schema.field(column).type, name.removeprefix(column).split(".")[1:])
        if _as_bytes(kind, is_inner) is None:
            problems.append(Problem(str(path), f"column {name!r} of type {kind}", "what JSON can hold"))
    raise_problems(list(dict.fromkeys(problems)))


def _type_of(kind: pa.DataType, parts: Sequence[str]) -> tuple[pa.DataType, bool]:
    """Return the type of a field within a column, and whether it is an inner one; where a struct lacks the field, the struct's."""
    from pyarrow import types

    for depth, part in enumerate(parts):
        if not types.is_struct(kind) or len(kind.get_all_field_indices(part)) != 1:
            return kind, depth > 0
        kind = kind.field(part).type
    return kind, bool(parts)


def _as_bytes(kind: pa.DataType, is_inner: bool = False) -> pa.DataType | None:
    """Return the type with strings as bytes and dictionaries decoded, or None where JSON has no such value.

    A list of turns often holds other values beside the text: times become integers, and what JSON lacks (a decimal, a map) is left out.
    """
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(kind):
        return _as_bytes(kind.value_type, is_inner)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _as_bytes(kind.value_type, is_inner=True)
        return inner and (pa.large_list(inner) if types.is_large_list(kind) else pa.list_(inner))
    if types.is_temporal(kind) and is_inner and not types.is_interval(kind):
        return pa.int32() if kind.bit_width == 32 else pa.int64()
    if types.is_struct(kind):
        fields = [(field.name, inner) for field in kind if (inner := _as_bytes(field.type, is_inner=True))]
        return pa.struct(fields) if fields and len({name for name, _ in fields}) == len(fields) else None
    is_plain = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind)
    return kind if is_plain else _bytes_types().get(kind)


def _plain(column: pa.Array) -> pa.Array:
    """Return a column whose values can be read one by one: offsets checked, dictionaries decoded, strings left as bytes."""
    from pyarrow import types

    wanted = _as_bytes(column.type)
    assert wanted is not None  # _check
    if types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    column = column.cast(wanted) if types.is_nested(wanted) else column.view(wanted)
    column.validate(full=True)
    return column


def _bytes_types() -> dict[pa.DataType, pa.DataType]:
    """Return the binary type for each string type. Decoding later makes invalid UTF-8 a bad record, not a bad file."""
    import pyarrow as pa

    kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    return kinds | {kind: kind for kind in kinds.values()}
