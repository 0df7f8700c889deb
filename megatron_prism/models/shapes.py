"""Build a model as any rank of any world would, in one process and without memory: torch's fake process group and fake tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.core.config import GangConfig, ModelConfig, ParallelConfig
from megatron_prism.core.patch import replaced
from megatron_prism.models import build
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups, grid

States = Callable[[Sequence[Any]], Mapping[str, Mapping[str, Any]]]


def sizes(model: ModelConfig, gang: GangConfig, tp_rank: int, pp_rank: int, states: States) -> dict[str, int]:
    """Return the sizes of a rank's parameters by checkpoint name, from a model built as in a training run.

    states: the chunks' sharded state, in order (checkpoint/sharded.weights). Only it has a layer's number in the whole model.
    The last stage's copy of a tied embedding has the embedding's name.
    """
    parallel = gang.parallel
    rank = tp_rank + pp_rank * parallel.tp * parallel.cp  # order tp-cp-dp-pp, in a world with one data-parallel replica
    with world(gang, parallel.tp * parallel.cp * parallel.pp, rank) as groups, shapes_only():
        return sizes_of(chunks := build.build(model, groups, gang), states(chunks))


def sizes_of(chunks: Sequence[Any], states: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return the sizes of the parameters of a rank's chunks by checkpoint name, with their sharded states."""
    by_name: dict[str, int] = {}
    for chunk, state in zip(map(build.unwrap, chunks), states.values(), strict=True):
        for name, parameter in chunk.named_parameters():
            assert state[name].key not in by_name, f"{state[name].key} twice on one rank"
            by_name[state[name].key] = parameter.numel()
    return by_name


def split(whole: Mapping[str, int], model: ModelConfig, parallel: ParallelConfig) -> list[dict[str, int]]:
    """Split a rank's parameters without a pipeline into those of each pipeline rank. The result equals that of `sizes`, without building."""
    of_layer = {layer: stage for stage, layers in enumerate(build.stages(model, parallel)) for layer in layers}
    by_stage: list[dict[str, int]] = [{} for _ in range(parallel.pp)]
    for name, size in whole.items():
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if layer:
            by_stage[of_layer[int(layer[1])]][name] = size
        elif name.startswith("embedding."):
            by_stage[0][name] = size
            if model.tie_word_embeddings:
                by_stage[-1][name] = size
        else:
            by_stage[-1][name] = size
    return by_stage


@contextmanager
def world(gang: GangConfig, world_size: int, rank: int) -> Iterator[Groups]:
    """Build the grid of a world in which this process is one rank, and no other rank exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    host.install()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with grid(gang) as groups:
            yield groups
    finally:
        dist.destroy_process_group()


@contextmanager
def shapes_only() -> Iterator[None]:
    """Create tensors without storage, and skip what needs storage: random states, and moving a module to its device and dtype."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from torch._subclasses.fake_tensor import FakeTensorMode

    no_fork, no_move = lambda self, *name: nullcontext(), lambda self, *function: self
    with replaced(CudaRNGStatesTracker, "fork", no_fork), replaced(torch.nn.Module, "_apply", no_move), FakeTensorMode():
        yield
