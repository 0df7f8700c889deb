"""The engine that a config names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prism.core.config import ModelConfig, Precision, SamplingConfig
from megatron_prism.core.errors import Problem
from megatron_prism.generate import vllm
from megatron_prism.generate.cached import Cached
from megatron_prism.generate.engine import Engine
from megatron_prism.parallel.groups import Groups


def check(sampling: SamplingConfig, model: ModelConfig, world_size: int, tp: int, section: str = "rollout.") -> list[Problem]:
    """Return what the engine does not support of a model and a gang. Call it before anything starts, on any machine.

    section: what the config's keys of sampling stand under, with its dot; empty where they stand at the top.
    """
    if sampling.engine == "cached":
        return []
    return vllm.unsupported(model, world_size, sampling.vllm.tensor_parallel or tp, section)


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
