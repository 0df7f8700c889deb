"""Granite's multipliers as scalars at run time: weights stay as they are on disk, so training, merging and analysis see the model's own.

attention: Megatron-Core's softmax_scale. residual: in the layer's residual addition. embedding and logits: a hook on the output
of the embedding and of the output layer (elementwise, so right on any vocabulary or sequence shard).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_prism.core.config import ModelConfig


def scaled_residual(scale: float) -> Callable[..., Any]:
    """Return a layer spec's residual addition: residual + scale * x, in place of get_bias_dropout_add.

    Source: megatron/core/fusions/fused_bias_dropout.py. Dropout is not applied: the models have none.
    """

    def get_add(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        def add(x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, prob: float) -> torch.Tensor:
            x, bias = x_with_bias
            assert prob == 0, "dropout beside a residual multiplier"
            return residual + scale * (x if bias is None else x + bias)

        return add

    return get_add


def scale_residuals(layer: Any, scale: float) -> None:
    """Put the scaled residual addition into a transformer layer's spec."""
    if scale != 1.0:
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = scaled_residual(scale)


def scale_ends(chunk: Any, model: ModelConfig, first: bool, last: bool) -> None:
    """Scale the embedding's output and divide the logits, on the chunks that hold them."""
    if first and model.embedding_multiplier != 1.0:
        chunk.embedding.register_forward_hook(lambda module, args, output: output * model.embedding_multiplier)
    if last and model.logits_scaling != 1.0:
        # a fused loss would read the output layer's weight and pass the hook by
        assert getattr(chunk.config, "cross_entropy_fusion_impl", "native") != "linear", "a fused linear loss beside logits_scaling"
        chunk.output_layer.register_forward_hook(lambda module, args, output: (output[0] / model.logits_scaling, output[1]))
