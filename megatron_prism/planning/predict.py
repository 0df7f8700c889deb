"""The prediction for a run: memory and time of every stage, rates, hours and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_prism.core.check.gang import data_parallel_size
from megatron_prism.core.config import ModelConfig, RunConfig, TrainConfig
from megatron_prism.planning import memory, throughput
from megatron_prism.planning.flops import Flops, flops_per_token
from megatron_prism.planning.gpus import GIB, H100, Gpu
from megatron_prism.planning.stage import Stage

WRITE_BYTES_S_PER_NODE = 2e9  # to a parallel file system: an assumption


class Needs(Protocol):
    """Peak bytes of one rank."""

    @property
    def total(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A layout's memory by pipeline stage, beside that of a GPU."""

    stages: tuple[Stage, ...]
    memories: Sequence[Needs]
    tokens_per_s_per_gpu: float
    gpu: Gpu

    @property
    def memory_gib(self) -> list[float]:
        return [needs.total / GIB for needs in self.memories]

    @property
    def fits(self) -> bool:
        return max(self.memory_gib) <= self.gpu.memory_gib


@dataclass(frozen=True, kw_only=True)
class Prediction(Fit):
    """A layout's memory by pipeline stage, and the time of a step."""

    memories: tuple[memory.Memory, ...]
    time: throughput.StepTime
    flops: Flops


def predict(
    stages: Sequence[Stage],
    model: ModelConfig,
    config: TrainConfig,
    world_size: int,
    attention: float = throughput.ATTENTION,
    gpu: Gpu = H100,
) -> Prediction:
    """Return the prediction for a layout with these pipeline stages. The config must have been checked."""
    dp = data_parallel_size(config, world_size)
    time = throughput.of_step(stages, model, config, world_size, attention, gpu)
    return Prediction(
        stages=tuple(stages),
        memories=tuple(memory.of_stage(stage, index, model, config, dp) for index, stage in enumerate(stages)),
        time=time,
        flops=flops_per_token(model, config.data.seq_length),
        tokens_per_s_per_gpu=config.batch.global_size * config.data.seq_length / world_size / time.step_s,
        gpu=gpu,
    )


def figures(prediction: Prediction, config: TrainConfig, world_size: int, usd_per_gpu_hour: float) -> dict[str, Any]:
    """Return a prediction as the plan's plain values. MFU is named by its convention. The price is the caller's assumption."""
    peak = prediction.gpu.peak_flops(throughput.precision_of(config))
    rate, tokens_per_step = prediction.tokens_per_s_per_gpu, config.batch.global_size * config.data.seq_length
    hours = tokens_per_step * config.steps / rate / 3600
    saved = checkpoint_bytes(prediction.stages, config)
    return {
        "microbatches": config.batch.global_size // (config.batch.micro_size * data_parallel_size(config, world_size)),
        "gpu": prediction.gpu.name,
        "tokens": tokens_per_step * config.steps,
        "tokens_per_step": tokens_per_step,
        "flops_per_token_causal": prediction.flops.causal,
        "flops_per_token_full": prediction.flops.full,
        "step_s": prediction.time.step_s,
        "step_parts_s": vars(prediction.time),
        "tokens_per_s_per_gpu": rate,
        "tokens_per_s": rate * world_size,
        "tflops_per_gpu_causal": rate * prediction.flops.causal / 1e12,
        "tflops_per_gpu_full": rate * prediction.flops.full / 1e12,
        "mfu_causal": rate * prediction.flops.causal / peak,
        "mfu_full": rate * prediction.flops.full / peak,
        "peak_tflops": peak / 1e12,
        "memory_gib_per_gpu_max": max(prediction.memory_gib),
        "memory_gib_available": prediction.gpu.memory_gib,
        "fits": prediction.fits,
        "stages": [shown(index, *pair) for index, pair in enumerate(zip(prediction.stages, prediction.memories, strict=True))],
        "hours": hours / world_size,
        "gpu_hours": hours,
        "usd_per_gpu_hour_assumed": usd_per_gpu_hour,
        "usd": hours * usd_per_gpu_hour,
        "checkpoint_gib": saved / GIB,
        "checkpoint_save_s": saved / write_bytes_s(world_size),
    }


def checkpoint_bytes(stages: Sequence[Stage], config: RunConfig) -> float:
    """Return a training checkpoint's size: the weights, and for trainable parameters fp32 weights and two moments."""
    element, state = 4.0 if config.precision == "fp32" else 2.0, 4.0 + 2 * memory.moment_bytes(config)
    return config.parallel.tp * sum(element * stage.parameters + state * stage.trainable for stage in stages)


def write_bytes_s(world_size: int) -> float:
    """Return the bandwidth at which all nodes together write a checkpoint."""
    return WRITE_BYTES_S_PER_NODE * max(1, world_size // throughput.GPUS_PER_NODE)


def shown(index: int, stage: Stage, needs: Any) -> dict[str, Any]:
    """Return a stage and its memory (a dataclass of bytes with their `total`) as the plan's plain values."""
    kinds = {"attention": "*", "mlp": "-", "mamba": "M"}
    layers = {name: stage.letters.count(letter) for name, letter in kinds.items() if letter in stage.letters}
    parts = {f"{name}_gib": size / GIB for name, size in vars(needs).items()}
    return {
        "stage": index,
        "layers": layers,
        "parameters": stage.parameters,
        "trainable": stage.trainable,
        **parts,
        "total_gib": needs.total / GIB,
    }
