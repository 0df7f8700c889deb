"""The layouts that a run could have on a number of GPUs, and the distance between two layouts."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_prism.core.check.train import check_model, check_train
from megatron_prism.core.config import ModelConfig, RecomputeConfig, TrainConfig
from megatron_prism.core.load import flat
from megatron_prism.planning.throughput import GPUS_PER_NODE

MAX_PP, MAX_VPP, MICRO_SIZES = 16, 10, (1, 2, 4)
MIN_TOKENS = 2048  # of a sequence on a rank: fewer would leave a GPU idle


def valid(config: TrainConfig, model: ModelConfig, world_size: int) -> Iterator[TrainConfig]:
    """Yield every layout that core/check/train.py accepts: tp within a node, pp, vpp, cp in powers of two, micro_size, recompute."""
    powers = [2**power for power in range(world_size.bit_length())]
    cps = [cp for cp in powers if cp == 1 or config.data.seq_length // cp >= MIN_TOKENS]
    for tp, pp, cp in itertools.product([tp for tp in powers if tp <= GPUS_PER_NODE], [pp for pp in powers if pp <= MAX_PP], cps):
        if world_size % (tp * pp * cp) or model.num_layers < pp:
            continue
        for micro, vpp in itertools.product(MICRO_SIZES, _chunks(model, pp)):
            parallel = replace(config.parallel, tp=tp, pp=pp, cp=cp, vpp=vpp, sequence_parallel=tp > 1)
            laid = replace(config, world_size=world_size, parallel=parallel, batch=replace(config.batch, micro_size=micro))
            for recompute in _recomputes(model, pp * (vpp or 1)):
                candidate = replace(laid, recompute=recompute)
                if not check_train(candidate, world_size) and not check_model(model, candidate):
                    yield candidate


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


def distance(one: TrainConfig, other: TrainConfig) -> float:
    """Return ten times the number of keys that differ between two layouts, plus by how much: doublings of sizes, a change of recompute."""
    sizes = [(getattr(one.parallel, name), getattr(other.parallel, name)) for name in ("tp", "pp", "cp")]
    sizes += [(one.batch.micro_size, other.batch.micro_size), (one.parallel.vpp or 1, other.parallel.vpp or 1)]
    moved = [abs(math.log2(a / b)) for a, b in sizes] + [float(one.recompute != other.recompute)]
    return 10 * sum(change > 0 for change in moved) + sum(moved)


def changes(one: TrainConfig, other: TrainConfig) -> list[str]:
    """Return the overrides that turn one layout into the other."""
    keys = ["world_size", *(f"parallel.{name}" for name in ("tp", "pp", "cp", "vpp", "sequence_parallel"))]
    keys += ["batch.micro_size", "recompute.granularity", "recompute.num_layers", "recompute.modules"]
    old, new = flat(one), flat(other)
    return [
        f"{key}={new[key] if isinstance(new[key], str) else json.dumps(new[key], separators=(',', ':'))}"
        for key in keys
        if old[key] != new[key]
    ]
