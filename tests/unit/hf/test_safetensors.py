"""safetensors at the level of bytes: every damaged header is refused by file and tensor, every whole one kept as it stands."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.hf import as_torch, dtypes, layout, safetensors

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}
DATA = bytes(16)
INDEX = "model.safetensors.index.json"


def raw(header: Any, data: bytes = DATA) -> bytes:
    """Return a safetensors file's bytes; the header may be text of any kind."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def with_b(**changes: Any) -> bytes:
    return raw({"a": A, "b": {key: value for key, value in (B | changes).items() if value is not None}})


DAMAGED_FILES = {
    "empty": b"",
    "seven bytes": bytes(7),
    "length beyond the file": (1000).to_bytes(8, "little") + b"{}",
    "length of 2**63": (2**63).to_bytes(8, "little") + b"{}",
    "no JSON": raw(b"{"),
    "no UTF-8": raw(b'{"\xff": 1}'),
    "a list": raw([A]),
    "nested without end": raw(b"[" * 100_000),
    "one byte short": raw({"a": A, "b": B})[:-1],
    "one byte long": raw({"a": A, "b": B}) + b"\0",
    "data of no tensor": raw({}, b"\0"),
    "a name twice": raw(b'{"b": %b, "b": %b}' % ((json.dumps(A | {"data_offsets": [0, 8]}).encode(),) * 2), bytes(8)),
    "a key twice": raw(b'{"b": {"dtype": "F32", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'),
}
DAMAGED_TENSORS = {
    "no dtype": with_b(dtype=None),
    "no offsets": with_b(data_offsets=None),
    "three offsets": with_b(data_offsets=[8, 12, 16]),
    "unknown dtype": with_b(dtype="F8_E4M3"),
    "dtype no text": with_b(dtype=["BF16"]),
    "negative sizes": with_b(shape=[-2, -2]),
    "another size": with_b(shape=[2, 3]),
    "sizes no numbers": with_b(shape=["x"]),
    "offset beyond all": with_b(data_offsets=[8, float("inf")]),
    "a gap": raw({"a": A, "b": B | {"data_offsets": [12, 20]}}, bytes(20)),
    "an overlap": raw({"a": A, "b": B | {"data_offsets": [4, 12]}}, bytes(12)),
    "the same bytes": raw({"a": A, "b": A}, bytes(8)),
    "backwards": with_b(data_offsets=[16, 8]),
    "before the data": raw({"b": B | {"data_offsets": [-8, 0]}}, b""),
    "no object": raw({"a": A, "b": None}),
}


def refused(path: Path, data: bytes) -> Problem:
    """Return what is wrong with a folder whose only file this is."""
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        safetensors.open_shards(path.parent)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("damage", DAMAGED_FILES)
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / safetensors.SINGLE
    problem = refused(path, DAMAGED_FILES[damage])
    assert problem.where.startswith(str(path))
    assert "twice" not in damage or "twice" in problem.found


@pytest.mark.parametrize("damage", DAMAGED_TENSORS)
def test_a_damaged_tensor_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / safetensors.SINGLE
    assert refused(path, DAMAGED_TENSORS[damage]).where == f"{path}: b"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Return a folder of one file with every dtype, a scalar, an empty tensor and metadata."""
    tensors = {name: torch.randn(3, 5).to(as_torch.dtype_of(dtype)) for name, dtype in dtypes.BY_NAME.items()}
    save_file(
        {**tensors, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}, tmp_path / safetensors.SINGLE, metadata={"format": "pt"}
    )
    return tmp_path


def read(root: Path, place: safetensors.TensorPlace) -> torch.Tensor:
    with (root / place.file).open("rb", buffering=0) as stream:
        values = safetensors.read_values(stream, place, 0, math.prod(place.shape))
    return as_torch.to_tensor(values, as_torch.dtype_of(place.dtype)).reshape(place.shape)


def test_tensors_are_those_of_the_safetensors_library(whole: Path) -> None:
    (shard,) = safetensors.open_shards(whole)
    wanted = load_file(whole / safetensors.SINGLE)
    found = {place.name: read(whole, place) for place in shard.tensors}
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items())


def test_a_file_is_written_back_byte_for_byte(whole: Path, tmp_path: Path) -> None:
    (shard,) = shards = safetensors.open_shards(whole)
    (tmp_path / "out").mkdir()
    with safetensors.create_shards(tmp_path / "out", shards) as files:
        for place in reversed(shard.tensors):  # in any order
            safetensors.write_values(files[place.file], place, 0, as_torch.of_tensor(read(whole, place)))
    assert (tmp_path / "out" / safetensors.SINGLE).read_bytes() == (whole / safetensors.SINGLE).read_bytes()


def test_a_file_that_shrinks_while_it_is_read_is_named(whole: Path) -> None:
    (shard,) = safetensors.open_shards(whole)
    last = shard.tensors[-1]
    (whole / safetensors.SINGLE).write_bytes((whole / safetensors.SINGLE).read_bytes()[: last.end - 1])
    with pytest.raises(CheckpointError, match=f"model.safetensors: {last.name}: found"):
        read(whole, last)


def test_new_shards_fill_files_in_order_and_read_as_safetensors(tmp_path: Path) -> None:
    shapes = {"b": (4, 8), "a": (4, 8), "c": (1,), "d": (64, 8), "e": (2, 2)}
    shards = layout.new_shards(shapes, dtypes.BF16, max_shard_bytes=129)
    assert [[place.name for place in shard.tensors] for shard in shards] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [shard.file for shard in shards] == [f"model-0000{index}-of-00004.safetensors" for index in (1, 2, 3, 4)]
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    with safetensors.create_shards(tmp_path, shards) as files:
        for place in (place for shard in shards for place in shard.tensors):
            safetensors.write_values(files[place.file], place, 0, as_torch.of_tensor(values[place.name].bfloat16()))
    (tmp_path / INDEX).write_text(json.dumps(layout.index_of(shards)))
    assert [shard.header for shard in safetensors.open_shards(tmp_path)] == [shard.header for shard in shards]
    read = {name: value for shard in shards for name, value in load_file(tmp_path / shard.file).items()}
    assert all(torch.equal(read[name], value.bfloat16()) for name, value in values.items())
    assert layout.index_of(shards)["metadata"]["total_size"] == 2 * sum(value.numel() for value in values.values())
    assert [shard.file for shard in layout.new_shards(shapes, dtypes.F32)] == [safetensors.SINGLE]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Return a folder of two shards: x holds a, y holds b."""
    folder = tmp_path / "hub" / "snapshots" / "main"
    folder.mkdir(parents=True)
    for file, name in (("x.safetensors", "a"), ("y.safetensors", "b")):
        (folder / file).write_bytes(raw({name: A}, bytes(8)))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    return folder


@pytest.mark.parametrize(
    ("index", "where"),
    [
        ({"weight_map": {"a": "x.safetensors", "b": "z.safetensors"}}, "z.safetensors"),
        ({"weight_map": {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"}}, "y.safetensors: c"),
        ({"weight_map": {"a": "x.safetensors", "c": "y.safetensors"}}, "y.safetensors: b"),
        ({"weight_map": {"a": "y.safetensors", "b": "x.safetensors"}}, "x.safetensors: a"),
        *(
            ({"weight_map": {"a": "x.safetensors", "b": name}}, f"{INDEX}: b")
            for name in ("../y.safetensors", "/etc/passwd", "a/../y.safetensors", ".", 3)
        ),
        *(({"weight_map": {"a": "x.safetensors", "b": name}}, "") for name in ("..", "", "y\0")),
        ({"weight_map": ["a"]}, INDEX),
        ({}, INDEX),
        ([], INDEX),
        ("{", INDEX),
    ],
)
def test_an_index_that_does_not_hold_is_refused(two: Path, index: Any, where: str) -> None:
    (two / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        safetensors.open_shards(two)
    assert any(problem.where.startswith(str(two)) and problem.where.endswith(where) for problem in caught.value.problems)


def test_a_tensor_in_two_files_is_refused(two: Path) -> None:
    (two / "y.safetensors").write_bytes(raw({"a": A, "b": A | {"data_offsets": [8, 16]}}))
    with pytest.raises(CheckpointError, match=r"y.safetensors: a: found a tensor that x.safetensors has too"):
        safetensors.open_shards(two)


def test_links_stay_in_the_folder_or_in_the_hubs_cache(two: Path) -> None:
    blobs, outside = two.parents[1] / "blobs", two.parents[2] / "outside"
    for folder in (blobs, outside):
        folder.mkdir()
        (folder / "hash").write_bytes((two / "y.safetensors").read_bytes())
    (two / "y.safetensors").unlink()
    (two / "y.safetensors").symlink_to("../../blobs/hash")
    (shard,) = (shard for shard in safetensors.open_shards(two) if shard.file == "y.safetensors")
    assert read(two, shard.tensors[0]).tolist() == [0, 0]
    (two / "y.safetensors").unlink()
    (two / "y.safetensors").symlink_to(outside / "hash")
    with pytest.raises(CheckpointError, match=r"y.safetensors: found a link out of the folder"):
        safetensors.open_shards(two)
    (two / "y.safetensors").unlink()
    (two / "y.safetensors").symlink_to("../../blobs/hash")
    moved = two.parent.rename(two.parents[1] / "copies")  # the same link, outside of a hub's snapshots
    with pytest.raises(CheckpointError, match=r"y.safetensors: found a link out of the folder"):
        safetensors.open_shards(moved / two.name)


def test_a_file_that_may_not_be_read_is_named(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may be root
    with pytest.raises(CheckpointError, match=f"{INDEX}: found a file that may not be read"):
        safetensors.open_shards(two)


@pytest.mark.parametrize("file", ["pytorch_model.bin", None])
def test_a_folder_without_safetensors_is_named(tmp_path: Path, file: str | None) -> None:
    if file:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        safetensors.open_shards(tmp_path)
