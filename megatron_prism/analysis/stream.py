"""Walk the tensors of two or three models at once, in pieces, on several threads: memory holds a piece of each a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from math import prod
from typing import TypeVar

import torch

from megatron_prism.analysis.components import Component, parts_of
from megatron_prism.core.errors import CheckpointError
from megatron_prism.hf import bits, safetensors
from megatron_prism.hf.finite import problem_in
from megatron_prism.hf.safetensors import TensorPlace

TASK_BYTES = 1 << 26  # of a tensor, which one thread reads
Value = TypeVar("Value")


@dataclass(frozen=True)
class Matched:
    """The same tensor in several models: its name in the first, and its place and open file in each."""

    name: str
    places: tuple[TensorPlace, ...]
    files: tuple[FileIO, ...]

    @property
    def row(self) -> int:
        """The entries of a row."""
        return prod(self.places[0].shape[1:])

    def parts(self) -> Iterator[tuple[Component, int, int]]:
        """Yield the components that the tensor holds, each with its entries [start, end)."""
        shape = self.places[0].shape
        for component, (first, end) in parts_of(self.name, shape[0] if shape else 1).items():
            yield component, first * self.row, end * self.row

    def read(self, first: int, count: int) -> list[torch.Tensor]:
        """Return entries [first, first + count) of each model.

        Raises: CheckpointError for a NaN or an inf: no figure would say anything.
        """
        return [self._values(place, file, first, count) for place, file in zip(self.places, self.files, strict=True)]

    def _values(self, place: TensorPlace, file: FileIO, first: int, count: int) -> torch.Tensor:
        piece = safetensors.read_values(file, place, first, count)
        if problem := problem_in(piece, place.dtype, first, place.shape, f"{file.name}: {place.name}"):
            raise CheckpointError(problem)
        return bits.to_tensor(piece, place.dtype)


Piece = Callable[[Matched, int, Sequence[torch.Tensor]], Value]  # a tensor, a piece's first entry, and the piece of each model


@dataclass(frozen=True)
class _Task:
    tensor: Matched
    component: Component
    start: int
    count: int


def walk(
    tensors: Sequence[Matched], piece: Piece[Value], num_threads: int, tick: Callable[[], None]
) -> Iterator[tuple[Matched, Component, list[Value]]]:
    """Yield what `piece` makes of each tensor's parts, in order. tick: called after each part."""
    tasks: list[_Task] = []
    for tensor in tensors:
        each = TASK_BYTES // tensor.places[0].dtype.itemsize
        for component, start, end in tensor.parts():
            tasks += [_Task(tensor, component, first, min(each, end - first)) for first in range(start, end, each)]
    with ThreadPoolExecutor(num_threads) as pool:
        values: list[Value] = []
        for index, (task, made) in enumerate(zip(tasks, pool.map(lambda task: _run(task, piece), tasks), strict=True)):
            values += made
            after = tasks[index + 1] if index + 1 < len(tasks) else None
            if after is None or (after.tensor, after.component) != (task.tensor, task.component):
                yield task.tensor, task.component, values
                values = []
                tick()


def _run(task: _Task, piece: Piece[Value]) -> list[Value]:
    itemsize = task.tensor.places[0].dtype.itemsize
    return [piece(task.tensor, first, task.tensor.read(first, count)) for first, count in bits.spans(task.start, task.count, itemsize)]
