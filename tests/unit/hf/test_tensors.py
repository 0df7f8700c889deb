"""A folder's tensors by name: what the safetensors library reads, one at a time, and no more."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prism.core.errors import CheckpointError
from megatron_prism.hf import as_torch, dtypes, safetensors
from megatron_prism.hf.tensors import open_tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of two shards: every dtype, a scalar, an empty tensor."""
    weights = {name: torch.randn(3, 5).to(as_torch.dtype_of(dtype)) for name, dtype in dtypes.BY_NAME.items()}
    save_file(weights, tmp_path / "a.safetensors")
    save_file({"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}, tmp_path / "b.safetensors")
    names = dict.fromkeys(weights, "a.safetensors") | dict.fromkeys(("scalar", "empty"), "b.safetensors")
    (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": names}))
    return tmp_path


def test_tensors_are_those_of_the_safetensors_library(folder: Path) -> None:
    wanted = load_file(folder / "a.safetensors") | load_file(folder / "b.safetensors")
    with open_tensors(folder) as weights:
        assert len(weights) == len(wanted) and weights.keys() == wanted.keys()
        for name, tensor in weights.items():
            assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape)
            assert (as_torch.dtype_of(weights.places[name].dtype), weights.places[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(tensor, wanted[name])


def test_a_tensor_is_read_when_it_is_asked_for_and_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_values = safetensors.read_values

    def note(stream: Any, place: safetensors.TensorPlace, *span: int) -> Any:
        read.append(place.name)
        return read_values(stream, place, *span)

    monkeypatch.setattr(safetensors, "read_values", note)
    with open_tensors(folder) as weights:
        assert "scalar" in weights and "none" not in weights and not read
        weights["scalar"].zero_()
        assert weights["scalar"] == 2.5 and read == ["scalar"] * 2
        with pytest.raises(KeyError, match="none"):
            weights["none"]


def test_a_file_that_shrinks_while_it_is_open_is_named(folder: Path) -> None:
    with open_tensors(folder) as weights:
        os.truncate(folder / "b.safetensors", (folder / "b.safetensors").stat().st_size - 1)
        with pytest.raises(CheckpointError, match=r"b\.safetensors: scalar: found 3 bytes; required 4 bytes"):
            weights["scalar"]
