"""A checkpoint is read into the model's own tensors, those that are saved in pieces too: loading holds no weight a second time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_prism.checkpoint import folder, sharded
from megatron_prism.core.config import GangConfig, ParallelConfig
from megatron_prism.models import build
from megatron_prism.parallel.groups import Groups

Kept = dict[str, int]  # how many tensors are saved in pieces, and how many of those were read in place


def read(groups: Groups, checkpoint: str, layout: dict[str, Any], by_megatron: bool = False) -> tuple[Kept, str]:
    """Load; return what was kept in place, and a sum of all values."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    config = GangConfig(parallel=ParallelConfig(**layout), precision="fp32")
    chunks = build.build(folder.read(Path(checkpoint)).model, groups, config)
    pieced = [value.key for value in nested_values(sharded.weights(chunks)) if isinstance(value, ShardedTensorFactory)]
    with patch.object(sharded, "_merge_in_place", (lambda _: None) if by_megatron else sharded._merge_in_place):
        wanted = {
            chunk: {key: value for key, value in state.items() if "_extra_state" not in key}
            for chunk, state in sharded.weights(chunks).items()
        }
        loaded = sharded.load(wanted, Path(checkpoint))
    own = {parameter.data_ptr() for chunk in chunks for parameter in chunk.parameters()}
    values = {name: value for state in loaded.values() for name, value in state.items() if isinstance(value, torch.Tensor)}
    kept = sum(values[name].data_ptr() in own for name in pieced)
    total = torch.cat([values[name].flatten().double() * (index + 1) for index, name in enumerate(sorted(values))])
    return {"pieced": len(pieced), "kept": kept}, str((total * torch.arange(len(total)).cos()).sum().item())


@pytest.mark.parametrize("name", ["tiny", "nemotron"])
@pytest.mark.parametrize(("num_ranks", "layout"), [(1, {}), (2, {"tp": 2})], ids=["one", "tp2"])
def test_what_is_saved_in_pieces_is_read_in_place(
    run_distributed: Callable[..., list[Any]], request: pytest.FixtureRequest, name: str, num_ranks: int, layout: dict[str, Any]
) -> None:
    given = {"checkpoint": request.getfixturevalue(f"{name}_checkpoint"), "layout": layout, "parallel": layout}
    ours, theirs = run_distributed(read, num_ranks, **given), run_distributed(read, num_ranks, by_megatron=True, **given)
    for (kept, total), (control, wanted) in zip(ours, theirs, strict=True):
        assert total == wanted, "the values are those that Megatron-Core puts together"
        assert kept["kept"] == kept["pieced"] > 0 and control["kept"] == 0
