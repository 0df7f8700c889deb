"""The layouts that a run could have on a number of GPUs, and the distance between two layouts."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_prism.core.check import rl, train
from megatron_prism.core.config import ModelConfig, RecomputeConfig, RLConfig, TrainConfig
from megatron_prism.core.errors import Problem
from megatron_prism.core.load import flat
from megatron_prism.planning.throughput import GPUS_PER_NODE

Planned = TrainConfig | RLConfig
MAX_PP, MAX_VPP, MICRO_SIZES = 16, 10, (1, 2, 4)
NUM_ROWS = (8, 16, 32, 64, 128)  # that decode together on a replica
MIN_TOKENS = 2048  # of a sequence on a rank: fewer would leave a GPU idle


def problems(config: Planned, world_size: int) -> list[Problem]:
    """Return the problems of a config's values on `world_size` ranks, and between them."""
    return rl.check_rl(config, world_size) if isinstance(config, RLConfig) else train.check_train(config, world_size)


def model_problems(model: ModelConfig, config: Planned) -> list[Problem]:
    """Return the problems between an architecture and the config that builds it."""
    return rl.check_model(model, config) if isinstance(config, RLConfig) else train.check_model(model, config)


def valid(config: Planned, model: ModelConfig, world_size: int) -> Iterator[Planned]:
    """Yield every layout that core/check accepts: tp within a node, pp, vpp, cp in powers of two, micro_size, recompute.

    Reinforcement learning has neither vpp nor cp, which its engine refuses, and numbers of rows that decode together.
    """
    is_rl = isinstance(config, RLConfig)
    powers = [2**power for power in range(world_size.bit_length())]
    cps = [1] if isinstance(config, RLConfig) else [cp for cp in powers if cp == 1 or config.data.seq_length // cp >= MIN_TOKENS]
    for tp, pp, cp in itertools.product([tp for tp in powers if tp <= GPUS_PER_NODE], [pp for pp in powers if pp <= MAX_PP], cps):
        if world_size % (tp * pp * cp) or model.num_layers < pp:
            continue
        for micro, vpp in itertools.product((1,) if is_rl else MICRO_SIZES, [None] if is_rl else _chunks(model, pp)):
            parallel = replace(config.parallel, tp=tp, pp=pp, cp=cp, vpp=vpp, sequence_parallel=tp > 1)
            batch: Any = replace(config.batch, micro_size=micro)  # mypy does not see that it is of its config's class
            laid = replace(config, world_size=world_size, parallel=parallel, batch=batch)
            for recompute in _recomputes(model, pp * (vpp or 1)):
                candidate = replace(laid, recompute=recompute)
                if not problems(candidate, world_size) and not model_problems(model, candidate):
                    yield from _with_rows(candidate) if isinstance(candidate, RLConfig) else (candidate,)


def _with_rows(config: RLConfig) -> Iterator[RLConfig]:
    """Yield a config with each number of rows that its data-parallel replicas could use."""
    for num_rows in sorted({config.rollout.num_rows, *NUM_ROWS}):
        yield replace(config, rollout=replace(config.rollout, num_rows=num_rows))


def _chunks(model: ModelConfig, pp: int) -> list[int | None]:
    if pp == 1 or model.layer_pattern is not None:
        return [None]
    return [None, *(vpp for vpp in range(2, MAX_VPP + 1) if model.num_layers % (pp * vpp) == 0)]


def _recomputes(model: ModelConfig, chunks: int) -> list[RecomputeConfig]:
    """Return the recompute options: none; full recompute of a quarter, half or all of a chunk's layers. A hybrid (without full): mlp layers."""
    if model.layer_pattern is not None:
        return [RecomputeConfig(), RecomputeConfig(granularity="selective", modules=("mlp",))]
    layers = model.num_layers // chunks
    parts = sorted({count for count in (layers // 4, layers // 2) if count})
    return [RecomputeConfig(), *(RecomputeConfig(granularity="full", num_layers=count) for count in [*parts, None])]


def distance(one: Planned, other: Planned) -> float:
    """Return ten times the number of keys that differ between two layouts, plus by how much: doublings of sizes, a change of recompute."""
    sizes = [(getattr(one.parallel, name), getattr(other.parallel, name)) for name in ("tp", "pp", "cp")]
    sizes += [(one.batch.micro_size, other.batch.micro_size), (one.parallel.vpp or 1, other.parallel.vpp or 1)]
    if isinstance(one, RLConfig) and isinstance(other, RLConfig):
        sizes.append((one.rollout.num_rows, other.rollout.num_rows))
    moved = [abs(math.log2(a / b)) for a, b in sizes] + [float(one.recompute != other.recompute)]
    return 10 * sum(change > 0 for change in moved) + sum(moved)


def changes(one: Planned, other: Planned) -> list[str]:
    """Return the overrides that turn one layout into the other."""
    keys = ["world_size", *(f"parallel.{name}" for name in ("tp", "pp", "cp", "vpp", "sequence_parallel"))]
    keys += ["batch.micro_size", "recompute.granularity", "recompute.num_layers", "recompute.modules", "rollout.num_rows"]
    old, new = flat(one), flat(other)
    return [
        f"{key}={new[key] if isinstance(new[key], str) else json.dumps(new[key], separators=(',', ':'))}"
        for key in keys
        if key in old and old[key] != new[key]
    ]
