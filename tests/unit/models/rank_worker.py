"""Builds full-size models as one rank of a large world, without its memory: rank_worker.py FOLDER reads cases.json, writes ranks.json.

torch's "fake" process group lets one process be any rank of any world; its FakeTensorMode gives tensors shapes and no storage. A case:
{"name", "model", "parallel", "world_size", "ranks": those to be}. A result: what each of these ranks holds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_prism.checkpoint import sharded
from megatron_prism.core.config import ModelConfig, ParallelConfig
from megatron_prism.core.load import build as read
from megatron_prism.models import build
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups, grid


def main(root: Path) -> None:
    host.install()
    found = {}
    for case in json.loads((root / "cases.json").read_text()):
        model, parallel = read(case["model"], ModelConfig, str), ParallelConfig(**case["parallel"])
        found[case["name"]] = [held(model, parallel, case["world_size"], rank) for rank in case["ranks"]]
    (root / "ranks.json").write_text(json.dumps(found))


def held(model: ModelConfig, parallel: ParallelConfig, world_size: int, rank: int) -> dict[str, Any]:
    """Return a rank's place (tp, pp, dp), its parameters, and its shards: (key, global shape, offset, shape, is the copy to be saved)."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica

    with world(parallel, world_size, rank) as groups, shapes_only():
        chunks = build.build(model, groups, parallel, "bf16")
        state = sharded.weights(chunks)
        apply_factories(state)
        place = (groups.tp_rank, groups.pp_rank, groups.dp_rank)
    tensors = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    shards = [(part.key, part.global_shape, part.global_offset, part.local_shape, is_main_replica(part.replica_id)) for part in tensors]
    return {"place": place, "parameters": build.num_parameters(chunks), "shards": shards}


@contextmanager
def world(parallel: ParallelConfig, world_size: int, rank: int) -> Iterator[Groups]:
    """Lay the grid of a world of which this process is one rank, and no other is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with grid(parallel, seed=0) as groups:
            yield groups
    finally:
        dist.destroy_process_group()


@contextmanager
def shapes_only() -> Iterator[None]:
    """Let tensors be made without storage, and leave out what needs it: random states, and moving a module to its device and dtype."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from torch._subclasses.fake_tensor import FakeTensorMode

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(CudaRNGStatesTracker, "fork", lambda self, *name: nullcontext()))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", lambda self, *function: self))
        stack.enter_context(FakeTensorMode())
        yield


if __name__ == "__main__":
    main(Path(sys.argv[1]))
