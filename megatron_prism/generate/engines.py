"""The engine that a config names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_prism.core.config import ModelConfig, Precision, SamplingConfig
from megatron_prism.core.errors import Problem
from megatron_prism.generate import mcore, vllm
from megatron_prism.generate.cached import Cached
from megatron_prism.generate.engine import Engine
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups

KEYS = ("engine", "vllm", "mcore")  # of a config's section that samples


def check(sampling: SamplingConfig, model: ModelConfig, world_size: int, tp: int, pp: int = 1, section: str = "rollout.") -> list[Problem]:
    """Return what the engine does not support of a model and a gang. Call it before anything starts, on any machine.

    section: what the config's keys of sampling stand under, with its dot; empty where they stand at the top.
    """
    if sampling.engine == "mcore":
        return _under(section, mcore.unsupported(model, pp))
    return _under(section, vllm.unsupported(model, world_size, sampling.vllm.tensor_parallel or tp)) if sampling.engine == "vllm" else []


def check_machine(sampling: SamplingConfig, model: ModelConfig, precision: Precision, section: str = "rollout.") -> list[Problem]:
    """Return what this rank's machine lacks for the engine. Call it on each rank before it joins the gang. section: as for check."""
    return _under(section, mcore.absent(model, precision)) if sampling.engine == "mcore" else []


def _under(section: str, problems: Sequence[Problem]) -> list[Problem]:
    """Return an engine's problems with its own keys under a section; `parallel` and `precision` stand where they stand."""
    return [replace(one, where=f"{section}{one.where}") if one.where.split(".")[0] in KEYS else one for one in problems]


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
