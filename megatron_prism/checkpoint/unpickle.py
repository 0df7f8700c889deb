"""Read the pickles in a checkpoint without running what they name.

torch.distributed.checkpoint reads .metadata with pickle.load and objects with torch.load(weights_only=False); Transformer Engine, and beside
it Megatron-Core 0.16, read a layer's `_extra_state` with pickle.loads. Inside `guarded` each of them reads through `_Unpickler` or
torch's weights_only. Megatron's dataset caches (numpy.load with allow_pickle) are never read: data/indexed.py has no pickle.
Source: torch/distributed/checkpoint/{filesystem,default_planner}.py (2.13), megatron/core/extensions/transformer_engine.py (0.16.1, 0.19.2),
transformer_engine/pytorch/module/base.py (2.11).
"""

from __future__ import annotations

import os
import pickle
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.core.patch import replaced

# Modules that unpickle what a checkpoint holds, through their global name `pickle`.
READERS = (
    "torch.distributed.checkpoint.filesystem",
    "megatron.core.extensions.transformer_engine",
    "transformer_engine.pytorch.module.base",
    "transformer_engine.pytorch.ops.op",
)
# All names that .metadata and a layer's FP8 state may hold: plain data, and what rebuilds a tensor. None of them calls its arguments.
ALLOWED: dict[str, set[str]] = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},  # where it was written
    "pathlib._local": {"PosixPath"},  # by Python 3.13
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"_load_from_bytes"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
    "megatron.core.safe_globals": {"safe_load_from_bytes"},  # 0.19's name for torch.storage's
    "transformer_engine.common.recipe": {
        *("DelayedScaling", "Float8BlockScaling", "Float8CurrentScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"),
        *("Format", "MMParams", "QParams", "_FormatHelper"),
    },
}
TE_ALLOWS = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"  # Transformer Engine 2.20 refuses FP8 state that is a pickle; here it is read safely
SHARED = (type, types.FunctionType, types.BuiltinFunctionType, Enum)  # BUILD would change these for the whole process
REQUIRED = "plain data and tensors: nothing that runs when it is read"

_one_at_a_time = threading.RLock()  # guarded() replaces attributes of modules, for the whole process


@contextmanager
def guarded(root: Path) -> Iterator[None]:
    """Within the block, nothing that torch, Megatron-Core or Transformer Engine load from the checkpoint `root` can run code.

    Raises: CheckpointError with the file and the name in it, where a pickle holds more than data.
    """
    refused: list[CheckpointError] = []
    loads = partial(_loads, f"{root}: the _extra_state of a layer")
    safe = types.SimpleNamespace(**{**vars(pickle), "load": partial(_load_metadata, refused), "loads": loads, "Unpickler": _Unpickler})
    with _one_at_a_time, ExitStack() as stack:
        for module in (sys.modules[name] for name in READERS if name in sys.modules):
            stack.enter_context(replaced(module, "pickle", safe))
        stack.enter_context(_variable(TE_ALLOWS))
        stack.enter_context(replaced(torch, "load", partial(_load, torch.load, root)))
        stack.enter_context(replaced(DefaultLoadPlanner, "load_bytes", _naming_its_place(root, DefaultLoadPlanner.load_bytes)))
        try:
            yield
        except CheckpointException as error:  # torch's: holds what each rank raised, but for .metadata only its text
            refused += [cause for cause, _ in error.failures.values() if isinstance(cause, CheckpointError)]
            if not refused:
                raise
            raise refused[0] from None


@contextmanager
def _variable(name: str) -> Iterator[None]:
    kept = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if kept is not None:
            os.environ[name] = kept


class _Unpickler(pickle._Unpickler):
    """Finds only the names in ALLOWED, whole: a dotted name does not reach into a module."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed global."""
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")
        return _tensors if name.endswith("load_from_bytes") else super().find_class(module, name)

    def load_build(self) -> None:
        """Set an object's state, but never that of a class, a function or an enum's member."""
        if isinstance(self.stack[-2], SHARED):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError(f"a new state for {self.stack[-2]!r}")  # type: ignore[attr-defined]
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def _tensors(data: bytes) -> Any:
    return torch.load(BytesIO(data), weights_only=True)


def _read(where: str, stream: IO[bytes]) -> Any:
    try:
        return _Unpickler(stream).load()
    except Exception as error:  # a damaged pickle raises any kind
        raise _refused(where, error) from None


def _loads(where: str, data: bytes) -> Any:
    return _read(where, BytesIO(data))


def _load_metadata(refused: list[CheckpointError], stream: IO[bytes]) -> Metadata:
    """Return .metadata, if it is laid out as torch writes it and names only files of its own folder; else add the error to `refused`."""
    where = str(getattr(stream, "name", "a pickle"))
    try:
        metadata = _read(where, stream)
        if not _is_metadata(metadata):
            required = "torch.distributed.checkpoint's Metadata"
            raise CheckpointError(
                Problem(where, f"a {type(metadata).__name__} of another layout, or tensors in files of other folders", required)
            )
    except CheckpointError as error:
        refused.append(error)
        raise
    return metadata


def _is_metadata(metadata: Any) -> bool:
    try:
        is_right = type(metadata) is Metadata and type(metadata.storage_meta) in (StorageMeta, type(None))
        is_right = is_right and all(type(key) is str and _is_entry(entry) for key, entry in metadata.state_dict_metadata.items())
        return is_right and all(type(index) is MetadataIndex and _is_place(place) for index, place in metadata.storage_data.items())
    except (AttributeError, TypeError):
        return False


def _is_entry(entry: Any) -> bool:
    if type(entry) is BytesStorageMetadata:
        return True
    sizes = [entry.size, *(part for chunk in entry.chunks for part in (chunk.offsets, chunk.sizes))]
    is_shaped = all(type(size) is torch.Size and len(size) == len(entry.size) for size in sizes)
    return type(entry) is TensorStorageMetadata and is_shaped and isinstance(entry.properties.dtype, torch.dtype)


def _is_place(place: Any) -> bool:
    file = place.relative_path
    return type(place) is _StorageInfo and file == os.path.basename(file) not in ("", ".", "..") and min(place.offset, place.length) >= 0


def _load(load: Callable[..., Any], root: Path, file: Any, *args: Any, **kwargs: Any) -> Any:
    """Load as torch.load does, with weights_only whatever the caller asks for."""
    try:
        return load(file, *args, **{**kwargs, "weights_only": True})
    except pickle.UnpicklingError as error:
        where = file if isinstance(file, (str, os.PathLike)) else getattr(file, "name", root)
        raise _refused(str(where), error) from None


def _naming_its_place(root: Path, load_bytes: Callable[..., None]) -> Callable[..., None]:
    """Return load_bytes with the file and key of a stored object as its stream's name, for the error message."""

    def load_named(planner: Any, item: Any, value: Any) -> None:
        place = planner.metadata.storage_data[item.storage_index]
        value.name = f"{root / place.relative_path}: {item.storage_index.fqn}"
        load_bytes(planner, item, value)

    return load_named


def _refused(where: str, error: Exception) -> CheckpointError:
    """Return the error for a refused pickle, with the forbidden name where there is one."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    if name:
        return CheckpointError(
            Problem(where, f"a pickle that names {name[1]}", REQUIRED, "loading it could run code: do not trust where it comes from")
        )
    return CheckpointError(
        Problem(where, f"a pickle that cannot be read ({type(error).__name__}: {str(error).rsplit('error:', 1)[-1]})", REQUIRED)
    )
