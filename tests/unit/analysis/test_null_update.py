"""A random update of another model's norm: its norm, the same noise whatever the shards, and none in a vocabulary's padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prism.analysis import null_update
from megatron_prism.parallel.groups import Groups

SHAPES = {"word_embeddings": (10, 6), "norm": (6,)}
PADDED_ROWS = 12


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> Groups:
    """Return the grid of a process that is alone."""
    monkeypatch.setattr(null_update, "gather", lambda value, group: [value])
    groups: Any = SimpleNamespace(tp_group=None)
    return groups


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["word_embeddings"] = torch.nn.functional.pad(made["word_embeddings"], (0, 0, 0, PADDED_ROWS - 10))
    return made


def sharded(tensors: dict[str, torch.Tensor], num: int) -> dict[str, list[Any]]:
    """Return the shards of tensors: the embedding in `num` parts by rows, the norm whole."""
    rows = PADDED_ROWS // num
    parts = [
        SimpleNamespace(data=part.clone(), global_offset=(rows * index, 0))
        for index, part in enumerate(tensors["word_embeddings"].split(rows))
    ]
    return {"word_embeddings": parts, "norm": [SimpleNamespace(data=tensors["norm"].clone(), global_offset=(0,))]}


def updated(num: int, seed: int, groups: Groups) -> dict[str, torch.Tensor]:
    """Return what a model becomes by a random update of another one's norm."""
    shards, other = sharded(weights(1), num), sharded(weights(2), num)
    before = null_update.copied(shards)
    for key, own in shards.items():
        for shard, new in zip(own, other[key], strict=True):
            shard.data.copy_(new.data)
    null_update.apply(shards, before, SHAPES, seed, groups)
    return {key: torch.cat([shard.data for shard in own]) for key, own in shards.items()}


def test_the_update_has_the_others_norm_in_each_tensor_and_leaves_padding(one: Groups) -> None:
    first, other, made = weights(1), weights(2), updated(1, 0, one)
    for key in SHAPES:
        assert float((made[key] - first[key]).norm()) == pytest.approx(float((other[key] - first[key]).norm()), rel=1e-5)
        assert not torch.allclose(made[key], other[key])
    assert not bool(made["word_embeddings"][10:].any())


def test_it_is_the_same_on_any_layout_and_another_by_another_seed(one: Groups) -> None:
    whole, split = updated(1, 0, one), updated(4, 0, one)
    assert all(torch.allclose(whole[key], split[key], atol=1e-6) for key in SHAPES)
    assert not any(torch.allclose(value, whole[key], atol=1e-2) for key, value in updated(1, 1, one).items())
