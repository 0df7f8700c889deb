"""Single tensors in and out of a Megatron torch_dist checkpoint, without a model: memory holds one tensor at a time.

torch_dist is torch.distributed.checkpoint's format with Megatron's two marker files, so torch's own planners and
file-system storage do the work (megatron/core/dist_checkpointing/strategies/torch.py).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.core.manifest import write_json

MARKER = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its key, shape and dtype, known before its values are."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def write_tensors(root: Path, specs: Sequence[TensorSpec], values: Callable[[str], torch.Tensor]) -> None:
    """Write a torch_dist checkpoint; `values(key)` is asked for each tensor when its turn comes, and not before."""
    # a file a tensor: torch holds every tensor of a file until that file is whole
    writer = dcp.FileSystemWriter(root, single_file_per_rank=False, sync_files=True)
    keys: dict[str, Any] = {spec.key: spec for spec in specs}
    try:
        with _no_gang():
            dcp.save(keys, storage_writer=writer, planner=_OneAtATime(specs, values), no_dist=True)
    except CheckpointException as error:  # no Exception; it wraps what was raised, by rank
        raise next(iter(error.failures.values()))[0] from None
    torch.save({}, root / "common.pt")
    write_json(root / "metadata.json", MARKER)  # last: Megatron takes the folder for complete by it


@contextmanager
def _no_gang() -> Iterator[None]:
    with warnings.catch_warnings():  # torch warns that it saves or loads in a single process, which is what is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


class _OneAtATime(SavePlanner):
    """A save plan made from shapes alone; torch's writer resolves each item as it writes it."""

    def __init__(self, specs: Sequence[TensorSpec], values: Callable[[str], torch.Tensor]):
        self.specs = specs
        self.values = values

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        return None

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(spec) for spec in self.specs])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        tensors: dict[str, Any] = {
            spec.key: TensorStorageMetadata(TensorProperties(dtype=spec.dtype), torch.Size(spec.shape), [_whole(spec)]) for spec in self.specs
        }
        return all_plans, Metadata(state_dict_metadata=tensors)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self.values(write_item.index.fqn)


def _whole(spec: TensorSpec) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size([0] * len(spec.shape)), sizes=torch.Size(spec.shape))


def _write_item(spec: TensorSpec) -> WriteItem:
    data = TensorWriteData(chunk=_whole(spec), properties=TensorProperties(dtype=spec.dtype), size=torch.Size(spec.shape))
    return WriteItem(index=MetadataIndex(spec.key, torch.Size([0] * len(spec.shape)), 0), type=WriteItemType.SHARD, tensor_data=data)


class TensorReader:
    """Reads whole tensors of a torch_dist checkpoint, however they are sharded in it."""

    def __init__(self, root: Path):
        self.root = root
        try:
            self._metadata = dcp.FileSystemReader(root).read_metadata()
        except Exception as error:  # torch raises five kinds here
            raise CheckpointError(Problem(str(root), f"{type(error).__name__}: {error}", "a torch_dist checkpoint")) from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's global shape by key."""
        found = self._metadata.state_dict_metadata.items()
        return {key: tuple(entry.size) for key, entry in found if isinstance(entry, TensorStorageMetadata)}

    def read(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return one tensor; of a padded one the first `shape` part.

        Raises: CheckpointError naming the tensor where it cannot be read.
        """
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata), key
        target = {key: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)}
        try:
            with _no_gang():
                dcp.load(target, storage_reader=_Reader(self.root, self._metadata), no_dist=True)
        except BaseException as error:  # torch's CheckpointException is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            raise CheckpointError(Problem(f"{self.root}: {key}", f"{type(error).__name__}: {error}", "a readable tensor")) from error
        return target[key][tuple(slice(size) for size in shape)]


class _Reader(dcp.FileSystemReader):
    """torch's reader, with the metadata read once for all tensors."""

    def __init__(self, root: Path, metadata: Metadata):
        super().__init__(root)
        self._cached = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._cached
