"""Fingerprints of a gang's tensors: of the whole tensors, whatever the layout, and nothing is gathered but a line a tensor.

A digest is a sum, modulo 2^64, over a tensor's elements: each element's place in the whole tensor and its bits are mixed into 64 bits. A sum does
not depend on how the ranks divide the elements, so every layout gives the same digest of the same bits. One changed element always changes it:
the mixing is invertible. It finds faults, and is no defence against one who makes a collision on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prism.checkpoint import optimizer_state, sharded
from megatron_prism.core.config import ModelConfig
from megatron_prism.families import registry
from megatron_prism.parallel import groups

HOST_PIECE, DEVICE_PIECE = 1 << 16, 1 << 24  # elements: what a host's cache holds a few int64 copies of; kernels of some length on a device
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
STATE = "optimizer.state."  # of the optimizer's keys, before its value's name and the weight's key


@dataclass(frozen=True)
class Fingerprint:
    """A whole tensor in a line: equal bits have equal digests. sum and squares (the sum of squares) are fp64, and differ by rounding."""

    shape: tuple[int, ...]
    dtype: str
    digest: str
    sum: float
    squares: float

    @property
    def norm(self) -> float:
        """Return the Euclidean norm."""
        return self.squares**0.5


Fingerprints = Mapping[str, Fingerprint]  # by the tensor's key in a checkpoint


def of_weights(chunks: Sequence[Any], model: ModelConfig) -> dict[str, Fingerprint]:
    """Return the fingerprints of the weights. Every rank of the gang calls this, and gets those of all."""
    held = (weight for weight in _weights(chunks).values() if _is_first_replica(weight.replica_id))
    return of_shards((shard for weight in held for shard in optimizer_state.cut(weight, "", 0, weight.data.detach().view(-1))), model)


def of_gradients(chunks: Sequence[Any], optimizer: Any, model: ModelConfig) -> dict[str, Fingerprint]:
    """Return the fingerprints of the reduced gradients, between step.forward_backward and optim.apply. Every rank calls this."""
    return of_shards(_gradients(chunks, optimizer), model)


def of_optimizer(chunks: Sequence[Any], optimizer: Any, model: ModelConfig) -> dict[str, Fingerprint]:
    """Return the fingerprints of the distributed optimizer's state: fp32 weights and moments. Of another optimizer: none."""
    if not chunks[0].ddp_config.use_distributed_optimizer:
        return {}
    state = optimizer_state.sharded(optimizer, chunks, sharded.weights(chunks), is_loading=False)
    return of_shards(state["shards"].values(), model)


def of_shards(shards: Iterable[Any], model: ModelConfig) -> dict[str, Fingerprint]:
    """Return the fingerprints of what every rank's shards (Megatron's ShardedTensor) make up together. A replica's is passed over.

    The vocabulary's padding is left out: it depends on tp.
    """
    rows = {rule.mcore: rule.shape[0] for rule in registry.rules(model)}
    mine: dict[str, list[Any]] = {}
    for shard in shards:
        if not _is_first_replica(shard.replica_id):
            continue
        plain = shard.key.removeprefix(STATE).partition(".")[2] if shard.key.startswith(STATE) else shard.key
        count, whole = rows.get(plain, shard.global_shape[0]), tuple(shard.global_shape[1:])
        figures = mine.setdefault(shard.key, [(count, *whole), str(shard.data.dtype).removeprefix("torch."), 0, 0.0, 0.0])
        first = shard.global_offset[0]
        digest, total, squares = _measure(shard.data[: max(count - first, 0)], shard.global_shape, shard.global_offset)
        figures[2:] = [figures[2] + digest, figures[3] + total, figures[4] + squares]
    everyones: dict[str, list[Any]] = {}
    for part in groups.gather(mine):
        for key, (shape, dtype, *sums) in part.items():
            before = everyones.get(key, [shape, dtype, 0, 0.0, 0.0])
            everyones[key] = [shape, dtype, *(one + other for one, other in zip(before[2:], sums, strict=True))]
    return {
        key: Fingerprint(tuple(shape), dtype, f"{digest % 2**64:016x}", total, squares)
        for key, (shape, dtype, digest, total, squares) in everyones.items()
    }


@torch.no_grad()
def _measure(values: torch.Tensor, whole: Sequence[int], offset: Sequence[int]) -> tuple[int, float, float]:
    """Return the digest, the sum and the sum of squares of a box of a tensor at its offset in the whole one."""
    strides = [1]
    for size in reversed(whole[1:]):
        strides.insert(0, strides[0] * size)
    within = torch.zeros((), dtype=torch.int64, device=values.device)
    for size, start, stride in zip(values.shape[1:], offset[1:], strides[1:], strict=True):
        within = within[..., None] + torch.arange(start, start + size, device=values.device) * stride
    digest = torch.zeros((), dtype=torch.int64, device=values.device)
    sums_2 = torch.zeros(2, dtype=torch.float64, device=values.device)
    step = max(1, (DEVICE_PIECE if values.is_cuda else HOST_PIECE) // max(1, within.numel()))
    for first in range(0, len(values), step):
        part = values[first : first + step].contiguous()
        rows = torch.arange(offset[0] + first, offset[0] + first + len(part), device=values.device) * strides[0]
        places = (rows[:, None] + within.reshape(-1)).view(-1)
        digest += _mixed(places, part.view(SIGNED[part.dtype.itemsize]).view(-1).to(torch.int64, copy=True)).sum()
        exact = part.double().view(-1)
        sums_2 += torch.stack([exact.sum(), exact.dot(exact)])
    total, squares = sums_2.tolist()
    return int(digest), total, squares


def _mixed(places: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Return 64 bits of each element (SplitMix64's finalizer), in the memory of both. int64 wraps modulo 2^64, on every device."""
    mixed = places.mul_(-0x61C8864680B583EB).add_(bits.mul_(-0x3B314601E57A13AD))
    mixed.bitwise_xor_(_shifted(mixed, 30, bits)).mul_(-0x40A7B892E31B1A47)
    mixed.bitwise_xor_(_shifted(mixed, 27, bits)).mul_(-0x6B2FB644ECCEEE15)
    return mixed.bitwise_xor_(_shifted(mixed, 31, bits))


def _shifted(values: torch.Tensor, count: int, into: torch.Tensor) -> torch.Tensor:
    """Return values shifted right, with zeros coming in."""
    return torch.bitwise_right_shift(values, count, out=into).bitwise_and_((1 << (64 - count)) - 1)


def _weights(chunks: Sequence[Any]) -> dict[int, Any]:
    """Return this rank's weights as Megatron's shards, or factories of shards, by the identity of their tensor."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    entries = nested_values(sharded.weights(chunks))
    kinds = (ShardedTensor, ShardedTensorFactory)
    return {id(entry.data): entry for entry in entries if isinstance(entry, kinds) and not isinstance(entry, ShardedObject)}


def _gradients(chunks: Sequence[Any], optimizer: Any) -> Iterator[Any]:
    """Yield the shards of this rank's part of the gradients. Under the distributed optimizer a rank has a range of each parameter's."""
    weights = _weights(chunks)
    if not chunks[0].ddp_config.use_distributed_optimizer:
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            weight = weights.get(id(parameter))
            if weight is not None and parameter.requires_grad and _is_first_replica(weight.replica_id):
                yield from optimizer_state.cut(weight, "", 0, parameter.main_grad.view(-1))
        return
    for part in optimizer_state.parts(optimizer):
        for parameter in part.model_param_gbuf_map:
            span = part._get_model_param_range_map(parameter)["param"]
            if id(parameter) in weights:
                values = parameter.main_grad.view(-1)[span.start : span.end]
                yield from optimizer_state.cut(weights[id(parameter)], "", span.start, values)


def _is_first_replica(replica_id: Any) -> bool:
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    return bool(is_main_replica(replica_id))
