"""Flat ranges as boxes, and what they become beside Megatron's shards: each value once, at its place in the whole tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prism.checkpoint import optimizer_state

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
CUTS = """
import json, random
import torch
from megatron_prism.parallel import host
host.install()
from dataclasses import replace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.ssm.mamba_mixer import _split_tensor_factory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron_prism.checkpoint.optimizer_state import cut, pieces

def assemble(found, shards):
    for shard in shards:
        whole, count = found.setdefault(shard.key, (torch.zeros(shard.global_shape), torch.zeros(shard.global_shape)))
        whole[shard.global_slice()] += shard.data
        count[shard.global_slice()] += 1

def weight(kind, rank, tp, shape):
    data = torch.randn(shape)
    plain = ShardedTensor.from_rank_offsets("w", data, (0, rank, tp), replica_id=(0, 0, 3), allow_shape_mismatch=kind == "vocabulary")
    if kind == "gated":
        return apply_swiglu_sharded_factory(plain, ())
    if kind == "mamba":
        first = random.randrange(1, shape[0])
        return _split_tensor_factory(plain, [first, shape[0] - first], ["x", "B"], 0) if tp == 1 else plain
    return plain

random.seed(0)
wrong, fragments, replicas, kept = 0, set(), set(), True
for case in range(400):
    kind, tp = random.choice(["plain", "vocabulary", "gated", "mamba"]), random.choice([1, 2])
    shape = (2 * random.randint(1, 4), *(random.randint(1, 4) for _ in range(random.randint(0, 2))))
    expected, found = {}, {}
    for rank in range(tp):
        one = weight(kind, rank, tp, shape)
        assemble(expected, one.build() if isinstance(one, ShardedTensorFactory) else [one])
        flat = one.data.reshape(-1)
        ends = sorted({0, flat.numel(), *(random.randrange(flat.numel() + 1) for _ in range(3))})
        for start, end in zip(ends, ends[1:]):
            shards = list(cut(one, "o.", start, flat[start:end]))
            kept &= all(shard.data.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for shard in shards)
            kept &= all(shard.allow_shape_mismatch == (kind == "vocabulary") for shard in shards)
            fragments |= {shard.has_regular_grid for shard in shards}
            replicas |= {shard.replica_id for shard in shards}
            assemble(found, shards)
    same = found.keys() == {"o." + key for key in expected}
    wrong += not (same and all(torch.equal(a, b) for key in expected for a, b in zip(expected[key], found["o." + key])))

def columns(key, data, replica_id, flattened):
    return [ShardedTensor.from_rank_offsets(key, part, (1, index, 2)) for index, part in enumerate(data.chunk(2, dim=1))]

def copies(key, data, replica_id, flattened):
    return [ShardedTensor.from_rank_offsets(key, part.clone(), (0, index, 2)) for index, part in enumerate(data.chunk(2))]

refused = []
for build in (columns, copies):
    try:
        pieces(ShardedTensorFactory("w", torch.zeros(4, 4), build, torch.cat))
    except AssertionError as error:
        refused.append(str(error))
print(json.dumps({"wrong": wrong, "regular": list(fragments), "replicas": list(replicas), "kept": kept, "refused": refused}))
"""


@given(shape=SHAPES, data=st.data())
def test_boxes_cover_a_range_once_and_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size))
    flat = np.arange(size).reshape(shape)
    found = optimizer_state.boxes(start, end, shape)
    values = [flat[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))].reshape(-1) for box in found]
    assert [value[0] for value in values] == [box.start for box in found]
    assert np.concatenate([np.empty(0, int), *values]).tolist() == list(range(start, end))
    assert len(found) <= 2 * len(shape) - 1
    assert len({box.offset for box in found}) == len(found)  # a checkpoint finds a shard by its offset


def test_boxes_of_a_scalar() -> None:
    assert optimizer_state.boxes(0, 1, ()) == [optimizer_state.Box((), (), 0)]


@pytest.fixture(scope="module")
def cuts() -> dict[str, Any]:
    """Return what CUTS prints, from a process of its own: the host's stand-in for CUDA stays there."""
    done = subprocess.run([sys.executable, "-c", CUTS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ranges_become_shards_of_megatrons_tensors(cuts: dict[str, Any]) -> None:
    """400 weights over TP: plain, with a padded vocabulary, gate beside up, Mamba's parts; what ranges give is what Megatron's own shards give."""
    assert cuts["wrong"] == 0
    assert cuts["kept"]  # views, so that loading is in place; and the padding's flag
    assert cuts["regular"] == [False]
    assert cuts["replicas"] == [[0, 0, 0]]


def test_a_factory_that_does_not_cut_rows_is_refused(cuts: dict[str, Any]) -> None:
    assert cuts["refused"] == ["w: its pieces are not ranges of it"] * 2


class GroupSteps(torch.optim.SGD):
    """As Transformer Engine's FusedAdam: the steps taken stand in the group, from the first step on."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1


def parameters() -> list[torch.nn.Parameter]:
    found = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for parameter in found:
        parameter.grad = torch.ones(3)
    return found


@pytest.mark.parametrize("kind", [torch.optim.AdamW, GroupSteps])
def test_steps_are_read_and_set(kind: Any) -> None:
    adam = kind(parameters(), lr=0.1)
    assert optimizer_state.step_of(adam) == -1
    adam.step()
    adam.step()
    assert optimizer_state.step_of(adam) == 2
    optimizer_state.set_step(adam, 7)
    assert optimizer_state.step_of(adam) == 7
    adam.step()
    assert optimizer_state.step_of(adam) == 8  # and not 9: no counter is shared


def test_different_steps_are_refused() -> None:
    adam = torch.optim.AdamW(parameters(), lr=0.1)
    adam.step()
    next(iter(adam.state.values()))["step"] += 1
    with pytest.raises(AssertionError, match="different numbers of steps"):
        optimizer_state.step_of(adam)
