"""Read the records of columnar files: `.parquet`, and the `.arrow` streams of a folder that `datasets` saved to disk.

A damaged file is an OSError here, whatever Arrow calls it, so that a reader of texts treats all its files alike.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism.core.errors import InputError, Problem, raise_problems

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = (".parquet", ".arrow")
BATCH_ROWS = 256  # of a parquet file: a batch of long documents stays small; a stream comes in the batches it was written in
BUFFER_BYTES = 1 << 20
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # Source: Arrow columnar format, IPC streaming format, end-of-stream marker


def saved_files(folder: Path) -> tuple[Path, ...]:
    """Return the data files of a folder written by `datasets.Dataset.save_to_disk`, in the order of its rows.

    Raises: InputError for any other folder, a DatasetDict among them, and for a file that is not there.
    """
    state = folder / "state.json"
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
        raise InputError(Problem(str(folder), f"a DatasetDict with the splits {splits or '(none)'}", "the folder of one split"))
    if not state.is_file():
        raise InputError(Problem(str(folder), "a folder without state.json", "a folder of Dataset.save_to_disk", "name files, or a glob"))
    try:
        found = json.loads(state.read_bytes())
        names = [str(file["filename"]) for file in found["_data_files"]]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise InputError(Problem(str(state), f"no list of data files ({error})", "_data_files, as save_to_disk writes it")) from None
    if not names or found.get("_indices_data_files"):  # the second: an old writer's rows, chosen and reordered by another file
        raise InputError(
            Problem(
                str(state),
                "no data files" if not names else "rows behind _indices_data_files",
                "data files alone",
                "save it again with a newer `datasets`",
            )
        )
    inside = {path.name for path in folder.glob("*.arrow") if path.is_file()}  # a name that leads out of the folder is not among them
    raise_problems([Problem(f"{state}: _data_files", repr(name), "an .arrow file in the folder") for name in names if name not in inside])
    return tuple(folder / name for name in names)


def records(path: Path, raw: io.BufferedReader, names: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row's number, from 1, and its values of the columns `names`: bytes for a string, within lists and structs too, None for a null.

    Raises: InputError naming each column that is missing or of a type that JSON has not; OSError for a damaged file.
    """
    import pyarrow as pa

    names = tuple(dict.fromkeys(names))
    number = 0
    try:
        for batch in _parquet(path, raw, names) if path.suffix == ".parquet" else _stream(path, raw, names):
            columns = [_plain(batch.column(name)) for name in names]
            for row in range(batch.num_rows):
                number += 1
                yield number, {name: column[row].as_py() for name, column in zip(names, columns, strict=True)}
    except (pa.ArrowException, UnicodeDecodeError, OverflowError, MemoryError) as error:  # a damaged file may ask for any size
        raise OSError(f"damaged {path.suffix[1:]} file: {error}") from None


def _parquet(path: Path, raw: io.BufferedReader, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    # pre_buffer would read a row group's whole columns at once.
    file = pq.ParquetFile(raw, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
    _check(path, file.schema_arrow, names)
    yield from file.iter_batches(BATCH_ROWS, columns=list(names), use_threads=False)


def _stream(path: Path, raw: io.BufferedReader, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with pa.ipc.open_stream(raw) as stream:
        _check(path, stream.schema, names)
        yield from stream
        raw.seek(-len(STREAM_END), io.SEEK_END)
        if raw.read() != STREAM_END:  # Arrow takes a file that is cut between two batches for a whole one
            raise EOFError("the Arrow stream has no end")


def _check(path: Path, schema: pa.Schema, names: Sequence[str]) -> None:
    problems = []
    for name in names:
        indices = schema.get_all_field_indices(name)
        if len(indices) != 1:
            found = f"no column {name!r}" if not indices else f"{len(indices)} columns {name!r}"
            problems.append(Problem(str(path), found, f"the fields of `text`; the file has {', '.join(map(repr, schema.names)) or 'none'}"))
        elif _as_bytes(schema.field(indices[0]).type) is None:
            problems.append(Problem(str(path), f"column {name!r} of type {schema.field(indices[0]).type}", "what JSON can hold"))
    raise_problems(problems)


def _as_bytes(kind: pa.DataType, is_inner: bool = False) -> pa.DataType | None:
    """Return a type with bytes for each string in it and no dictionary, None where JSON has no such value.

    Beside the turns that are read, a list of them often holds times: they become whole numbers.
    """
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(kind):
        return _as_bytes(kind.value_type, is_inner)
    if types.is_list(kind) or types.is_large_list(kind):
        inner = _as_bytes(kind.value_type, is_inner=True)
        return inner and (pa.list_(inner) if types.is_list(kind) else pa.large_list(inner))
    if types.is_temporal(kind) and is_inner:
        return pa.int32() if kind.bit_width == 32 else pa.int64()
    if types.is_struct(kind):
        fields = [(field.name, _as_bytes(field.type, is_inner=True)) for field in kind]
        return pa.struct(fields) if all(inner for _, inner in fields) and len({name for name, _ in fields}) == len(fields) else None
    is_plain = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind)
    return kind if is_plain else _bytes_types().get(kind)


def _plain(column: pa.Array) -> pa.Array:
    """Return a column whose values can be read one by one: offsets checked, no dictionary, strings as bytes not yet decoded."""
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
    """Return the types of text, each with the type of its bytes: one string of invalid UTF-8 is one bad record, not a bad file."""
    import pyarrow as pa

    kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    return kinds | {kind: kind for kind in kinds.values()}
