"""A Hugging Face folder's weights as a mapping from name to tensor. Each access reads the tensor from disk.

    with open_tensors(base) as before, open_tensors(other) as after:
        for name in before:
            moved = (after[name].double() - before[name].double()).norm()

Nothing is cached: memory holds only the tensors that the caller holds. families/blocks.to_mcore accepts such a mapping.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from math import prod
from pathlib import Path

import torch

from megatron_prism.hf import as_torch, safetensors


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of an open folder, in the order of its files. `places` gives their shapes and dtypes without reading a value."""

    def __init__(self, places: Mapping[str, safetensors.TensorPlace], files: Mapping[str, FileIO]):
        self.places = places
        self._files = files

    def __getitem__(self, name: str) -> torch.Tensor:
        place = self.places[name]
        values = safetensors.read_values(self._files[place.file], place, 0, prod(place.shape))
        return as_torch.to_tensor(values, as_torch.dtype_of(place.dtype)).view(place.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.places  # Mapping's default would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


@contextmanager
def open_tensors(root: Path) -> Iterator[Tensors]:
    """Open a Hugging Face folder's weights, one file or several.

    Raises: CheckpointError where a header or the index is invalid (safetensors.open_shards), or a file shrinks while it is read.
    """
    shards = safetensors.open_shards(root)
    with safetensors.open_files(root, shards) as files:
        yield Tensors({place.name: place for shard in shards for place in shard.tensors}, files)
