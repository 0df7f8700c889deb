"""How a gang of ranks computes: the rank grid, precision, recompute, FP8, offloading, the environment. Every job on GPUs shares these keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_prism.core.config.section import MAY_CHANGE, Range, Section

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """The rank grid. The data parallel size is the world size divided by tp, pp and cp."""

    tp: Annotated[int, Range(ge=1), MAY_CHANGE] = 1
    """Tensor parallel size."""

    pp: Annotated[int, Range(ge=1), MAY_CHANGE] = 1
    """Pipeline parallel size."""

    cp: Annotated[int, Range(ge=1), MAY_CHANGE] = 1
    """Context parallel size: each rank holds a part of every sequence."""

    cp_comm_type: Annotated[Literal["p2p", "all_gather", "a2a", "a2a+p2p"], MAY_CHANGE] = "p2p"
    """How attention passes keys and values between context-parallel ranks on a GPU, by Megatron-Core's names."""

    cp_a2a_size: Annotated[int | None, Range(ge=1), MAY_CHANGE] = None
    """Under a2a+p2p: groups of this many neighbours exchange heads (a2a), and the groups exchange keys and values (p2p)."""

    vpp: Annotated[int | None, Range(ge=2, fix="remove it for plain 1F1B"), MAY_CHANGE] = None
    """The number of model chunks that a pipeline rank holds (interleaved 1F1B). Null: one chunk."""

    sequence_parallel: Annotated[bool, MAY_CHANGE] = False
    """Split the activations between tensor-parallel layers along the sequence. It needs tp above 1."""

    distributed_optimizer: bool = True
    """Shard the optimizer over data parallelism. A run keeps this as it began."""

    overlap_grad_reduce: Annotated[bool, MAY_CHANGE] = False
    """Reduce gradients while the backward pass still runs."""

    overlap_param_gather: Annotated[bool, MAY_CHANGE] = False
    """Gather the updated weights while the next forward pass runs. It needs distributed_optimizer and overlap_grad_reduce."""

    grad_reduce: Annotated[Literal["fp32", "bf16"], MAY_CHANGE] = "fp32"
    """The dtype in which gradients are summed over microbatches and ranks. bf16 takes half the memory and messages, and rounds each sum."""

    @property
    def cp_sizes(self) -> list[int] | None:
        """The ranks of an a2a and of a p2p group under a2a+p2p, else None."""
        return None if self.cp_a2a_size is None else [self.cp_a2a_size, self.cp // self.cp_a2a_size]


@dataclass(frozen=True, kw_only=True)
class FusionConfig(Section):
    """Kernels that do several operations in one. What has not been measured on a GPU is off."""

    cross_entropy: Literal["none", "native", "te"] = "none"
    """The loss from the logits, by Megatron-Core's names: `native` is its compiled one, whose gradient is in bf16, `te` is Transformer Engine's
    on a GPU. Both divide by Granite's scale and mask the vocabulary's padding before, as `none` does."""

    gradient_accumulation: bool | None = None
    """Add a weight's gradient to its sum within the matrix product, by Transformer Engine's layers on a GPU. The output layer needs apex's
    kernel, and is left out without it. Null: where apex is installed."""


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig(Section):
    """Activation recompute: the backward pass computes activations again that the forward pass did not keep."""

    granularity: Literal["none", "selective", "full"] = "none"
    """`full` recomputes whole layers, `selective` some modules of each layer."""

    num_layers: Annotated[int | None, Range(ge=1)] = None
    """Under full: recompute this many first layers of a pipeline stage. Null: all of them."""

    modules: tuple[Literal["core_attn", "mlp"], ...] = ("core_attn",)
    """Under selective: Megatron-Core's names. core_attn saves much with unfused attention and next to nothing with Transformer Engine's."""


@dataclass(frozen=True, kw_only=True)
class FP8Config(Section):
    """FP8 in the matrix products of Transformer Engine's linear layers. Embedding, norms, attention and output layer stay in bf16."""

    recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """Where a scale comes from: the tensor's own maximum (tensorwise, NVIDIA's choice on H100), its maxima in earlier steps (delayed),
    the maximum of a block of 128 (blockwise). mxfp8 needs Blackwell and is refused."""

    format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid is e4m3 in the forward pass and e5m2 in the backward pass."""

    amax_history_len: Annotated[int, Range(ge=1)] = 1024
    """Under delayed: the number of steps whose maxima count. The default is Transformer Engine's; Megatron-Core's, 1, follows every outlier."""

    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """Under delayed: which of those maxima counts. The default is Transformer Engine's; Megatron-Core's, most_recent, follows every outlier."""

    margin: Annotated[int, Range(ge=0)] = 0
    """Under delayed: scales are smaller by this power of two. The default is Transformer Engine's."""

    num_layers_at_start_in_bf16: Annotated[int, Range(ge=0)] = 0
    """This many first layers stay in bf16."""

    num_layers_at_end_in_bf16: Annotated[int, Range(ge=0)] = 0
    """This many last layers stay in bf16."""

    param: bool = False
    """Hold the layers' weights in FP8 too. Only for runs from scratch."""


@dataclass(frozen=True, kw_only=True)
class OffloadConfig(Section):
    """What is kept in the host's memory instead of the GPU's."""

    optimizer_fraction: Annotated[float, Range(ge=0, le=1)] = 0.0
    """This fraction of the optimizer: its state and its arithmetic. It needs parallel.distributed_optimizer."""

    activation_layers: Annotated[int, Range(ge=0), MAY_CHANGE] = 0
    """The number of layers whose activations are offloaded. Only for dense models, without pipeline parallelism and recompute."""


@dataclass(frozen=True, kw_only=True)
class GangConfig(Section):
    """How a gang of ranks computes. Its keys are at the top level of the YAML of every job that runs on a gang."""

    world_size: Annotated[int | None, Range(ge=1), MAY_CHANGE] = None
    """The number of ranks of the run, one GPU each. A gang of another size is refused. Null: any size."""

    seed: Annotated[int, Range(ge=0, lt=2**32, fix="numpy takes no other")] = 1234
    """The seed of the data's order, and of randomly initialised weights."""

    precision: Precision = "bf16"
    """The dtype of weights and activations. Under bf16 the optimizer's weights and the gradients are in fp32."""

    attention_backend: Annotated[Literal["auto", "unfused"], MAY_CHANGE] = "auto"
    """On a GPU: `auto` is the fused attention that Transformer Engine chooses (flash-attn or cuDNN), and a run of sequences of 1,024 tokens and
    more for which it has none is refused. `unfused` takes its slow one."""

    cuda_graphs: Annotated[bool, MAY_CHANGE] = False
    """Capture each layer in a CUDA graph after the first step, and replay it: fewer launches, where these set the pace. For `prism train` on a GPU,
    with all parameters trained, without pipeline parallelism, masked documents, offloading and full recompute. It has never run on a GPU."""

    logits_chunk_tokens: Annotated[int | None, Range(ge=1), MAY_CHANGE] = None
    """Compute logits and loss of this many of a rank's tokens at a time, and again in the backward pass, so that their memory does not grow
    with the sequence. Null: of all tokens at once."""

    deterministic: Annotated[bool, MAY_CHANGE] = False
    """Make torch, Megatron-Core, cuBLAS, NCCL and Transformer Engine deterministic: the same ranks give the same bits."""

    environment: Annotated[dict[str, str], MAY_CHANGE] = field(default_factory=dict)
    """Variables for NCCL, CUDA, torch and Transformer Engine. They override those that follow from the config (parallel/environment.py)."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    recompute: Annotated[RecomputeConfig, MAY_CHANGE] = field(default_factory=RecomputeConfig)

    fusion: Annotated[FusionConfig, MAY_CHANGE] = field(default_factory=FusionConfig)

    fp8: FP8Config | None = None
    """Null: no FP8. `fp8: {}` is FP8 with the defaults below."""

    offload: OffloadConfig = field(default_factory=OffloadConfig)
