"""Memory of a rank by use: arithmetic on its stage's parameters, layers and microbatches in flight.

Weights, gradients and optimizer follow Megatron-Core's buffers exactly, except for padding. Activations are what each layer keeps for
its backward pass under Transformer Engine, flash attention and mamba_ssm's memory-efficient scan. They are read from the sources, not
measured.
Source: Korthikanti et al. 2022 (arXiv 2205.05198), section 4, here for grouped queries, RMSNorm, SwiGLU or squared ReLU, and Mamba-2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from megatron_prism.core.check.model import padded_vocab_size
from megatron_prism.core.config import GangConfig, ModelConfig, RecomputeConfig, RunConfig, TrainConfig
from megatron_prism.planning.gpus import GIB
from megatron_prism.planning.stage import Stage

CONTEXT_GIB = 2.0  # CUDA context, kernels, cuBLAS and Transformer Engine workspaces: an allowance, not measured
GROUP_GIB = 0.4  # NCCL's buffers, for each kind of communication of a rank: an allowance
FRAGMENTATION = 0.05  # of the memory that is allocated and freed, under expandable_segments: an allowance


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank. working: the logits, or one layer's temporary memory, beside the kept activations."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    allowance: float

    @property
    def total(self) -> float:
        return sum(getattr(self, item.name) for item in fields(self))


def of_stage(stage: Stage, index: int, model: ModelConfig, config: TrainConfig, dp: int) -> Memory:
    """Return the memory of a rank of pipeline stage `index`, with `dp` ranks of data parallelism."""
    grid = config.parallel
    microbatches = config.batch.global_size // (config.batch.micro_size * dp)
    activations = kept_by_stage(stage, model, config) * in_flight(config, index, microbatches)
    working = max(_logits(model, config) if stage.is_last else 0.0, _layer_working(stage, model, config))
    groups = sum(size > 1 for size in (dp * grid.cp, grid.tp, grid.pp, grid.cp))
    allowance = (CONTEXT_GIB + GROUP_GIB * groups) * GIB + FRAGMENTATION * (activations + working)
    return Memory(*_states(stage, config, dp * grid.cp), activations, working, allowance)


def moment_bytes(config: RunConfig) -> float:
    """Return the bytes of one value of a moment, in memory and in a checkpoint."""
    return 4.0 if config.optimizer.moments == "fp32" else 2.0


def gradient_bytes(config: RunConfig) -> float:
    """Return the bytes of one gradient, in memory and where ranks add theirs up."""
    return 4.0 if config.precision == "fp32" or config.parallel.grad_reduce == "fp32" else 2.0


def _states(stage: Stage, config: RunConfig, replicas: int) -> tuple[float, float, float]:
    """Return the bytes of weights, gradients and optimizer.

    bf16: 2 per weight, plus FP8 copies of 1 byte each way (under fp8.param: the FP8 copies only). Gradients are of parallel.grad_reduce. The optimizer holds
    fp32 weights and AdamW's two moments (optimizer.moments), which the distributed optimizer divides over data and context parallelism. Frozen parameters have
    only weights.
    """
    shards = replicas if config.parallel.distributed_optimizer else 1
    on_gpu = 1 - config.offload.optimizer_fraction
    if config.precision == "fp32":
        return 4.0 * stage.parameters, 4.0 * stage.trainable, 8.0 * stage.trainable / shards * on_gpu
    weights, gradient = 2.0 * stage.parameters + 2.0 * stage.fp8, gradient_bytes(config)
    if config.fp8 is not None and config.fp8.param:
        weights -= 2.0 * stage.fp8
    return weights, gradient * stage.trainable, (4.0 + 2 * moment_bytes(config)) * stage.trainable / shards * on_gpu


def in_flight(gang: GangConfig, index: int, microbatches: int) -> float:
    """Return the number of microbatches whose activations a stage holds at its peak. One chunk's activations count as a fraction.

    1F1B: pp - index. Interleaved: 2 (pp - index - 1) + (vpp - 1) pp + 1 chunks of vpp (megatron/core/pipeline_parallel/schedules.py).
    """
    pp, vpp = gang.parallel.pp, gang.parallel.vpp
    if vpp is None:
        return float(min(pp - index, microbatches))
    return min(2 * (pp - index - 1) + (vpp - 1) * pp + 1, microbatches * vpp) / vpp


def tokens_of_rank(config: TrainConfig) -> float:
    """Return the number of tokens of a microbatch on a rank."""
    return config.batch.micro_size * config.data.seq_length / config.parallel.cp


def kept_by_stage(stage: Stage, model: ModelConfig, config: TrainConfig) -> float:
    """Return the bytes that a stage's layers keep for the backward pass of one microbatch."""
    tokens = tokens_of_rank(config)
    whole = sum(kept_by_layer(letter, model, config) for letter in stage.letters) * tokens
    recompute, layers = config.recompute, len(stage.letters) / 2  # a dense layer is two letters; only dense models recompute whole layers
    if recompute.granularity == "full":
        count = layers if recompute.num_layers is None else min(recompute.num_layers * (config.parallel.vpp or 1), layers)
        inputs = _element(config) * model.hidden_size / _sequence_split(config) * tokens
        return whole * (1 - count / layers) + inputs * count
    if config.offload.activation_layers:
        return whole * (1 - min(config.offload.activation_layers, layers) / layers)
    return whole


def kept_by_layer(letter: str, model: ModelConfig, gang: GangConfig) -> float:
    """Return the bytes per token that a layer keeps on a rank: input and norm, then what tensor parallelism splits.

    A linear layer keeps its input, in 1 byte under FP8. Selective recompute of core_attn frees only flash attention's sums; of mlp it frees
    all but the input.
    """
    tp, element, linear = gang.parallel.tp, _element(gang), 1.0 if gang.fp8 is not None else _element(gang)
    ends = (element + linear) * model.hidden_size / _sequence_split(gang)
    if letter == "M":
        return ends + _kept_by_mixer(model, element, linear) / tp
    modules = gang.recompute.modules if gang.recompute.granularity == "selective" else ()
    if letter == "-" and "mlp" in modules:
        return ends
    if letter == "-":
        outputs = 2 if model.activation == "swiglu" else 1  # gate and up are both outputs of the first matrix
        return ends + (element * outputs + linear) * model.ffn_hidden_size / tp
    queries, keys = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    output = element + (linear if linear < element else 0)  # attention keeps its output; under FP8 the next layer keeps its own copy
    sums = 0 if "core_attn" in modules else 4 * model.num_attention_heads
    return ends + (element * (queries + 2 * keys) + output * queries + sums) / tp


def _kept_by_mixer(model: ModelConfig, element: float, linear: float) -> float:
    """Count in_proj's output, the scan's output before and after its gate, and out_proj's input. Convolution and states are recomputed."""
    assert model.mamba is not None
    inner, states = model.mamba.num_heads * model.mamba.head_dim, model.mamba.num_groups * model.mamba.state_dim
    projected = 2 * inner + 2 * states + model.mamba.num_heads
    return element * (projected + 2 * inner) + linear * inner


def _logits(model: ModelConfig, config: TrainConfig) -> float:
    """Return the bytes of the loss: logits, their fp32 softmax in place, and one more copy under padding or Granite's scale."""
    rows = padded_vocab_size(model.vocab_size, config.parallel.tp)
    copies = (model.logits_scaling != 1.0) + (rows > model.vocab_size)
    tokens = min(tokens_of_rank(config), config.logits_chunk_tokens or math.inf)
    return (_element(config) * (1 + copies) + 4) * rows / config.parallel.tp * tokens


def _layer_working(stage: Stage, model: ModelConfig, config: TrainConfig) -> float:
    """Return the temporary bytes of the backward pass: the largest layer's gradients, and the recomputed activations of one layer."""
    plain = replace(config, recompute=RecomputeConfig())
    kinds = sorted(set(stage.letters))
    kept = [kept_by_layer(letter, model, plain) for letter in kinds]
    again = sum(kept) - (0.0 if config.recompute.granularity == "full" else sum(kept_by_layer(letter, model, config) for letter in kinds))
    gathered = 2 * _element(config) * model.hidden_size * (config.parallel.tp > 1)  # the whole sequence, and its gradient
    states = 0.0
    if "M" in stage.letters and model.mamba is not None:  # the states of each chunk of tokens, recomputed in fp32, and their gradients
        inner = model.mamba.num_heads * model.mamba.head_dim / config.parallel.tp
        states = 8.0 * inner * model.mamba.state_dim / model.mamba.chunk_size + 2 * _element(config) * inner
    return (again + max(kept) + gathered + states) * tokens_of_rank(config)


def _sequence_split(gang: GangConfig) -> int:
    return gang.parallel.tp if gang.parallel.sequence_parallel else 1


def _element(gang: GangConfig) -> float:
    return 4.0 if gang.precision == "fp32" else 2.0
