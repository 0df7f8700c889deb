"""How a gang of ranks computes: the rank grid, precision, recompute, FP8, offloading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_prism.core.config.section import Section

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """The rank grid; data parallelism is what the world size leaves over.

    vpp is the number of model chunks a pipeline rank holds (interleaved 1F1B); None means one. distributed_optimizer
    shards the optimizer over data parallelism; a run keeps it as it began.
    cp_comm_type is how attention passes keys and values between context-parallel ranks on a GPU, in Megatron-Core's words;
    under a2a+p2p, groups of cp_a2a_size neighbours exchange heads (a2a), and the groups keys and values (p2p).
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    cp_a2a_size: int | None = None
    vpp: int | None = None
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @property
    def cp_sizes(self) -> list[int] | None:
        """The ranks of an a2a and of a p2p group under a2a+p2p, else None."""
        return None if self.cp_a2a_size is None else [self.cp_a2a_size, self.cp // self.cp_a2a_size]


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig(Section):
    """Activation recompute: `full` recomputes whole layers (the first num_layers of a stage; None: all of them), `selective` their modules.

    modules: Megatron-Core's names. core_attn, its default, saves much with unfused attention and next to nothing with Transformer Engine's.
    """

    granularity: Literal["none", "selective", "full"] = "none"
    num_layers: int | None = None
    modules: tuple[Literal["core_attn", "mlp"], ...] = ("core_attn",)


@dataclass(frozen=True, kw_only=True)
class FP8Config(Section):
    """FP8 in the matrix products of Transformer Engine's linear layers; embedding, norms, attention and output layer stay in bf16.

    recipe: where a scale comes from: a tensor's own maximum (tensorwise, NVIDIA's choice on H100), its maxima in earlier steps (delayed),
    the maximum of a block of 128 (blockwise). format: hybrid is e4m3 forward, e5m2 backward. amax_history_len, amax_compute_algo and
    margin belong to delayed; their defaults are Transformer Engine's (Megatron-Core's, 1 and most_recent, follow every outlier).
    num_layers_at_start_in_bf16, num_layers_at_end_in_bf16: layers that stay in bf16. param: hold the layers' weights in FP8 too.
    """

    recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    format: Literal["hybrid", "e4m3"] = "hybrid"
    amax_history_len: int = 1024
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    margin: int = 0
    num_layers_at_start_in_bf16: int = 0
    num_layers_at_end_in_bf16: int = 0
    param: bool = False


@dataclass(frozen=True, kw_only=True)
class OffloadConfig(Section):
    """What rests in the host's memory: this fraction of the optimizer (its state and its arithmetic), the activations of so many layers."""

    optimizer_fraction: float = 0.0
    activation_layers: int = 0
