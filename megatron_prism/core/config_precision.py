"""The parts of a training config that only Transformer Engine and a GPU can do: FP8, and offloading to the host's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_prism.core.section import Section


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
