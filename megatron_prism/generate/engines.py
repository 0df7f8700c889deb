"""The engine that a config names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prism.core.config import ModelConfig, Precision, SamplingConfig
from megatron_prism.core.errors import Problem
from megatron_prism.generate import mcore, vllm
from megatron_prism.generate.cached import Cached
from megatron_prism.generate.engine import Engine
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups


def check(sampling: SamplingConfig, model: ModelConfig, world_size: int, tp: int, pp: int = 1) -> list[Problem]:
    """Return what the engine does not support of a model and a gang. Call it before anything starts, on any machine."""
    if sampling.engine == "mcore":
        return mcore.unsupported(model, pp)
    return vllm.unsupported(model, world_size, sampling.vllm.tensor_parallel or tp) if sampling.engine == "vllm" else []


def check_machine(sampling: SamplingConfig, model: ModelConfig, precision: Precision) -> list[Problem]:
    """Return what this rank's machine lacks for the engine. Call it on each rank before it joins the gang."""
    return mcore.absent(model, precision) if sampling.engine == "mcore" else []


def engine_of(
    sampling: SamplingConfig,
    precision: Precision,
    max_context: int,
    chunks: Sequence[Any],
    model: ModelConfig,
    assets: Path,
    groups: Groups,
) -> Engine:
    """Return the engine over this rank's model chunks; every rank calls this.

    max_context: the most tokens of a prompt and its response. assets: the folder with the model's config.json.
    """
    if sampling.engine == "cached":
        return Cached(chunks, model, groups, num_rows=sampling.num_rows)
    if sampling.engine == "mcore":
        cache_bytes = int(sampling.mcore.memory_share * host.total_memory_bytes())
        return mcore.MCore(chunks, model, groups, max_context, cache_bytes, num_rows=sampling.num_rows)
    return vllm.VLLM(
        chunks=chunks,
        model=model,
        groups=groups,
        assets=assets,
        precision=precision,
        max_context=max_context,
        num_rows=sampling.num_rows,
        tensor_parallel=sampling.vllm.tensor_parallel or groups.tp,
        memory_share=sampling.vllm.memory_share,
    )
