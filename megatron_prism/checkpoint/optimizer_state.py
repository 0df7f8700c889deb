"""The distributed optimizer's state in a checkpoint: laid out like the weights, cut as the ranks hold it, never gathered.

A data-parallel rank holds a contiguous, row-major range of each weight's local tensor, as flat tensors: the main weight in fp32, and AdamW's
moments in fp32 or bf16 (optimizer.moments). The range is a few boxes of that tensor, and each box is a shard at its place in the whole tensor. So every rank writes what it
holds and reads its part in place, whatever TP, PP and DP wrote the checkpoint. Megatron-Core's own formats gather the state on one rank
(fully_reshardable) or tie it to TP (dp_reshardable). The names are those of fully_reshardable:
optimizer.state.{param, exp_avg, exp_avg_sq}.{the weight's key}.

All weights have taken the same number of steps, which is saved once. Learning rate and weight decay are set at every step (train/optim.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.parallel import host


@dataclass(frozen=True)
class Box:
    """A box of a tensor: where it lies, how large it is, and where its values begin in row-major order."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int


def boxes(start: int, end: int, shape: Sequence[int]) -> list[Box]:
    """Cut the values [start, end) of a row-major tensor into boxes, in order: at most 2 x dimensions - 1 of them.

    They are the end of a first row, whole rows, and the beginning of a last row. A part of a row is cut in the same way.
    """
    if start >= end:
        return []
    if len(shape) < 2:
        return [Box((start,) * len(shape), (end - start,) * len(shape), start)]
    row = prod(shape[1:])
    first, last = -(-start // row), end // row  # the whole rows
    if first > last:  # all within one row
        return _boxes_of_row(last, start, end, shape)
    whole = [Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]), first * row)] if first < last else []
    return [*_boxes_of_row(first - 1, start, first * row, shape), *whole, *_boxes_of_row(last, last * row, end, shape)]


def _boxes_of_row(index: int, start: int, end: int, shape: Sequence[int]) -> list[Box]:
    before = index * prod(shape[1:])
    parts = boxes(start - before, end - before, shape[1:])
    return [Box((index, *part.offset), (1, *part.size), before + part.start) for part in parts]


def sharded(optimizer: Any, chunks: Sequence[Any], weights_by_chunk: Mapping[str, Any], is_loading: bool) -> dict[str, Any]:
    """Return the optimizer's part of a sharded state dict. To load, the checkpoint is read into these tensors in place.

    `weights_by_chunk` is the chunks' own sharded state. A fresh optimizer gets its state here. Every rank calls this.
    Without the distributed optimizer it is Megatron-Core's own.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    if not chunks[0].ddp_config.use_distributed_optimizer:
        return optimizer.sharded_state_dict(dict(weights_by_chunk), is_loading=is_loading, metadata={})
    weights = {id(weight.data): weight for weight in nested_values(dict(weights_by_chunk)) if isinstance(weight, ShardedBase)}
    shards: dict[str, Any] = {}
    for part in parts(optimizer):
        if not part.optimizer.state:
            _allocate(part)
        for parameter in part.model_param_gbuf_map:  # those of which this rank holds a range
            start = part._get_model_param_range_map(parameter)["param"].start
            for name, values in _held(part, parameter).items():
                boxed = cut(weights[id(parameter)], f"optimizer.state.{name}.", start, values.detach().view(-1))
                shards |= {f"{shard.key} {shard.global_offset}": shard for shard in boxed}
    return {"step": _steps(optimizer), "shards": shards}


def _held(part: Any, parameter: Any) -> dict[str, torch.Tensor]:
    """Return the main weight and the moments of this rank's range of a parameter: the very tensors that the next step reads.

    Megatron-Core's _get_main_param_and_optimizer_states gives copies in fp32 of moments in bf16, and what is loaded into those is lost.
    """
    group, order = part.model_param_group_index_map[parameter]
    weight = part.optimizer.param_groups[group]["params"][order]
    states = {name: values for name, values in part.optimizer.state[weight].items() if name != "step"}
    main = states.pop("master_param", weight)
    assert main.dtype == torch.float32, f"a main weight in {main.dtype}"
    return {"param": main, **states}


def restore(optimizer: Any, loaded: Mapping[str, Any]) -> None:
    """Set the number of steps from what was loaded. The tensors of `sharded` hold their values already."""
    if "step" not in loaded:  # Megatron-Core's own
        optimizer.load_state_dict(loaded)
        return
    for adam in _adams(optimizer):
        set_step(adam, loaded["step"])


def step_of(adam: torch.optim.Optimizer) -> int:
    """Return the steps taken: torch's AdamW counts them by parameter, Transformer Engine's FusedAdam by group. -1 where it holds none."""
    by_parameter = {int(state["step"]) for state in adam.state.values() if "step" in state}
    by_group = {int(group["step"]) for group in adam.param_groups if group["params"] and "step" in group}
    steps = by_parameter | by_group
    assert len(steps) < 2, f"the parameters have taken different numbers of steps: {sorted(steps)}"
    return max(steps, default=-1)


def set_step(adam: torch.optim.Optimizer, step: int) -> None:
    """Set the steps taken. torch counts up in place, so each parameter gets a tensor of its own."""
    for state in adam.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], step)
    for group in adam.param_groups:
        if "step" in group:
            group["step"] = step


def _steps(optimizer: Any) -> int:
    """Return the gang's number of steps. A rank that holds no trained parameter learns it from the others."""
    step = torch.tensor(max((step_of(adam) for adam in _adams(optimizer)), default=-1), device=host.device())
    dist.all_reduce(step, dist.ReduceOp.MAX)
    return int(step)


def parts(optimizer: Any) -> list[Any]:
    """Return the optimizers of a ChainedOptimizer, without stubs (an optimizer of frozen parameters only is a stub)."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.is_stub_optimizer]


def _adams(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """Yield torch's optimizers. A partly offloaded one has one on the host and one on the device (HybridDeviceOptimizer)."""
    for part in parts(optimizer):
        yield from getattr(part.optimizer, "sub_optimizers", [part.optimizer])


def _allocate(part: Any) -> None:
    """Allocate a fresh optimizer's state by a step without gradients, as Megatron-Core does, but with rates of 0: no weight moves."""
    groups = part.optimizer.param_groups
    rates = [(group["lr"], group["weight_decay"]) for group in groups]
    for group in groups:
        group.update(lr=0.0, weight_decay=0.0)
    part._init_optimizer_states_with_dummy_values()
    for group, (lr, weight_decay) in zip(groups, rates, strict=True):
        group.update(lr=lr, weight_decay=weight_decay)
        for weight in group["params"]:
            weight.grad = None  # of zeros: an optimizer that reads its gradients elsewhere (decoupled_grad) would keep them
    set_step(part.optimizer, 0)


def cut(weight: Any, prefix: str, start: int, values: torch.Tensor) -> Iterator[Any]:
    """Yield the shards of `values`, which belong to the weight's values from `start` on; weight: Megatron's shard, or factory of shards.

    One of the weight's replicas over TP (norms) and PP (tied embeddings) writes it. Over DP there are no replicas: the ranges differ.
    """
    for piece_start, piece in pieces(weight):
        first, last = max(start, piece_start), min(start + values.numel(), piece_start + prod(piece.local_shape))
        for box in boxes(first - piece_start, last - piece_start, piece.local_shape):
            place = piece_start + box.start - start
            yield replace(
                piece,
                key=prefix + piece.key,
                data=values[place : place + prod(box.size)].view(box.size),
                dtype=values.dtype,
                local_shape=box.size,
                global_offset=tuple(whole + own for whole, own in zip(piece.global_offset, box.offset, strict=True)),
                axis_fragmentations=None,  # no regular grid
                replica_id=(*piece.replica_id[:2], 0),  # (PP, TP, DP)
            )


def pieces(weight: Any) -> list[tuple[int, Any]]:
    """Return a weight's shards, each with the place of its values in the weight; a gated layer's gate and up are two.

    Megatron's factories cut along the first dimension: a template without values shows where.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if isinstance(weight, ShardedTensor):
        return [(0, weight)]
    template = torch.empty(weight.data.shape, dtype=weight.data.dtype, device="meta")
    built = nested_values(weight.build_fn(weight.key, template, weight.replica_id, None))
    pieces = sorted(((piece.data.storage_offset(), piece) for piece in built), key=lambda pair: pair[0])
    ends = [start + piece.data.numel() for start, piece in pieces]
    follow = [start for start, _ in pieces] == [0, *ends[:-1]] and ends[-1] == template.numel()
    assert follow and all(piece.data.is_contiguous() for _, piece in pieces), f"{weight.key}: its pieces are not ranges of it"
    return pieces
