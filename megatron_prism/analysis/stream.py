"""Walk the tensors of two or three models at rest at once, in pieces, on several threads: memory holds a piece of each a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import torch

from megatron_prism.analysis.components import Component, parts_of
from megatron_prism.checkpoint.at_rest import Opened
from megatron_prism.hf import as_torch, bits
from megatron_prism.hf.dtypes import Dtype

TASK_BYTES = 1 << 24  # of a tensor, which one thread reads
Value = TypeVar("Value")
Read = Callable[[int, int], list[torch.Tensor]]  # from (first row, number of rows) to their values in each model, flat


@dataclass(frozen=True)
class Matched:
    """The same tensor in several models. name: in the first one's folder. key: by the family's rules."""

    name: str
    key: str
    models: tuple[Opened, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.models[0].at_rest.shapes[self.key]

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """The dtype that each model stores it in."""
        return tuple(each.at_rest.dtypes[self.key] for each in self.models)

    @property
    def row(self) -> int:
        """The entries of a row."""
        return prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        """The bytes of a row in the first model."""
        return self.row * self.dtypes[0].itemsize

    def parts(self) -> Iterator[tuple[Component, int, int]]:
        """Yield the components that the tensor holds, each with its rows [start, end)."""
        for component, (first, end) in parts_of(self.name, self.shape[0]).items():
            yield component, first, end

    @contextmanager
    def open(self) -> Iterator[Read]:
        """Open the tensor in each model. What it yields raises CheckpointError for a NaN or an inf: no figure would say anything."""
        with ExitStack() as stack:
            reads = [stack.enter_context(each.tensor(self.key)) for each in self.models]
            dtypes = [as_torch.dtype_of(dtype) for dtype in self.dtypes]
            yield lambda first, count: [as_torch.to_tensor(read(first, count), dtype) for read, dtype in zip(reads, dtypes, strict=True)]


def match(models: Sequence[Opened]) -> list[Matched]:
    """Return every tensor of models of one shape, in the order of the family's rules. A tied head counts once."""
    first = models[0].at_rest
    return [Matched(own, key, tuple(models)) for key, own in first.own.items()]


Piece = Callable[[Matched, int, Sequence[torch.Tensor]], Value]  # a tensor, a piece's first entry, and the piece of each model


@dataclass(frozen=True)
class _Task:
    """Rows of a tensor for one thread."""

    tensor: Matched
    component: Component
    start: int
    count: int


def walk(
    tensors: Sequence[Matched],
    piece: Piece[Value],
    together: Callable[[Sequence[Value]], Value],
    num_threads: int,
    tick: Callable[[], None],
) -> Iterator[tuple[Matched, Component, Value]]:
    """Yield what `piece` makes of each tensor's parts, in order.

    together: puts values of pieces into one, in order; a thread calls it where it has read its rows, since what stays of a piece keeps the
    allocator from reusing what was around it. tick: called after each part.
    """
    tasks: list[_Task] = []
    for tensor in tensors:
        each = max(1, TASK_BYTES // tensor.row_bytes)
        for component, start, end in tensor.parts():
            tasks += [_Task(tensor, component, first, min(each, end - first)) for first in range(start, end, each)]
    with ThreadPoolExecutor(num_threads) as pool:
        values: list[Value] = []
        for index, (task, made) in enumerate(zip(tasks, pool.map(lambda task: together(_run(task, piece)), tasks), strict=True)):
            values.append(made)
            after = tasks[index + 1] if index + 1 < len(tasks) else None
            if after is None or (after.tensor, after.component) != (task.tensor, task.component):
                yield task.tensor, task.component, together(values)
                values = []
                tick()


def _run(task: _Task, piece: Piece[Value]) -> list[Value]:
    tensor = task.tensor
    with tensor.open() as read:
        spans = bits.spans(task.start, task.count, tensor.row_bytes)
        return [piece(tensor, first * tensor.row, read(first, count)) for first, count in spans]
