"""A model at rest, read by rows: a Hugging Face folder, a checkpoint, or a run's newest checkpoint, without a model being built.

Tensors go by the names of the family's rules, whatever a folder spells them as, so those of one model are those of another. A checkpoint
gives them as the folder that its export would be, in the dtype that it stores them in, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_prism.checkpoint import folder, integrity
from megatron_prism.checkpoint.plan import Plan, plan_export, plan_import
from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.families import blocks, registry
from megatron_prism.families.rules import Rule
from megatron_prism.hf import bits, finite, recognise, safetensors
from megatron_prism.hf.dtypes import Dtype

if TYPE_CHECKING:
    import torch

    from megatron_prism.checkpoint.torch_dist import StoredTensor, TensorReader

Read = Callable[[int, int], bits.Bits]  # from (first row, number of rows) to their values' bits, flat, in the dtype that is stored
CONFIG = "config.json"
MASTER = "optimizer.state.param."  # before a tensor's key: the optimizer's main weight (optimizer_state.py)


@dataclass(frozen=True)
class Rows:
    """Rows [start, start + count) of a Hugging Face tensor, which are those from `top` of a checkpoint's tensor `key`."""

    start: int
    count: int
    key: str
    top: int


@dataclass(frozen=True)
class AtRest:
    """A model at rest, checked. path: as it was named. plan: with the names of its folder. assets: the folder of its config and tokenizer.

    own, shapes, dtypes: by the rules' names, its folder's name, and how the tensor is stored. rules: by Megatron-Core's names, with the
    rules' own. reader: of a checkpoint. rows: by the rules' names, where a checkpoint has each tensor's.
    """

    path: Path
    plan: Plan
    assets: Path
    own: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, Dtype]
    rules: Mapping[str, Rule]
    reader: TensorReader | None = None
    rows: Mapping[str, tuple[Rows, ...]] | None = None

    @property
    def model(self) -> ModelConfig:
        return self.plan.model

    @property
    def root(self) -> Path:
        return self.plan.root

    def sums(self, sum_file: Callable[[Path], str]) -> dict[str, str]:
        """Return the sums of the files that make the model, by path; of a checkpoint, of the sums that were checked when it was read."""
        if self.reader is not None:
            return {str(self.root / integrity.SUMS): sum_file(self.root / integrity.SUMS)}
        files = [self.root / CONFIG, *(self.root / shard.file for shard in self.plan.shards)]
        return {str(path): sum_file(path) for path in files}


def read(path: Path, *, check_sums: bool = True) -> AtRest:
    """Read and check a model's config and headers. Of a checkpoint, check its sums too, where the ranks of a gang do not share that.

    Raises: CheckpointError with every problem, as an import or an export has them.
    """
    try:
        is_checkpoint = (path / folder.META).is_file() or any(folder.newest(each) is not None for each in (path, path / "checkpoints"))
    except OSError as error:  # another user's folder, a name too long
        raise CheckpointError(Problem(str(path), error.strerror or str(error), "a model's folder that may be read")) from None
    if not path.is_dir():
        raise CheckpointError(recognise.no_folder(path, "a Hugging Face folder, a checkpoint or a run"))
    if not is_checkpoint:
        return read_hf(path)
    plan, reader = plan_export(path, check_sums=check_sums)
    rules, names, shapes = _ruled(plan)
    rows: dict[str, list[Rows]] = {}
    for rule in rules.values():
        top = 0
        for part, start, count in blocks.blocks(rule):
            rows.setdefault(rule.hf[part][0], []).append(Rows(start, count, rule.mcore, top))
            top += count
    of_tensors = {name: tuple(each) for name, each in rows.items()}
    return AtRest(path, plan, plan.root / folder.ASSETS, names, shapes, _dtypes(reader, of_tensors), rules, reader, of_tensors)


def read_hf(path: Path) -> AtRest:
    """Read and check a Hugging Face folder's config and headers. Raises: CheckpointError with every problem; a checkpoint is none."""
    plan = plan_import(path)
    rules, names, shapes = _ruled(plan)
    return AtRest(path, plan, plan.root, names, shapes, {name: plan.places[names[name]].dtype for name in shapes}, rules)


def _ruled(plan: Plan) -> tuple[dict[str, Rule], dict[str, str], dict[str, tuple[int, ...]]]:
    """Return the rules by Megatron-Core's names; and by the rules' names the folder's own, and the shapes."""
    rules = {rule.mcore: rule for rule in registry.rules(plan.model)}
    of_rules = zip(rules.values(), plan.rules, strict=True)
    pairs = [(ruled, spelled) for rule, own in of_rules for ruled, spelled in zip(rule.hf, own.hf, strict=True)]
    return rules, {ruled[0]: spelled[0] for ruled, spelled in pairs}, dict(ruled for ruled, _ in pairs)


def _dtypes(reader: TensorReader, rows: Mapping[str, Sequence[Rows]]) -> dict[str, Dtype]:
    """Return the dtype that a checkpoint stores each tensor in, by the rules' names."""
    from megatron_prism.hf import as_torch  # not above: a folder needs no torch, and takes longer to import it than to be read

    stored = reader.dtypes()
    return {name: as_torch.at_rest(stored[first.key]) for name, (first, *_) in rows.items()}


def masters(model: AtRest) -> AtRest | None:
    """Return a checkpoint of a run with the optimizer's fp32 main weights in place of the rounded ones. None: it holds none, or no other ones.

    A tensor that does not train has no main weight, and stays as it is stored.
    """
    if model.reader is None or model.rows is None:
        return None
    stored = model.reader.dtypes()
    has_more = {key for key in stored if MASTER + key in stored and stored[MASTER + key] != stored[key]}
    if not has_more:
        return None
    rows = {
        name: tuple(replace(each, key=MASTER + each.key) if each.key in has_more else each for each in of_tensor)
        for name, of_tensor in model.rows.items()
    }
    return replace(model, rows=rows, dtypes=_dtypes(model.reader, rows))


@dataclass(frozen=True)
class Opened:
    """A model at rest whose files are open. Several threads may read from it at once."""

    at_rest: AtRest
    files: Mapping[str, FileIO]

    @contextmanager
    def tensor(self, name: str) -> Iterator[Read]:
        """Open a tensor, by its rules' name, for reading by rows.

        The function raises CheckpointError where a value is NaN or inf.
        """
        width, where = prod(self.at_rest.shapes[name][1:]), self._where(name)
        if self.at_rest.reader is None or self.at_rest.rows is None:
            place = self.at_rest.plan.places[self.at_rest.own[name]]

            def of_folder(first: int, count: int) -> bits.Bits:
                piece = safetensors.read_values(self.files[place.file], place, first * width, count * width)
                return self._finite(piece, place.dtype, name, first, where)

            yield of_folder
            return
        rows = self.at_rest.rows[name]
        with ExitStack() as stack:
            stored = {key: stack.enter_context(self.at_rest.reader.open(key)) for key in {each.key for each in rows}}

            def of_checkpoint(first: int, count: int) -> bits.Bits:
                dtype = self.at_rest.dtypes[name]
                pieces = [self._finite(piece, dtype, name, start, where) for start, piece in _pieces(rows, stored, first, count)]
                return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

            yield of_checkpoint

    def mcore(self, key: str) -> torch.Tensor:
        """Return a whole tensor, by Megatron-Core's name, without a vocabulary's padding. Raises: CheckpointError where a value is NaN or inf."""
        from megatron_prism.hf import as_torch

        rule = self.at_rest.rules[key]
        with ExitStack() as stack:
            reads = [stack.enter_context(self.tensor(name)) for name, _ in rule.hf]
            values = [reads[part](start, count) for part, start, count in blocks.blocks(rule)]
        whole = values[0] if len(values) == 1 else np.concatenate(values)
        return as_torch.to_tensor(whole, as_torch.dtype_of(self.at_rest.dtypes[rule.hf[0][0]])).view(rule.shape)

    def _where(self, name: str) -> str:
        root, own = self.at_rest.root, self.at_rest.own[name]
        file = root if self.at_rest.reader is not None else root / self.at_rest.plan.places[own].file
        return f"{file}: {own}"

    def _finite(self, piece: bits.Bits, dtype: Dtype, name: str, first_row: int, where: str) -> bits.Bits:
        piece, shape = piece.reshape(-1), self.at_rest.shapes[name]
        if problem := finite.problem_in(piece, dtype, first_row * prod(shape[1:]), shape, where):
            raise CheckpointError(problem)
        return piece


def _pieces(rows: Sequence[Rows], stored: Mapping[str, StoredTensor], first: int, count: int) -> Iterator[tuple[int, bits.Bits]]:
    """Yield (first row, bits) of the pieces of a checkpoint that make rows [first, first + count)."""
    for each in rows:
        start, stop = max(first, each.start), min(first + count, each.start + each.count)
        if start < stop:
            yield start, stored[each.key].rows(each.top + start - each.start, stop - start)


@contextmanager
def opened(models: Sequence[AtRest]) -> Iterator[list[Opened]]:
    """Open the files of several models."""
    with ExitStack() as stack:
        yield [
            Opened(each, {} if each.reader is not None else stack.enter_context(safetensors.open_files(each.root, each.plan.shards)))
            for each in models
        ]
