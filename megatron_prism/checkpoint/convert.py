"""Hugging Face folder to Megatron checkpoint and back: one plan, applied in either direction, a piece of a tensor at a time.

The checkpoint keeps the folder's other files and its safetensors headers as they stand, so an export has the same
files with the same tensors, order and dtypes; without training in between, the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import FileIO
from math import prod
from pathlib import Path

from megatron_prism.checkpoint import folder, integrity, torch_dist
from megatron_prism.checkpoint.plan import Plan
from megatron_prism.core import disk
from megatron_prism.core.errors import CheckpointError, Problem
from megatron_prism.core.manifest import describe, sha256_file, sha256_files, write_json
from megatron_prism.families import blocks
from megatron_prism.families.rules import Rule
from megatron_prism.hf import as_torch, bits, layout, safetensors
from megatron_prism.hf.files import read_object
from megatron_prism.hf.finite import first_nonfinite, problem_in

Tick = Callable[[], None]  # called after each tensor, for a progress bar


def import_hf(plan: Plan, out: Path, tick: Tick = lambda: None) -> None:
    """Write a plan's folder as a Megatron checkpoint. Memory holds a piece of a tensor at a time.

    Raises: InputError where `out` exists; CheckpointError naming every tensor with a value that is not finite.
    Nothing stays behind on an error.
    """
    rules = {rule.mcore: rule for rule in plan.rules}
    specs = {
        key: torch_dist.TensorSpec(key, rule.shape, as_torch.dtype_of(plan.places[rule.hf[0][0]].dtype)) for key, rule in rules.items()
    }
    with ExitStack() as stack:
        temporary = stack.enter_context(folder.create(out))
        pool = ThreadPoolExecutor(1)
        stack.callback(pool.shutdown, cancel_futures=True)
        digests = {plan.root / shard.file: pool.submit(sha256_file, plan.root / shard.file) for shard in plan.shards}
        files = stack.enter_context(safetensors.open_files(plan.root, plan.shards))

        def values(key: str) -> Iterator[bits.Bits]:
            tick()
            for part, start, rows in blocks.blocks(rules[key]):
                place = plan.places[rules[key].hf[part][0]]
                for piece in _finite_rows(plan, files, place, start, rows):
                    yield as_torch.convert(piece, as_torch.dtype_of(place.dtype), specs[key].dtype)

        (temporary / folder.STATE).mkdir()
        torch_dist.write_tensors(temporary / folder.STATE, list(specs.values()), values)
        assets = folder.copy_assets(plan.root, temporary / folder.ASSETS)
        _write_index(plan, temporary / folder.ASSETS)
        write_json(temporary / folder.SHARDS, [{"file": shard.file, "header": shard.header} for shard in plan.kept])
        manifest = describe("import", sha256_files(assets), source=str(plan.root), **plan.summary())
        manifest["inputs"] |= {str(path): digest.result() for path, digest in digests.items()}
        folder.write_meta(temporary, folder.describe(plan.model, 0, 0, dtype=plan.summary()["dtypes"][0], manifest=manifest))
        integrity.seal(temporary)


def _write_index(plan: Plan, assets: Path) -> None:
    """Keep a folder's index: as it stands, or for the files that are kept of it."""
    source = plan.root / safetensors.INDEX
    if not source.is_file():
        return
    if [shard.header for shard in plan.kept] == [shard.header for shard in plan.shards]:
        disk.copy(source, assets / safetensors.INDEX)
    else:
        write_json(assets / safetensors.INDEX, layout.rewritten_index(read_object(source, "an index"), plan.kept))


def _finite_rows(plan: Plan, files: Mapping[str, FileIO], place: safetensors.TensorPlace, start: int, rows: int) -> Iterator[bits.Bits]:
    """Yield the values of rows [start, start + rows) of a Hugging Face tensor, in pieces."""
    width = prod(place.shape[1:])
    for first, number in bits.spans(start * width, rows * width, place.dtype.itemsize):
        piece = safetensors.read_values(files[place.file], place, first, number)
        if first_nonfinite(piece, place.dtype) is not None:
            raise CheckpointError(_nonfinite(plan, files))
        yield piece


def _nonfinite(plan: Plan, files: Mapping[str, FileIO]) -> list[Problem]:
    """Return a problem for each tensor of a folder that holds a NaN or an inf."""
    problems = []
    for place in plan.places.values():
        for first, number in bits.spans(0, prod(place.shape), place.dtype.itemsize):
            piece = safetensors.read_values(files[place.file], place, first, number)
            if problem := problem_in(piece, place.dtype, first, place.shape, f"{plan.root / place.file}: {place.name}"):
                problems.append(problem)
                break
    return problems


def export_hf(plan: Plan, reader: torch_dist.TensorReader, out: Path, tick: Tick = lambda: None) -> None:
    """Write a plan's checkpoint as a Hugging Face folder. Memory holds a piece of a tensor at a time.

    Raises: InputError where `out` exists; nothing stays behind on an error.
    """
    with folder.create(out) as temporary:
        disk.copy_tree(plan.root / folder.ASSETS, temporary)
        with safetensors.create_shards(temporary, plan.kept) as files:
            for rule in plan.rules:
                _export_rule(plan, reader, files, rule)
                tick()
        if len(plan.kept) > 1 and not (temporary / safetensors.INDEX).is_file():
            write_json(temporary / safetensors.INDEX, layout.index_of(plan.kept))


def _export_rule(plan: Plan, reader: torch_dist.TensorReader, files: Mapping[str, FileIO], rule: Rule) -> None:
    top = 0  # the block's first row in the Megatron-Core tensor
    with reader.open(rule.mcore) as stored:
        for part, start, rows in blocks.blocks(rule):
            name = rule.hf[part][0]
            places = [plan.places[name], *(plan.places[copy] for copy, original in plan.copies.items() if original == name)]
            width = prod(places[0].shape[1:])
            for first, number in bits.spans(0, rows, width * stored.dtype.itemsize):
                values = stored.rows(top + first, number)
                for place in places:
                    piece = as_torch.convert(values, stored.dtype, as_torch.dtype_of(place.dtype))
                    safetensors.write_values(files[place.file], place, (start + first) * width, piece)
            top += rows
