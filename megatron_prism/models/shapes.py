"""A model as any rank of any world would build it, in one process and without its memory: torch's fake process group and tensors."""

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
    """Return the parameters that a rank holds, by name as in a checkpoint, built as a training run would build them.

    states: the chunks' sharded state, in order (checkpoint/sharded.weights): it alone knows a layer's number in the whole model.
    A tied embedding that the last stage holds too has the embedding's name there.
    """
    parallel = gang.parallel
    rank = tp_rank + pp_rank * parallel.tp * parallel.cp  # order tp-cp-dp-pp, of a world with one data-parallel replica
    with world(gang, parallel.tp * parallel.cp * parallel.pp, rank) as groups, shapes_only():
        chunks = build.build(model, groups, gang)
        found: dict[str, int] = {}
        for chunk, state in zip(map(build.unwrap, chunks), states(chunks).values(), strict=True):
            for name, parameter in chunk.named_parameters():
                assert state[name].key not in found, f"{state[name].key} twice on one rank"
                found[state[name].key] = parameter.numel()
    return found


def split(whole: Mapping[str, int], model: ModelConfig, parallel: ParallelConfig) -> list[dict[str, int]]:
    """Cut the parameters that a rank holds without a pipeline into those that each pipeline rank holds: as `sizes` finds them, without building."""
    of_layer = {layer: stage for stage, layers in enumerate(build.stages(model, parallel)) for layer in layers}
    found: list[dict[str, int]] = [{} for _ in range(parallel.pp)]
    for name, size in whole.items():
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if layer:
            found[of_layer[int(layer[1])]][name] = size
        elif name.startswith("embedding."):
            found[0][name] = size
            if model.tie_word_embeddings:
                found[-1][name] = size
        else:
            found[-1][name] = size
    return found


@contextmanager
def world(gang: GangConfig, world_size: int, rank: int) -> Iterator[Groups]:
    """Lay the grid of a world of which this process is one rank, and no other is there."""
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
    """Let tensors be made without storage, and leave out what needs it: random states, and moving a module to its device and dtype."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from torch._subclasses.fake_tensor import FakeTensorMode

    no_fork, no_move = lambda self, *name: nullcontext(), lambda self, *function: self
    with replaced(CudaRNGStatesTracker, "fork", no_fork), replaced(torch.nn.Module, "_apply", no_move), FakeTensorMode():
        yield
