"""The headers of safetensors files that are to be written: a new folder's, or an old one's with tensors renamed or left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from megatron_prism.hf.dtypes import Dtype
from megatron_prism.hf.safetensors import SINGLE, Shard, parse_entries


def rewritten(shard: Shard, names: Mapping[str, str]) -> Shard:
    """Return a file's header with other names for its tensors, and without those that `names` lacks; the same shard where nothing changes.

    The tensors' order and the metadata stay.
    """
    if all(names.get(place.name) == place.name for place in shard.tensors):
        return shard
    before = json.loads(shard.header)
    entries = {"__metadata__": before["__metadata__"]} if "__metadata__" in before else {}
    position = 0
    for place in shard.tensors:
        if place.name in names:
            end = position + place.end - place.start
            entries[names[place.name]] = {**before[place.name], "data_offsets": [position, end]}
            position = end
    return _shard(Path(shard.file), entries)


def recast(shard: Shard, dtypes: Mapping[str, Dtype]) -> Shard:
    """Return a file's header with other dtypes for its tensors; the same shard where nothing changes. Order and metadata stay."""
    if all(dtypes[place.name] == place.dtype for place in shard.tensors):
        return shard
    before = json.loads(shard.header)
    entries = {"__metadata__": before["__metadata__"]} if "__metadata__" in before else {}
    position = 0
    for place in shard.tensors:
        dtype = dtypes[place.name]
        end = position + prod(place.shape) * dtype.itemsize
        entries[place.name] = {**before[place.name], "dtype": dtype.code, "data_offsets": [position, end]}
        position = end
    return _shard(Path(shard.file), entries)


def rewritten_index(index: Mapping[str, Any], kept: Sequence[Shard]) -> dict[str, Any]:
    """Return a folder's index for the files that are kept of it."""
    new = index_of(kept)
    before = index.get("metadata")
    return {**index, **new, "metadata": {**(before if isinstance(before, dict) else {}), **new["metadata"]}}


def new_shards(shapes: Mapping[str, tuple[int, ...]], dtype: Dtype, max_shard_bytes: int = 5_000_000_000) -> list[Shard]:
    """Return the headers of a new folder, as `save_pretrained` writes them: sorted names, files of at most 5 GB."""
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


def _new_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: Dtype) -> Shard:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in sorted(shapes):
        end = position + prod(shapes[name]) * dtype.itemsize
        entries[name] = {"dtype": dtype.code, "shape": list(shapes[name]), "data_offsets": [position, end]}
        position = end
    return _shard(path, entries)


def _shard(path: Path, entries: Mapping[str, Any]) -> Shard:
    header = json.dumps(entries, separators=(",", ":"))
    header += " " * (-len(header) % 8)  # safetensors aligns the data to 8 bytes
    tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
    return Shard(path.name, header, parse_entries(tensors, path, 8 + len(header)))


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """Return the model.safetensors.index.json of several shards."""
    places = [place for shard in shards for place in shard.tensors]
    total = sum(place.end - place.start for place in places)
    return {"metadata": {"total_size": total}, "weight_map": {place.name: place.file for place in sorted(places, key=lambda p: p.name)}}
