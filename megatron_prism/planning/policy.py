"""The prediction for a step of reinforcement learning: rollout, log-probabilities, training; and the memory that they share.

Training is predicted as `prism train`'s is, on as many packed rows as the assumed lengths fill. The reference is one more copy of a rank's
parameters. Training's activations and the rollout's cache are never there together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron_prism.core.check.gang import data_parallel_size
from megatron_prism.core.config import BatchConfig, DataConfig, ModelConfig, RLConfig, RunConfig, TrainConfig
from megatron_prism.planning import memory, predict, rollout, throughput
from megatron_prism.planning.gpus import GIB, H100, Gpu
from megatron_prism.planning.rollout import Lengths
from megatron_prism.planning.stage import Stage

FILLED = 0.95  # of the packed rows, by best-fit decreasing: an assumption


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank. activations: training's, with its working memory. cache: the rollout's, likewise (all that vLLM takes). Only the larger counts."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float
    cache: float
    allowance: float

    @property
    def total(self) -> float:
        always = self.weights + self.gradients + self.optimizer + self.reference + self.allowance
        return always + max(self.activations, self.cache)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. log_probs: forward passes of the trainer and, under a KL term, of the reference. Grading is not in it."""

    rollout_s: float
    log_probs_s: float
    training_s: float

    @property
    def step_s(self) -> float:
        return self.rollout_s + self.log_probs_s + self.training_s


@dataclass(frozen=True, kw_only=True)
class Prediction(predict.Fit):
    """A layout's memory by pipeline stage, and the time of a step: at the assumed lengths, and where every response takes all its tokens."""

    memories: tuple[Memory, ...]
    lengths: Lengths
    time: StepTime
    longest: StepTime


def predict_rl(
    stages: Sequence[Stage],
    model: ModelConfig,
    config: RLConfig,
    world_size: int,
    gpu: Gpu = H100,
    response_tokens: float | None = None,
) -> Prediction:
    """Return the prediction for a layout with these pipeline stages. The config must have been checked.

    response_tokens: the mean of a response; None: a quarter of rollout.max_tokens.
    """
    assumed = rollout.lengths(rollout.of_step(config), response_tokens)
    full = Lengths(assumed.max_prompt, assumed.max_response, assumed.max_prompt, assumed.max_response)
    time = _time(stages, model, config, world_size, assumed, gpu)
    tokens = config.rollout.num_prompts * config.rollout.num_samples * assumed.response
    trained = as_training(config, world_size, full)
    dp = data_parallel_size(config, world_size)
    return Prediction(
        stages=tuple(stages),
        memories=tuple(_of_stage(stages, index, model, config, trained, dp, gpu) for index in range(len(stages))),
        lengths=assumed,
        time=time,
        longest=_time(stages, model, config, world_size, full, gpu),
        tokens_per_s_per_gpu=tokens / world_size / time.step_s,
        gpu=gpu,
    )


def as_training(config: RLConfig, world_size: int, assumed: Lengths) -> TrainConfig:
    """Return the training run whose steps have the rows that an RL step's responses fill, all of them kept."""
    samples, micro = config.rollout.num_prompts * config.rollout.num_samples, config.batch.micro_size
    tokens = samples * (assumed.prompt + assumed.response)
    rows = min(math.ceil(tokens / (config.batch.seq_length * FILLED)), samples)
    each = micro * data_parallel_size(config, world_size)
    return TrainConfig(
        **{item.name: getattr(config, item.name) for item in fields(RunConfig)},
        data=DataConfig(prepared=config.prompts, seq_length=config.batch.seq_length, document_mask=True),
        batch=BatchConfig(global_size=math.ceil(rows / each) * each, micro_size=micro),
    )


def _of_stage(stages: Sequence[Stage], index: int, model: ModelConfig, config: RLConfig, trained: TrainConfig, dp: int, gpu: Gpu) -> Memory:
    stage = stages[index]
    needs = memory.of_stage(stage, index, model, trained, dp)
    activations = needs.activations + needs.working
    cache = rollout.memory_bytes(stages, index, model, rollout.of_step(config), dp, gpu)
    fixed = needs.allowance - memory.FRAGMENTATION * activations
    reference = (4.0 if config.precision == "fp32" else 2.0) * stage.parameters if config.algorithm.kl_beta > 0 else 0.0
    return Memory(
        weights=needs.weights,
        gradients=needs.gradients,
        optimizer=needs.optimizer,
        reference=reference,
        activations=activations,
        cache=cache,
        allowance=fixed + memory.FRAGMENTATION * max(activations, cache),
    )


def _time(stages: Sequence[Stage], model: ModelConfig, config: RLConfig, world_size: int, assumed: Lengths, gpu: Gpu) -> StepTime:
    training = throughput.of_step(stages, model, as_training(config, world_size, assumed), world_size, gpu=gpu)
    forward = training.matmul_s + training.attention_s + training.scan_s + training.elementwise_s + training.pipeline_s
    passes = 1 + (config.algorithm.kl_beta > 0)
    return StepTime(
        rollout_s=rollout.seconds(stages, model, rollout.of_step(config), world_size, assumed, gpu),
        log_probs_s=passes * (forward / 3 + training.tensor_s),  # the tensor-parallel time that counts is the forward pass's
        training_s=training.step_s + (config.batch.num_minibatches - 1) * (training.data_s + training.optimizer_s),
    )


def figures(prediction: Prediction, config: RLConfig, world_size: int, usd_per_gpu_hour: float) -> dict[str, Any]:
    """Return a prediction as the plan's plain values. The lengths and the price are assumptions, and say so."""
    time, assumed = prediction.time, prediction.lengths
    gpu_hours = time.step_s * config.steps * world_size / 3600
    saved = predict.checkpoint_bytes(prediction.stages, config) + config.parallel.tp * sum(needs.reference for needs in prediction.memories)
    each = config.batch.micro_size * data_parallel_size(config, world_size)
    return {
        "microbatches": as_training(config, world_size, assumed).batch.global_size // each,
        "gpu": prediction.gpu.name,
        "responses_per_step": config.rollout.num_prompts * config.rollout.num_samples,
        "responses": config.rollout.num_prompts * config.rollout.num_samples * config.steps,
        "prompt_tokens_assumed": assumed.prompt,
        "response_tokens_assumed": assumed.response,
        "step_s": time.step_s,
        **vars(time),
        "step_s_longest": prediction.longest.step_s,
        "tokens_per_s_per_gpu": prediction.tokens_per_s_per_gpu,
        "tokens_per_s": prediction.tokens_per_s_per_gpu * world_size,
        "memory_gib_per_gpu_max": max(prediction.memory_gib),
        "memory_gib_available": prediction.gpu.memory_gib,
        "fits": prediction.fits,
        "stages": [predict.shown(index, *pair) for index, pair in enumerate(zip(prediction.stages, prediction.memories, strict=True))],
        "hours": gpu_hours / world_size,
        "hours_longest": prediction.longest.step_s * config.steps / 3600,
        "gpu_hours": gpu_hours,
        "usd_per_gpu_hour_assumed": usd_per_gpu_hour,
        "usd": gpu_hours * usd_per_gpu_hour,
        "checkpoint_gib": saved / GIB,
        "checkpoint_save_s": saved / predict.write_bytes_s(world_size),
    }
