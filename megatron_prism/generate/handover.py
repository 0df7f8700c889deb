"""A gang's current weights under their Hugging Face names, one tensor after another, for an engine that has its own copy of the model.

The tensors are those that an export of this moment would hold, by the same rules. Every rank takes part and gets every tensor whole: the shards
of a tensor-parallel group are joined on the stage that holds them, then sent to the other pipeline stages. A rank holds the parts of one
Hugging Face tensor at a time. sum_of says of each what arrived: a tensor that is stale, or under another's name, is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import Problem
from megatron_prism.families import blocks, registry
from megatron_prism.families.rules import Rule
from megatron_prism.models.build import unwrap
from megatron_prism.parallel import groups as ranks
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element
Offset = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a Megatron-Core tensor lies: its stage, its whole shape with padding, and for each of its tensor-parallel ranks the shards' offsets.

    A tensor that is not split has one rank. The shards of a tensor have one shape.
    """

    stage: int
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[tuple[Offset, ...], ...]


def tensors(chunks: Sequence[Any], model: ModelConfig, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every Hugging Face tensor, whole and on this rank's device, in the order of the family's rules.

    Every rank calls this, with whole weights (train.optim.settled), and takes every tensor: a rank that stops lets the others wait.
    A tied head comes once, as the embedding. A tensor may share memory with a parameter, so the taker copies it and never writes to it.
    """
    shards = shards_of(chunks)
    places = _places(shards, groups)
    with torch.no_grad():
        yield from blocks.hf_tensors(registry.rules(model), lambda rule: _read(rule, shards, places[rule.mcore], groups))


def shards_of(chunks: Sequence[Any]) -> dict[str, list[Any]]:
    """Return this rank's shards by the checkpoint's names. They are views of the parameters."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    # keys name each layer, as in a checkpoint (checkpoint/sharded.py)
    state = {
        str(number): unwrap(chunk).sharded_state_dict(metadata={"non_homogeneous_layers": True}) for number, chunk in enumerate(chunks)
    }
    apply_factories(state)
    shards: dict[str, list[Any]] = {}
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            shards.setdefault(value.key, []).append(value)
    return shards


def _places(shards: Mapping[str, list[Any]], groups: Groups) -> dict[str, Place]:
    """Return where every tensor of the model lies. Of two stages with the same tensor (a tied embedding) it is the first."""
    mine = {
        key: (tuple(own[0].global_shape), tuple(own[0].data.shape), own[0].data.dtype, tuple(tuple(part.global_offset) for part in own))
        for key, own in shards.items()
    }
    by_rank = ranks.gather(mine, groups.tp_group)
    stage: dict[str, Place] = {}
    for key, (shape, local_shape, dtype, offsets) in mine.items():
        offsets_of = tuple(part[key][3] for part in by_rank)
        is_split = any(other != offsets for other in offsets_of)
        stage[key] = Place(groups.pp_rank, shape, local_shape, dtype, offsets_of if is_split else (offsets,))
    places: dict[str, Place] = {}
    for part in ranks.gather(stage, groups.pp_group):
        places = part | places
    return places


def _read(rule: Rule, shards: Mapping[str, list[Any]], place: Place, groups: Groups) -> Tensor:
    """Return a rule's Megatron-Core tensor, whole and without a vocabulary's padding."""
    whole = _joined(shards[rule.mcore], place, groups) if groups.pp_rank == place.stage else None
    if groups.pp > 1:
        whole = torch.empty(place.shape, dtype=place.dtype, device=host.device()) if whole is None else whole.contiguous()
        dist.broadcast(whole, group_src=place.stage, group=groups.pp_group)
    assert whole is not None
    return whole[: rule.shape[0]]


def _joined(own: Sequence[Any], place: Place, groups: Groups) -> Tensor:
    if len(place.offsets) == 1 and len(own) == 1:
        return own[0].data.detach()
    whole = torch.empty(place.shape, dtype=place.dtype, device=host.device())
    for number, shard in enumerate(own):
        mine = shard.data.detach().contiguous()
        parts = [mine]
        if len(place.offsets) > 1:
            parts = [torch.empty_like(mine) for _ in place.offsets]
            dist.all_gather(parts, mine, group=groups.tp_group)
        for part, offsets in zip(parts, place.offsets, strict=True):
            whole[tuple(slice(at, at + size) for at, size in zip(offsets[number], place.local_shape, strict=True))] = part
    return whole


def sum_of(tensor: Tensor) -> int:
    """Return the sum of a tensor's bit patterns, as integers: exact, the same in any order, and additive over shards. Padding adds 0."""
    return int(tensor.detach().contiguous().view(BITS[tensor.element_size()]).sum(dtype=torch.int64))


def summed(named: Iterable[tuple[str, Tensor]], sums: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Yield what comes, and put each tensor's sum into `sums`."""
    for name, tensor in named:
        sums[name] = sum_of(tensor)
        yield name, tensor


def check(handed: Mapping[str, int], received: Mapping[str, int]) -> list[Problem]:
    """Return a problem for each tensor that one side lacks, or whose sums differ."""
    wrong = []
    for name in dict.fromkeys([*handed, *received]):
        if name not in received:
            wrong.append(Problem(name, "handed over, and not received", "the trainer's tensor on the engine's side"))
        elif name not in handed:
            wrong.append(Problem(name, "received, and not handed over", "no tensor but the trainer's"))
        elif handed[name] != received[name]:
            wrong.append(Problem(name, f"bits that sum to {received[name]}", f"{handed[name]}, as the trainer's tensor"))
    return wrong
