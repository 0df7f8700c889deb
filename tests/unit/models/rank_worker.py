"""Builds full-size models as one rank of a large world, without its memory: rank_worker.py FOLDER reads cases.json, writes ranks.json.

A case (models/shapes.py does the building):
{"name", "model", "parallel", "world_size", "ranks": those to be}. A result: what each of these ranks holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint import sharded
from megatron_prism.core.config import GangConfig, ModelConfig, ParallelConfig
from megatron_prism.core.load import build as read
from megatron_prism.models import build, shapes
from megatron_prism.parallel import host


def main(root: Path) -> None:
    host.install()
    found = {}
    for case in json.loads((root / "cases.json").read_text()):
        model, gang = read(case["model"], ModelConfig, str), GangConfig(parallel=ParallelConfig(**case["parallel"]))
        found[case["name"]] = [held(model, gang, case["world_size"], rank) for rank in case["ranks"]]
    (root / "ranks.json").write_text(json.dumps(found))


def held(model: ModelConfig, gang: GangConfig, world_size: int, rank: int) -> dict[str, Any]:
    """Return a rank's place (tp, pp, dp), its parameters, and its shards: (key, global shape, offset, shape, is the copy to be saved)."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica

    with shapes.world(gang, world_size, rank) as groups, shapes.shapes_only():
        chunks = build.build(model, groups, gang)
        state = sharded.weights(chunks)
        apply_factories(state)
        place = (groups.tp_rank, groups.pp_rank, groups.dp_rank)
    tensors = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    shards = [(part.key, part.global_shape, part.global_offset, part.local_shape, is_main_replica(part.replica_id)) for part in tensors]
    return {"place": place, "parameters": build.num_parameters(chunks), "shards": shards}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
