"""A planned merge written as a Hugging Face folder: each tensor in pieces of some MB, summed in fp32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import FileIO
from math import prod
from pathlib import Path

import numpy as np

from megatron_prism.checkpoint import at_rest, folder
from megatron_prism.checkpoint.at_rest import CONFIG, Opened, Read
from megatron_prism.core import disk
from megatron_prism.core.errors import CheckpointError, Problem, raise_problems
from megatron_prism.core.manifest import sha256_file, write_json, xxh128_file
from megatron_prism.hf import layout, safetensors
from megatron_prism.hf.dtypes import F64, Dtype
from megatron_prism.hf.files import read_object
from megatron_prism.hf.finite import first_nonfinite
from megatron_prism.merge import card, methods, values
from megatron_prism.merge.parent import nonfinite, pieces, stands_for
from megatron_prism.merge.plan import Plan
from megatron_prism.merge.values import Values

Tick = Callable[[], None]  # called after each tensor, for a progress bar


def write(plan: Plan, tick: Tick = lambda: None) -> None:
    """Write a plan's folder. It appears when it is whole; on an error nothing stays behind.

    Raises: CheckpointError naming every tensor of a parent, or every merged tensor, with a NaN or an inf.
    """
    problems: list[Problem] = []
    with ExitStack() as stack:
        temporary = stack.enter_context(folder.create(plan.config.out))
        pool = ThreadPoolExecutor(1)
        stack.callback(pool.shutdown, cancel_futures=True)
        sum_file = sha256_file if plan.config.sums == "sha256" else xxh128_file
        sums = [pool.submit(parent.sums, sum_file) for parent in plan.parents]
        folder.copy_assets(plan.origin.assets, temporary)
        with at_rest.opened(plan.parents) as parents, safetensors.create_shards(temporary, plan.shards) as files:
            for name in plan.targets:
                try:
                    problems += _write_tensor(plan, parents, files, name)
                except CheckpointError as error:
                    raise CheckpointError(nonfinite(parents) or list(error.problems)) from None
                tick()
        raise_problems(problems)
        _write_config(plan, temporary)
        card.write(plan, temporary, [one.result() for one in sums])
        disk.sync(path for path in sorted(temporary.rglob("*")) if not path.is_symlink())
        disk.sync([temporary])


def _write_tensor(plan: Plan, parents: list[Opened], files: dict[str, FileIO], name: str) -> list[Problem]:
    """Merge one tensor, and return a problem where the merged one is not finite."""
    shape, places = plan.origin.shapes[name], plan.targets[name]
    width = prod(shape[1:])
    problems: list[Problem] = []
    with ExitStack() as stack:
        stack.enter_context(np.errstate(over="ignore", invalid="ignore"))  # what is not finite is looked for in what is written
        names = [stands_for(parent.at_rest, name) for parent in parents]
        reads = [(stack.enter_context(each.tensor(own)), each.at_rest.dtypes[own]) for each, own in zip(parents, names, strict=True)]
        combine = methods.combiner(plan.config, lambda: _values(reads, shape), prod(shape))
        for (first, _), parts_N in zip(pieces(shape), _values(reads, shape), strict=True):
            merged_N = combine(parts_N)
            for place in places:
                piece = values.rounded(merged_N, place.dtype)
                safetensors.write_values(files[place.file], place, first * width, piece)
                if not problems and first_nonfinite(piece, place.dtype) is not None:
                    found = f"a merged value beyond {place.dtype}"
                    required, fix = "finite weights", "smaller weights, or a wider --dtype"
                    problems.append(Problem(f"{plan.config.out / place.file}: {place.name}", found, required, fix))
    return problems


def _values(reads: list[tuple[Read, Dtype]], shape: tuple[int, ...]) -> Iterator[list[Values]]:
    """Yield a tensor's pieces of every parent in fp32; in fp64 where a parent is."""
    wide = np.float64 if any(dtype == F64 for _, dtype in reads) else np.float32
    for first, count in pieces(shape):
        yield [values.widened(read(first, count), dtype).astype(wide, copy=False) for read, dtype in reads]


def _write_config(plan: Plan, temporary: Path) -> None:
    """Write the index of several files, and the dtype into config.json where the merge has another one than its origin."""
    index = plan.origin.assets / safetensors.INDEX
    if index.is_file():
        write_json(temporary / safetensors.INDEX, layout.rewritten_index(read_object(index, "an index"), plan.shards))
    elif len(plan.shards) > 1:
        write_json(temporary / safetensors.INDEX, layout.index_of(plan.shards))
    if plan.config.dtype is not None:
        config = read_object(temporary / CONFIG, "a config")
        keys = [key for key in ("dtype", "torch_dtype") if key in config]
        write_json(temporary / CONFIG, {**config, **dict.fromkeys(keys, plan.config.dtype)})
