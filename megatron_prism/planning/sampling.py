"""The prediction for a job that only samples: the filter of RL, and an evaluation. Weights and cache in memory, and the time of each load.

A job samples shard by shard, and a shard lasts as long as its longest response: its seconds are those of a rollout of that size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prism.core.check.gang import data_parallel_size
from megatron_prism.core.config import ModelConfig
from megatron_prism.planning import memory, predict, rollout
from megatron_prism.planning.gpus import GIB, Gpu
from megatron_prism.planning.rollout import Lengths, Load
from megatron_prism.planning.stage import Stage


@dataclass(frozen=True)
class Part:
    """One of a job's loads: a shard's, how many shards there are, and the lengths that are assumed. num_responses: of all of them."""

    load: Load
    num_shards: float
    num_responses: int
    lengths: Lengths


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank. cache: with the engine's working memory (all that vLLM takes)."""

    weights: float
    cache: float
    allowance: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.allowance


@dataclass(frozen=True, kw_only=True)
class Prediction(predict.Fit):
    """A layout's memory by pipeline stage, and each part's seconds: at the assumed lengths, and where every response takes all its tokens."""

    memories: tuple[Memory, ...]
    seconds: Mapping[str, float]
    longest_s: Mapping[str, float]


def predict_sampling(stages: Sequence[Stage], model: ModelConfig, parts: Mapping[str, Part], world_size: int, gpu: Gpu) -> Prediction:
    """Return the prediction for a layout with these pipeline stages. parts: by name, of one gang."""
    seconds, longest = {}, {}
    for name, part in parts.items():
        full = Lengths(part.lengths.max_prompt, part.lengths.max_response, part.lengths.max_prompt, part.lengths.max_response)
        of_shard = [rollout.seconds(stages, model, part.load, world_size, assumed, gpu) for assumed in (part.lengths, full)]
        seconds[name], longest[name] = (part.num_shards * each for each in of_shard)
    tokens = sum(part.num_responses * part.lengths.response for part in parts.values())
    return Prediction(
        stages=tuple(stages),
        memories=tuple(_of_stage(stages, index, model, parts, world_size, gpu) for index in range(len(stages))),
        seconds=seconds,
        longest_s=longest,
        tokens_per_s_per_gpu=tokens / world_size / max(sum(seconds.values()), 1e-9),
        gpu=gpu,
    )


def _of_stage(stages: Sequence[Stage], index: int, model: ModelConfig, parts: Mapping[str, Part], world_size: int, gpu: Gpu) -> Memory:
    gang = next(iter(parts.values())).load.gang
    dp, grid = data_parallel_size(gang, world_size), gang.parallel
    cache = max(rollout.memory_bytes(stages, index, model, part.load, dp, gpu) for part in parts.values())
    num_groups = sum(size > 1 for size in (dp, grid.tp, grid.pp))
    return Memory(
        weights=(4.0 if gang.precision == "fp32" else 2.0) * stages[index].parameters,
        cache=cache,
        allowance=(memory.CONTEXT_GIB + memory.GROUP_GIB * num_groups) * GIB + memory.FRAGMENTATION * cache,
    )


def figures(prediction: Prediction, parts: Mapping[str, Part], world_size: int, usd_per_gpu_hour: float) -> dict[str, Any]:
    """Return a prediction as the plan's plain values. The lengths and the price are assumptions, and say so."""
    hours = sum(prediction.seconds.values()) / 3600
    return {
        "gpu": prediction.gpu.name,
        "responses": sum(part.num_responses for part in parts.values()),
        "parts": {
            name: {
                "responses": part.num_responses,
                "prompt_tokens_assumed": part.lengths.prompt,
                "response_tokens_assumed": part.lengths.response,
                "hours": prediction.seconds[name] / 3600,
                "hours_longest": prediction.longest_s[name] / 3600,
            }
            for name, part in parts.items()
        },
        "tokens_per_s_per_gpu": prediction.tokens_per_s_per_gpu,
        "tokens_per_s": prediction.tokens_per_s_per_gpu * world_size,
        "memory_gib_per_gpu_max": max(prediction.memory_gib),
        "memory_gib_available": prediction.gpu.memory_gib,
        "fits": prediction.fits,
        "stages": [predict.shown(index, *pair) for index, pair in enumerate(zip(prediction.stages, prediction.memories, strict=True))],
        "hours": hours,
        "hours_longest": sum(prediction.longest_s.values()) / 3600,
        "gpu_hours": hours * world_size,
        "usd_per_gpu_hour_assumed": usd_per_gpu_hour,
        "usd": hours * world_size * usd_per_gpu_hour,
    }
