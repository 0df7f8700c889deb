"""Hugging Face folders at the level of bytes: safetensors headers read and checked, tensors read and written one by one.

Headers are kept exactly as on disk, so a folder that is written back has the same files, order and offsets.

Reading: open_shards (a folder's headers, checked), open_files, read_values (a piece of a tensor). hf/tensors.py reads whole tensors by name.
Writing: new_shards (headers), create_shards, write_values, index_of.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.hf import bits
from megatron_prism.hf.dtypes import BY_CODE, Dtype
from megatron_prism.hf.files import ABSENT, parse_object, read_object, refusal
from megatron_prism.hf.recognise import DEQUANTISE, no_weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHTS_NAME = re.compile(r"model(-[0-9]+-of-[0-9]+)?\.safetensors")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMS = 64


@dataclass(frozen=True)
class TensorPlace:
    """The location of a tensor's bytes: file, dtype, shape, and [start, end) from the beginning of the file."""

    name: str
    file: str
    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, its header's JSON exactly as on disk, its tensors."""

    file: str
    header: str
    tensors: tuple[TensorPlace, ...]

    @property
    def size_bytes(self) -> int:
        return max((place.end for place in self.tensors), default=8 + len(self.header.encode()))


def open_shards(root: Path) -> list[Shard]:
    """Return the safetensors files of a Hugging Face folder, in order, with checked headers.

    Raises: CheckpointError naming the file and tensor that is damaged, listed twice or missing.
    """
    listed = _read_index(root) if os.path.lexists(root / INDEX) else None
    if listed is None and not os.path.lexists(root / SINGLE):
        raise CheckpointError(no_weights(root))
    files = [SINGLE] if listed is None else sorted(set(listed.values()))
    unlisted = [path for path in sorted(root.iterdir()) if WEIGHTS_NAME.fullmatch(path.name) and path.name not in files]
    if unlisted:  # transformers reads model.safetensors before any index
        wanted = "no other weights of the model than " + (SINGLE if listed is None else f"those that {INDEX} lists")
        raise CheckpointError(
            [Problem(str(path), "a file that is not one of the model's", wanted, "remove what does not belong") for path in unlisted]
        )
    shards: list[Shard] = []
    problems: list[Problem] = []
    for file in files:
        try:
            shards.append(read_header(root / file))
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(_one_of_a_cause(problems))
    if listed is not None:
        _check_index(root, listed, shards)
    return shards


def _one_of_a_cause(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems, with those alike in all but the place as one: thirty Git-LFS pointers are one mistake."""
    alike: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        cause = (problem.found if problem.fix or problem.found == ABSENT else problem.where, problem.required, problem.fix)
        alike.setdefault(cause, []).append(problem)
    return [replace(first, found=f"{first.found} (and {len(more)} more)" if more else first.found) for first, *more in alike.values()]


def _read_index(root: Path) -> dict[str, str]:
    where = root / INDEX
    listed = read_object(where, "JSON with a weight_map of tensor to file").get("weight_map")
    if not isinstance(listed, dict):
        raise CheckpointError(Problem(str(where), f"weight_map {reprlib.repr(listed)}", "a weight_map of tensor to file"))
    wrong = [name for name, file in listed.items() if not is_file_name(file)]
    if wrong:
        required = "a plain file name in the same folder, *.safetensors"
        raise CheckpointError([Problem(f"{where}: {name}", reprlib.repr(listed[name]), required) for name in wrong])
    return listed


def is_file_name(file: Any) -> bool:
    """Say whether a text is a plain name of a safetensors file, without a path."""
    if not isinstance(file, str) or not file.isprintable():  # no NUL, and only valid UTF-8
        return False
    return Path(file).name == file and file.endswith(".safetensors") and len(file.encode()) < 256


def _check_index(root: Path, listed: Mapping[str, str], shards: Sequence[Shard]) -> None:
    file_of: dict[str, str] = {}
    problems = []
    for shard in shards:
        for place in shard.tensors:
            if place.name in file_of:
                problems.append(
                    Problem(f"{root / shard.file}: {place.name}", f"a tensor that {file_of[place.name]} has too", "each tensor once")
                )
            elif listed.get(place.name) != shard.file:
                problems.append(
                    Problem(
                        f"{root / shard.file}: {place.name}", f"{INDEX} says {listed.get(place.name, 'nothing of it')}", f"{shard.file}"
                    )
                )
            file_of[place.name] = shard.file
    problems += [
        Problem(f"{root / file}: {name}", "no such tensor", f"a tensor, since {INDEX} lists it")
        for name, file in listed.items()
        if name not in file_of
    ]
    if problems:
        raise CheckpointError(problems)


def read_header(path: Path) -> Shard:
    """Read one safetensors file's header. The file must be exactly as long as its header says.

    Raises: CheckpointError naming the file, and each tensor at fault.
    """
    from safetensors import SafetensorError, safe_open

    if problem := refusal(path, "a safetensors file"):
        raise CheckpointError(problem)
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            text = length.to_bytes(8, "little") + stream.read(80)
            if size >= 8 and text.isascii() and all(letter.isprintable() or letter.isspace() for letter in text.decode()):
                raise CheckpointError(Problem(str(path), f"text ({text.decode()!r})", "a safetensors file", "fetch it again"))
            raise CheckpointError(
                Problem(str(path), f"a header of {length} bytes in a file of {size}", "a whole safetensors file", "fetch it again")
            )
        raw = stream.read(length)
    try:
        header = raw.decode("utf-8")
        entries = parse_object(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(Problem(str(path), f"a damaged header ({error})", "safetensors JSON")) from None
    entries.pop("__metadata__", None)
    tensors = parse_entries(entries, path, 8 + length)
    end = max((place.end for place in tensors), default=8 + length)
    if end != size:
        raise CheckpointError(
            Problem(str(path), f"{size} bytes", f"{end} bytes, from its header", "the file is truncated or has grown: fetch it again")
        )
    try:
        with safe_open(path, framework="np"):  # the library must accept it too: read nothing that others cannot read
            return Shard(path.name, header, tensors)
    except SafetensorError as error:
        raise CheckpointError(Problem(str(path), f"a damaged header ({error})", "what the safetensors library reads")) from None


def parse_entries(entries: Mapping[str, Any], path: Path, data_start: int) -> tuple[TensorPlace, ...]:
    """Return the tensors of a header in byte order. They must follow each other without gaps.

    Raises: CheckpointError naming each tensor at fault.
    """
    parsed = [_parse_entry(name, entry, path, data_start) for name, entry in entries.items()]
    problems = [problem for problem in parsed if isinstance(problem, Problem)]
    places = sorted((place for place in parsed if isinstance(place, TensorPlace)), key=lambda place: (place.start, place.end))
    ends = [data_start, *(place.end for place in places)]
    problems = problems or [
        Problem(f"{path}: {place.name}", f"bytes from {place.start}", f"bytes from {end}, where the last tensor ends")
        for place, end in zip(places, ends, strict=False)
        if place.start != end
    ]
    if problems:
        raise CheckpointError(problems)
    return tuple(places)


def _parse_entry(name: str, entry: Any, path: Path, data_start: int) -> TensorPlace | Problem:
    where = f"{path}: {name}"
    match entry:
        case {"dtype": str(dtype), "shape": [*sizes], "data_offsets": [start, end]} if len(sizes) <= MAX_DIMS and all(
            map(_is_count, (*sizes, start, end))
        ):
            pass
        case _:
            return Problem(where, reprlib.repr(entry), "a dtype, a shape of whole numbers, and data_offsets of two")
    if dtype not in BY_CODE:
        return Problem(where, f"dtype {dtype!r}", f"one of {', '.join(BY_CODE)}", f"are its weights quantised? {DEQUANTISE}")
    needed = prod(sizes) * BY_CODE[dtype].itemsize
    if end - start != needed:
        return Problem(where, f"{end - start} bytes", f"{needed} bytes for {dtype} {sizes}")
    return TensorPlace(name, path.name, BY_CODE[dtype], tuple(sizes), data_start + start, data_start + end)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # bool is not accepted as int


def read_values(stream: FileIO, place: TensorPlace, start: int, count: int) -> bits.Bits:
    """Return values [start, start + count) of one tensor, in row-major order."""
    piece = bits.empty((count,), place.dtype.itemsize)
    got = bits.read_at(stream, place.start + start * place.dtype.itemsize, piece)
    if got != piece.nbytes:
        raise CheckpointError(
            Problem(f"{stream.name}: {place.name}", f"{got} bytes", f"{piece.nbytes} bytes", "the file shrank while it was read")
        )
    return piece


@contextmanager
def open_files(root: Path, shards: Sequence[Shard]) -> Iterator[dict[str, FileIO]]:
    """Open every file of a folder for reading."""
    with ExitStack() as stack:
        yield {shard.file: stack.enter_context((root / shard.file).open("rb", buffering=0)) for shard in shards}


@contextmanager
def create_shards(root: Path, shards: Sequence[Shard]) -> Iterator[dict[str, FileIO]]:
    """Create every file of a folder, with its header, for writing. At the end each file is synced to disk (fsync)."""
    with ExitStack() as stack:
        files = {}
        for shard in shards:
            stream = stack.enter_context((root / shard.file).open("w+b", buffering=0))
            header = shard.header.encode("utf-8")
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(shard.size_bytes)
            files[shard.file] = stream
        yield files
        for stream in files.values():
            os.fsync(stream.fileno())


def write_values(stream: FileIO, place: TensorPlace, start: int, piece: bits.Bits) -> None:
    """Write values of one tensor, in its dtype, beginning at value `start`."""
    end = bits.write_at(stream, place.start + start * place.dtype.itemsize, piece)
    assert end <= place.end, (place, start, piece.shape)
