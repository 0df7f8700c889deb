"""Granite's multipliers, applied as scalars at run time. Weights stay as on disk, so training, merging and analysis see the model's own.

attention: Megatron-Core's softmax_scale. residual: in the layer's residual addition. embedding and logits: a hook on the output
of the embedding and of the output layer (elementwise, so correct on any vocabulary or sequence shard).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import InputError, Problem


def scaled_residual(scale: float) -> Callable[..., Any]:
    """Return a layer spec's residual addition: residual + scale * x, in place of get_bias_dropout_add.

    Dropout is not applied: the models have none. Source: megatron/core/fusions/fused_bias_dropout.py.
    """

    def get_add(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        def add(x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, prob: float) -> torch.Tensor:
            x, bias = x_with_bias
            assert prob == 0, "dropout beside a residual multiplier"
            return residual + scale * (x if bias is None else x + bias)

        return add

    return get_add


def residual_addition(scale: float) -> Callable[..., Any]:
    """Return the residual addition of a layer's spec: Megatron's own (with its fused kernels), or the scaled one."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    return get_bias_dropout_add if scale == 1.0 else scaled_residual(scale)


def scale_ends(chunk: Any, model: ModelConfig, first: bool, last: bool) -> None:
    """Scale the embedding's output and divide the logits, on the chunks that hold them.

    Raises: InputError under a fused linear loss, which reads the output layer's weight and bypasses the hook.
    """
    if first and model.embedding_multiplier != 1.0:
        chunk.embedding.register_forward_hook(lambda module, args, output: output * model.embedding_multiplier)
    if last and model.logits_scaling != 1.0:
        if chunk.config.cross_entropy_loss_fusion and chunk.config.cross_entropy_fusion_impl == "linear":
            fix = "use cross_entropy_fusion_impl native or te, which work on the scaled logits"
            raise InputError(
                Problem("cross_entropy_fusion_impl", "linear", f"the logits divided by logits_scaling {model.logits_scaling}", fix)
            )
        chunk.output_layer.register_forward_hook(lambda module, args, output: (output[0] / model.logits_scaling, output[1]))
