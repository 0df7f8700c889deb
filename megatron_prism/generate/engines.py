"""The engine that a config of reinforcement learning names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prism.core.config import ModelConfig, RLConfig
from megatron_prism.core.errors import Problem
from megatron_prism.generate import vllm
from megatron_prism.generate.cached import Cached
from megatron_prism.generate.engine import Engine
from megatron_prism.parallel.groups import Groups


def check(config: RLConfig, model: ModelConfig, world_size: int) -> list[Problem]:
    """Return what the engine does not support of a model and a gang. Call it before anything starts, on any machine."""
    return vllm.unsupported(model, world_size, config.rollout.vllm.tensor_parallel) if config.rollout.engine == "vllm" else []


def engine_of(config: RLConfig, chunks: Sequence[Any], model: ModelConfig, assets: Path, groups: Groups) -> Engine:
    """Return the engine over this rank's model chunks. assets: the folder with the model's config.json. Every rank calls this."""
    rollout = config.rollout
    if rollout.engine == "cached":
        return Cached(chunks, model, groups, num_rows=rollout.num_rows)
    return vllm.VLLM(
        chunks=chunks,
        model=model,
        groups=groups,
        assets=assets,
        precision=config.precision,
        max_context=min(config.batch.seq_length + 1, model.max_position_embeddings),
        num_rows=rollout.num_rows,
        tensor_parallel=rollout.vllm.tensor_parallel,
        memory_share=rollout.vllm.memory_share,
    )
