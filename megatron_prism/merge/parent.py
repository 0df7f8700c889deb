"""A model that goes into a merge: a Hugging Face folder, or a checkpoint read as the folder that its export would be, without writing that.

Tensors go by the names of the family's rules, whatever a folder spells them as, so those of one parent are those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_prism.checkpoint import folder, integrity
from megatron_prism.checkpoint.plan import Plan, plan_export, plan_import
from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.families import blocks, names, registry
from megatron_prism.hf import bits, finite, safetensors
from megatron_prism.hf.files import read_object

if TYPE_CHECKING:
    from megatron_prism.checkpoint.torch_dist import StoredTensor, TensorReader

Read = Callable[[int, int], torch.Tensor]  # from (first row, number of rows) to their values, flat, in the dtype that is stored
CONFIG, PROVENANCE = "config.json", "merge.json"


@dataclass(frozen=True)
class Run:
    """Rows [start, start + rows) of a Hugging Face tensor, which are those from `top` of a checkpoint's tensor `key`."""

    start: int
    rows: int
    key: str
    top: int


@dataclass(frozen=True)
class Parent:
    """A parent, checked. path: as it was named. assets: the folder of its config and tokenizer. own: by the rules' names, its folder's.

    shapes: by the rules' names. embedding: the rules' name of it. reader: of a checkpoint. runs: by the rules' names, where a checkpoint has
    each tensor's rows.
    """

    path: Path
    plan: Plan
    assets: Path
    own: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    embedding: str
    reader: TensorReader | None = None
    runs: Mapping[str, tuple[Run, ...]] | None = None

    @property
    def model(self) -> ModelConfig:
        return self.plan.model

    @property
    def root(self) -> Path:
        return self.plan.root

    @property
    def provenance(self) -> Mapping[str, Any] | None:
        """What the parent says of its own parents, where it is a merge; a merge.json of another program says nothing."""
        path = self.assets / PROVENANCE
        if not path.is_file():
            return None
        try:
            facts = read_object(path, "a merge's provenance")
        except CheckpointError:
            return None
        return facts if facts.get("kind") == "merge" else None

    def of(self, name: str) -> str:
        """Return the rules' name of the parent's tensor that stands for a tensor: its embedding for a head that it does not have apart."""
        return self.embedding if name == names.HEAD and name not in self.own else name

    def sums(self, sum_file: Callable[[Path], str]) -> dict[str, str]:
        """Return the sums of the files that make the model, by path; of a checkpoint, of the sums that were checked when it was opened."""
        if self.reader is not None:
            return {str(self.root / integrity.SUMS): sum_file(self.root / integrity.SUMS)}
        files = [self.root / CONFIG, *(self.root / shard.file for shard in self.plan.shards)]
        return {str(path): sum_file(path) for path in files}


def open_parent(path: Path) -> Parent:
    """Read and check a parent's config and headers. Of a checkpoint, check its sums too.

    Raises: CheckpointError with every problem, as an import or an export has them.
    """
    try:
        is_checkpoint = (path / folder.META).is_file() or any(folder.newest(each) is not None for each in (path, path / "checkpoints"))
    except OSError as error:  # another user's folder, a name too long
        raise CheckpointError(Problem(str(path), error.strerror or str(error), "a model's folder that may be read")) from None
    plan, reader = plan_export(path) if is_checkpoint else (plan_import(path), None)
    rules = registry.rules(plan.model)
    pairs = [(ruled, spelled) for rule, own in zip(rules, plan.rules, strict=True) for ruled, spelled in zip(rule.hf, own.hf, strict=True)]
    own, shapes = {ruled[0]: spelled[0] for ruled, spelled in pairs}, dict(ruled for ruled, _ in pairs)
    embedding = next(rule.hf[0][0] for rule in rules if rule.mcore == names.EMBEDDING)
    if reader is None:
        return Parent(path, plan, plan.root, own, shapes, embedding)
    runs: dict[str, list[Run]] = {}
    for rule in rules:
        top = 0
        for part, start, rows in blocks.blocks(rule):
            runs.setdefault(rule.hf[part][0], []).append(Run(start, rows, rule.mcore, top))
            top += rows
    return Parent(path, plan, plan.root / folder.ASSETS, own, shapes, embedding, reader, {name: tuple(each) for name, each in runs.items()})


@dataclass(frozen=True)
class Source:
    """A parent whose files are open."""

    parent: Parent
    files: Mapping[str, FileIO]

    @contextmanager
    def tensor(self, name: str) -> Iterator[Read]:
        """Open a tensor, by its rules' name, for reading by rows.

        The function raises CheckpointError where a value is NaN or inf, naming one tensor of those that hold some: nonfinite names all.
        """
        name = self.parent.of(name)
        width = prod(self.parent.shapes[name][1:])
        if self.parent.reader is None or self.parent.runs is None:
            place = self.parent.plan.places[self.parent.own[name]]

            def of_folder(first: int, count: int) -> torch.Tensor:
                piece = safetensors.read_values(self.files[place.file], place, first * width, count * width)
                return self._finite(piece, place.dtype, name, first)

            yield of_folder
            return
        runs = self.parent.runs[name]
        with ExitStack() as stack:
            stored = {key: stack.enter_context(self.parent.reader.open(key)) for key in {run.key for run in runs}}

            def of_checkpoint(first: int, count: int) -> torch.Tensor:
                pieces = [self._finite(*piece, name, start) for start, piece in _rows(runs, stored, first, count)]
                return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

            yield of_checkpoint

    def _finite(self, piece: bits.Bits, dtype: torch.dtype, name: str, first_row: int) -> torch.Tensor:
        piece, shape, own = piece.reshape(-1), self.parent.shapes[name], self.parent.own[name]
        file = self.parent.root if self.parent.reader is not None else self.parent.root / self.parent.plan.places[own].file
        if problem := finite.problem_in(piece, dtype, first_row * prod(shape[1:]), shape, f"{file}: {own}"):
            raise CheckpointError(problem)
        return bits.to_tensor(piece, dtype)


def _rows(
    runs: tuple[Run, ...], stored: Mapping[str, StoredTensor], first: int, count: int
) -> Iterator[tuple[int, tuple[bits.Bits, torch.dtype]]]:
    """Yield (first row, (bits, dtype)) of the pieces of a checkpoint that make rows [first, first + count)."""
    for run in runs:
        start, stop = max(first, run.start), min(first + count, run.start + run.rows)
        if start < stop:
            tensor = stored[run.key]
            yield start, (tensor.rows(run.top + start - run.start, stop - start), tensor.dtype)


@contextmanager
def open_sources(parents: tuple[Parent, ...]) -> Iterator[list[Source]]:
    """Open the files of all parents."""
    with ExitStack() as stack:
        yield [
            Source(
                parent, {} if parent.reader is not None else stack.enter_context(safetensors.open_files(parent.root, parent.plan.shards))
            )
            for parent in parents
        ]


def nonfinite(sources: list[Source]) -> list[Problem]:
    """Return a problem for each tensor of each parent that holds a NaN or an inf. It reads all of them."""
    problems: list[Problem] = []
    for source in sources:
        for name, shape in source.parent.shapes.items():
            try:
                with source.tensor(name) as read:
                    for first, count in pieces(shape):
                        read(first, count)
            except CheckpointError as error:
                problems += error.problems
    return problems


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of the pieces in which a tensor is merged: some MB of fp32 at most, or a row."""
    return bits.spans(0, shape[0], prod(shape[1:]) * torch.float32.itemsize)
