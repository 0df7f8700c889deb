"""A dense Gaussian update with the norm of another model's: the null beside which a model's representations have moved little or much.

It is made in place, in a gang's shards of the weights. The noise of a tensor is drawn whole, by the seed and the tensor's name, and each rank
takes its part, so that it is the same on any layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_prism.parallel.groups import Groups, gather

Shards = Mapping[str, Sequence[Any]]  # a rank's shards (Megatron-Core's ShardedTensor) by the tensor's name
PIECE = 1 << 24  # elements whose differences are held at a time


def copied(shards: Shards) -> dict[str, list[torch.Tensor]]:
    """Return a copy of the shards' weights on the host."""
    return {key: [shard.data.detach().to("cpu", copy=True) for shard in own] for key, own in shards.items()}


@torch.no_grad()
def apply(
    shards: Shards, before: Mapping[str, Sequence[torch.Tensor]], shapes: Mapping[str, Sequence[int]], seed: int, groups: Groups
) -> None:
    """Turn the shards, which hold the other model, into the first model (`before`) and noise of the update's norm, tensor by tensor.

    shapes: of each whole tensor, without a vocabulary's padding, which gets no noise. Every rank of the gang calls this.
    Memory: a whole tensor of noise beside the weights. The sum is rounded to the weights' own precision.
    """
    norms = update_norms(shards, before, groups)
    for key, own in shards.items():
        noise = torch.randn(tuple(shapes[key]), generator=torch.Generator().manual_seed(_seed(seed, key)))
        noise *= norms[key] / float(noise.norm(dtype=torch.float64))
        for shard, kept in zip(own, before[key], strict=True):
            first, *rest = (slice(at, at + size) for at, size in zip(shard.global_offset, shard.data.shape, strict=True))
            part = noise[(first, *rest)]
            shard.data.copy_(kept)
            shard.data[: len(part)] += part.to(shard.data.device)


def _seed(seed: int, key: str) -> int:
    """Return a tensor's own seed. torch's generator on the host takes the lowest 32 bits of a seed, and no others."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=4).digest(), "big")


def update_norms(shards: Shards, before: Mapping[str, Sequence[torch.Tensor]], groups: Groups) -> dict[str, float]:
    """Return the norm of what changed in each whole tensor of this rank's stage, from the parts of its tensor-parallel ranks."""
    own = {
        key: {tuple(shard.global_offset): _square(shard.data, kept) for shard, kept in zip(parts, before[key], strict=True)}
        for key, parts in shards.items()
    }
    by_rank = gather(own, groups.tp_group)  # a tensor that is not split has one offset on all ranks, and counts once
    joined = {key: {offset: square for rank in by_rank for offset, square in rank[key].items()} for key in own}
    return {key: sum(square for _, square in sorted(parts.items())) ** 0.5 for key, parts in joined.items()}


def _square(now: torch.Tensor, before: torch.Tensor) -> float:
    pieces = zip(now.reshape(-1).split(PIECE), before.reshape(-1).split(PIECE), strict=True)
    return sum(float((new_N.float().cpu() - old_N.float()).square().sum(dtype=torch.float64)) for new_N, old_N in pieces)
