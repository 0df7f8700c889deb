"""Hugging Face folders at the level of bytes: safetensors headers read and checked, tensors read and written one by one.

Headers are kept as they stand on disk, so a folder that is written back has the same files, layout and order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_prism.checkpoint import pieces
from megatron_prism.core.errors import CheckpointError, Problem

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor's bytes lie: file, dtype, shape, and [start, end) from the beginning of the file."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, its header's JSON as it stands on disk, its tensors."""

    file: str
    header: str
    tensors: tuple[TensorPlace, ...]

    @property
    def size_bytes(self) -> int:
        return max((place.end for place in self.tensors), default=8 + len(self.header.encode()))


def open_shards(root: Path) -> list[Shard]:
    """Return the safetensors files of a Hugging Face folder, in order, their headers checked.

    Raises: CheckpointError naming the file and tensor that is damaged, listed twice or missing.
    """
    if (root / INDEX).is_file():
        listed = _read_index(root)
        shards = [read_header(root / file) for file in sorted(set(listed.values()))]
        _check_index(root, listed, shards)
        return shards
    if (root / SINGLE).is_file():
        return [read_header(root / SINGLE)]
    raise CheckpointError(Problem(str(root), "no safetensors weights", f"{SINGLE}, or {INDEX} with its shards"))


def _read_index(root: Path) -> dict[str, str]:
    where = root / INDEX
    try:
        listed = json.loads(where.read_text(encoding="utf-8"))["weight_map"]
        wrong = [name for name, file in listed.items() if not isinstance(file, str) or Path(file).name != file or "\0" in file]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(Problem(str(where), f"{type(error).__name__}: {error}", "JSON with a weight_map of tensor to file")) from None
    if wrong:
        raise CheckpointError([Problem(f"{where}: {name}", repr(listed[name]), "a plain file name in the same folder") for name in wrong])
    return listed


def _check_index(root: Path, listed: Mapping[str, str], shards: Sequence[Shard]) -> None:
    found: dict[str, str] = {}
    problems = []
    for shard in shards:
        for place in shard.tensors:
            if place.name in found:
                problems.append(Problem(f"{root / shard.file}: {place.name}", f"a tensor that {found[place.name]} has too", "each tensor once"))
            elif listed.get(place.name) != shard.file:
                problems.append(Problem(f"{root / shard.file}: {place.name}", f"{INDEX} says {listed.get(place.name)}", f"{shard.file}"))
            found[place.name] = shard.file
    problems += [Problem(f"{root / file}: {name}", "no such tensor", f"a tensor, since {INDEX} lists it") for name, file in listed.items() if name not in found]
    if problems:
        raise CheckpointError(problems)


def read_header(path: Path) -> Shard:
    """Return one safetensors file's tensors; the file must be exactly as long as its header says.

    Raises: CheckpointError naming the file, and the tensor where one is at fault.
    """
    if not path.is_file() or not is_inside(path):
        raise CheckpointError(Problem(str(path), "no such file" if is_inside(path) else "a link out of the folder", "a safetensors file"))
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(Problem(str(path), f"a header of {length} bytes in a file of {size}", "a whole safetensors file", "fetch it again"))
        raw = stream.read(length)
    try:
        header = raw.decode("utf-8")
        entries = json.loads(header, object_pairs_hook=_unique)
        if not isinstance(entries, dict):
            raise ValueError("the header is no object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(Problem(str(path), f"a damaged header ({error})", "safetensors JSON")) from None
    entries.pop("__metadata__", None)
    tensors = parse_entries(entries, path, 8 + length)
    end = max((place.end for place in tensors), default=8 + length)
    if end != size:
        raise CheckpointError(Problem(str(path), f"{size} bytes", f"{end} bytes, from its header", "the file is truncated or has grown: fetch it again"))
    return Shard(path.name, header, tensors)


def is_inside(path: Path) -> bool:
    """Say whether a file lies in its folder once links are followed; a snapshot of the hub's cache may link to ../../blobs."""
    root = path.parent.resolve()
    return path.resolve().parent in (root, root.parent.parent / "blobs")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"key {next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))!r} stands twice")
    return result


def parse_entries(entries: Mapping[str, Any], path: Path, data_start: int) -> tuple[TensorPlace, ...]:
    """Return the tensors of a header in the order of their bytes, which must follow each other without a gap."""
    places = []
    for name, entry in entries.items():
        try:
            dtype, shape, (start, end) = str(entry["dtype"]), tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise CheckpointError(Problem(f"{path}: {name}", repr(entry), "dtype, shape and data_offsets")) from None
        if dtype not in DTYPES:
            raise CheckpointError(Problem(f"{path}: {name}", f"dtype {dtype}", f"one of {', '.join(DTYPES)}"))
        needed = prod(shape) * DTYPES[dtype].itemsize
        if min(shape, default=0) < 0 or end - start != needed:
            raise CheckpointError(Problem(f"{path}: {name}", f"{end - start} bytes", f"{needed} bytes for {dtype} {list(shape)}"))
        places.append(TensorPlace(name, path.name, DTYPES[dtype], shape, data_start + start, data_start + end))
    places.sort(key=lambda place: (place.start, place.end))
    position = data_start
    for place in places:
        if place.start != position:
            raise CheckpointError(Problem(f"{path}: {place.name}", f"bytes from {place.start}", f"bytes from {position}, where the last tensor ends"))
        position = place.end
    return tuple(places)


def read_tensor(root: Path, place: TensorPlace) -> torch.Tensor:
    """Return one tensor, read from disk (not mapped, so that it counts once in memory and goes when it is dropped)."""
    with (root / place.file).open("rb", buffering=0) as stream:
        return pieces.to_tensor(read_values(stream, place, 0, prod(place.shape)), place.dtype).reshape(place.shape)


def read_values(stream: FileIO, place: TensorPlace, start: int, count: int) -> pieces.Bits:
    """Return values [start, start + count) of one tensor, counted in row-major order."""
    bits = pieces.empty((count,), place.dtype)
    got = pieces.read_at(stream, place.start + start * place.dtype.itemsize, bits)
    if got != bits.nbytes:
        raise CheckpointError(Problem(f"{stream.name}: {place.name}", f"{got} bytes", f"{bits.nbytes} bytes", "the file shrank while it was read"))
    return bits


@contextmanager
def open_files(root: Path, shards: Sequence[Shard]) -> Iterator[dict[str, FileIO]]:
    """Open every file of a folder to be read."""
    with ExitStack() as stack:
        yield {shard.file: stack.enter_context((root / shard.file).open("rb", buffering=0)) for shard in shards}


@contextmanager
def create_shards(root: Path, shards: Sequence[Shard]) -> Iterator[dict[str, FileIO]]:
    """Open every file of a folder to be written, headers in place; at the end each is whole on disk (fsync)."""
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


def write_tensor(stream: FileIO, place: TensorPlace, tensor: torch.Tensor) -> None:
    """Write one tensor at its place, cast to the place's dtype."""
    assert tensor.numel() == prod(place.shape), (place, tuple(tensor.shape))
    write_values(stream, place, 0, pieces.of_tensor(tensor.to(place.dtype)))


def write_values(stream: FileIO, place: TensorPlace, start: int, bits: pieces.Bits) -> None:
    """Write values of one tensor, in its dtype, from value `start` on."""
    end = pieces.write_at(stream, place.start + start * place.dtype.itemsize, bits)
    assert end <= place.end, (place, start, bits.shape)


def new_shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int = 5_000_000_000) -> list[Shard]:
    """Return the layout of a new folder, as `save_pretrained` lays it: names in order, files of at most 5 GB."""
    bins: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = prod(shape) * dtype.itemsize
        if used and used + size > max_shard_bytes:
            bins.append({})
            used = 0
        bins[-1][name] = shape
        used += size
    total = len(bins)
    names = [SINGLE] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    return [_new_shard(Path(name), part, dtype) for name, part in zip(names, bins, strict=True)]


def _new_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Shard:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in sorted(shapes):
        end = position + prod(shapes[name]) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries, separators=(",", ":"))
    header += " " * (-len(header) % 8)  # safetensors aligns the data to 8 bytes
    del entries["__metadata__"]
    return Shard(path.name, header, parse_entries(entries, path, 8 + len(header)))


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """Return the model.safetensors.index.json of several shards."""
    places = [place for shard in shards for place in shard.tensors]
    total = sum(place.end - place.start for place in places)
    return {"metadata": {"total_size": total}, "weight_map": {place.name: place.file for place in sorted(places, key=lambda p: p.name)}}
