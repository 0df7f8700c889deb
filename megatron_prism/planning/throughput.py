"""Seconds of a training step on H100s or H200s: a model with few constants, not a simulation.

A stage's time for a microbatch is the sum of its matrix products, attention, elementwise work and exposed communication. The slowest stage
sets the pace of the pipeline. Gradients, optimizer and weights add their time once per step. Fitted constants are marked, and
docs/PLANNER.md compares them with published rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_prism.core.check.gang import data_parallel_size
from megatron_prism.core.check.model import padded_vocab_size
from megatron_prism.core.config import GangConfig, ModelConfig, RecomputeConfig, RunConfig, TrainConfig
from megatron_prism.planning.gpus import H100, Gpu
from megatron_prism.planning.memory import gradient_bytes, kept_by_layer, moment_bytes, tokens_of_rank
from megatron_prism.planning.stage import Stage

MATMUL = {"fp8": 0.50, "bf16": 0.60, "fp32": 0.60}  # of the peak, in large matrix products. fp8 is fitted; bf16 is an assumption
ATTENTION = 0.60  # of the bf16 peak, causal FLOPs, with the kernels of 2025 and later: fitted
TENSOR_EXPOSED = 0.5  # share of tensor-parallel communication: Megatron-Core hides the backward half. An assumption
SCAN = 0.05  # of the bf16 peak, for a Mamba scan's 7 FLOPs per state element: an assumption, nothing is published
PASSES = 4.0  # writes and reads, in total, of a byte that is kept for the backward pass: an assumption
HBM = 0.75  # of the memory's peak: an assumption
NVLINK_BYTES_S = 450e9 * 0.75  # one way
INFINIBAND_BYTES_S = 50e9 * 0.85  # one 400 Gbit/s port per GPU
GPUS_PER_NODE = 8
HOST_LINK_BYTES_S = 50e9  # PCIe 5, one way: for offloading


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest stage, by use. They add up to the step."""

    matmul_s: float
    attention_s: float
    scan_s: float
    elementwise_s: float
    recompute_s: float
    tensor_s: float
    context_s: float
    pipeline_s: float
    data_s: float
    optimizer_s: float

    @property
    def step_s(self) -> float:
        return sum(vars(self).values())


def of_step(
    stages: Sequence[Stage], model: ModelConfig, config: TrainConfig, world_size: int, attention: float = ATTENTION, gpu: Gpu = H100
) -> StepTime:
    """Return the time of a step, which the slowest stage sets. attention: the kernels' share of the peak, as ATTENTION."""
    grid = config.parallel
    dp = data_parallel_size(config, world_size)
    microbatches = config.batch.global_size // (config.batch.micro_size * dp)
    times = [microbatch(stage, model, config, attention, gpu) for stage in stages]
    slowest = max(range(len(times)), key=lambda index: sum(times[index].values()))
    pace = sum(times[slowest].values())
    bubble = (grid.pp - 1) / (grid.vpp or 1) * sum(sum(part.values()) for part in times) / len(times)
    data, update = _once_a_step(stages[slowest], config, dp, pace, gpu)
    parts = {name: microbatches * value for name, value in times[slowest].items()}
    return StepTime(**parts, pipeline_s=bubble, data_s=data, optimizer_s=update)


def precision_of(gang: GangConfig) -> str:
    """Return the precision of a run's matrix products."""
    return "fp8" if gang.fp8 is not None else gang.precision


def microbatch(stage: Stage, model: ModelConfig, config: TrainConfig, attention: float, gpu: Gpu) -> dict[str, float]:
    """Return the seconds of a stage's forward and backward pass over one microbatch, by use."""
    tokens, tp = tokens_of_rank(config), config.parallel.tp
    layers, others = precision_of(config), config.precision
    peak = gpu.peak_flops(others)
    forward = 2 * stage.matrices / (gpu.peak_flops(layers) * MATMUL[layers])
    trained = stage.trainable_matrices / max(stage.matrices, 1)  # a frozen matrix needs only the gradient of its input
    matmul = forward * (2 + trained)
    if stage.is_last:
        passes = 6 if config.logits_chunk_tokens is None else 8  # in chunks the logits are computed again in the backward pass
        matmul += passes * model.hidden_size * padded_vocab_size(model.vocab_size, tp) / tp / (peak * MATMUL[others])
    attended = stage.letters.count("*") * 2 * config.data.seq_length * model.num_attention_heads * model.kv_channels / tp
    attend = attended / (peak * attention)  # forward
    scan = _scan_flops(stage, model) / tp / (peak * SCAN)
    kept = sum(kept_by_layer(letter, model, replace(config, recompute=RecomputeConfig())) for letter in stage.letters)
    if stage.is_last:
        kept += 6.0 * padded_vocab_size(model.vocab_size, tp) / tp
    elementwise = PASSES * kept / (gpu.hbm_bytes_s * HBM)
    per_token = {
        "matmul_s": matmul,
        "attention_s": 3 * attend,
        "scan_s": 3 * scan,
        "elementwise_s": elementwise,
        "recompute_s": _recomputed(stage, config) * (forward + attend + scan + elementwise / 3)
        + _recomputed_mlp(stage, model, config) * forward,
        "tensor_s": _tensor(stage, model, config),
        "context_s": max(0.0, _context(stage, model, config) - 3 * attend),
    }
    return {name: tokens * value for name, value in per_token.items()}


def _scan_flops(stage: Stage, model: ModelConfig) -> float:
    if model.mamba is None:
        return 0.0
    return stage.letters.count("M") * 7.0 * model.mamba.num_heads * model.mamba.head_dim * model.mamba.state_dim


def _recomputed(stage: Stage, gang: GangConfig) -> float:
    """Return the share of a stage's layers whose forward pass runs again."""
    if gang.recompute.granularity != "full":
        return 0.0
    layers, count = len(stage.letters) / 2, gang.recompute.num_layers
    return 1.0 if count is None else min(count * (gang.parallel.vpp or 1) / layers, 1.0)


def _recomputed_mlp(stage: Stage, model: ModelConfig, gang: GangConfig) -> float:
    """Return the share of a stage's matrices that selective recompute of mlp multiplies with again."""
    if gang.recompute.granularity != "selective" or "mlp" not in gang.recompute.modules:
        return 0.0
    matrices = 3 if model.activation == "swiglu" else 2
    return stage.letters.count("-") * matrices * model.hidden_size * model.ffn_hidden_size / gang.parallel.tp / max(stage.matrices, 1)


def _tensor(stage: Stage, model: ModelConfig, gang: GangConfig) -> float:
    """Return the seconds of gather and scatter around each layer, forward and backward: 4 times the hidden state, over NVLink."""
    tp = gang.parallel.tp
    moved = 4 * 2 * model.hidden_size * (tp - 1) / tp * len(stage.letters)
    return TENSOR_EXPOSED * moved / _link(tp)


def _context(stage: Stage, model: ModelConfig, gang: GangConfig) -> float:
    """Return the seconds of passing keys and values forward, and with their gradients backward. A Mamba layer exchanges tokens for heads."""
    grid = gang.parallel
    if grid.cp == 1:
        return 0.0
    keys = 2 * model.num_query_groups * model.kv_channels * 2 / grid.tp
    moved = 3 * (grid.cp - 1) * keys * stage.letters.count("*")
    if model.mamba is not None:
        inner = model.mamba.num_heads * model.mamba.head_dim
        moved += 3 * 2 * 3 * inner / grid.tp * (grid.cp - 1) / grid.cp * stage.letters.count("M")
    return moved / _link(grid.tp * grid.cp)


def _link(span: int) -> float:
    """Return the bandwidth of one GPU in a group that spans `span` ranks: within a node, or between nodes."""
    return NVLINK_BYTES_S if span <= GPUS_PER_NODE else INFINIBAND_BYTES_S


def _once_a_step(stage: Stage, config: RunConfig, dp: int, pace: float, gpu: Gpu) -> tuple[float, float]:
    """Return the exposed seconds of gradients and weights, and the seconds of the optimizer.

    A ring over nodes uses the port of each of its GPUs in a node. Overlapped communication hides behind one microbatch's pass.
    """
    grid, replicas = config.parallel, dp * config.parallel.cp
    local = max(1, GPUS_PER_NODE // grid.tp)  # ranks of one ring within a node
    speed = NVLINK_BYTES_S if replicas <= local else min(NVLINK_BYTES_S, INFINIBAND_BYTES_S * local)
    share = (replicas - 1) / replicas
    gradients, weights = gradient_bytes(config) * stage.trainable * share / speed, 2.0 * stage.trainable * share / speed
    if grid.overlap_grad_reduce:
        gradients = max(0.0, gradients - pace * 2 / 3)
    if grid.overlap_param_gather:
        weights = max(0.0, weights - pace / 3)
    shard = stage.trainable / (replicas if grid.distributed_optimizer else 1)
    # main weights and moments read and written, gradients read (for their norm, then for the step), bf16 weights written
    moved = 18.0 + 4 * moment_bytes(config)
    update = moved * shard / (gpu.hbm_bytes_s * HBM)
    offloaded = config.offload.optimizer_fraction * 8.0 * shard / HOST_LINK_BYTES_S
    return gradients + weights, update + offloaded
