"""Transformer Engine's FusedAdam on a host: its own Python class, over multi-tensor functions written here in torch.

Megatron-Core is imported without Transformer Engine, so its layers stay its own; the optimizer alone is Transformer Engine's, as on a GPU.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import standin
import torch

from megatron_prism.parallel import host

Tensors = list[torch.Tensor]
MODELS = (
    "megatron.core.extensions.transformer_engine",
    "megatron.core.transformer.attention",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.mamba.mamba_layer_specs",
)


def adam(
    chunk: int,
    flag: Any,
    lists: list[Tensors],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    corrects: int,
    decay: float,
) -> None:
    """Do what tex.multi_tensor_adam does: AdamW in fp32 on [gradients, weights, moments, second moments, main weights or none], in place."""
    assert mode == 1 and corrects == 1
    for gradient, weight, first, second, *main in zip(*lists, strict=True):
        whole, grad = main[0] if main else weight, gradient.float()
        assert first.dtype == second.dtype == whole.dtype == torch.float32  # before 2.13 moments in bf16 come as copies in fp32
        first.mul_(beta1).add_(grad, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
        whole.sub_(lr * (update + decay * whole))
        if main:
            weight.copy_(whole)


def install() -> None:
    """Let the optimizers of this process, and of those that it forks, be FusedAdam; and a run believe in the machine that it asks for."""
    host.install()
    for name in MODELS:
        importlib.import_module(name)  # each looks for Transformer Engine once
    standin.bring(Path(sys.prefix) / "transformer_engine_python")
    vars(sys.modules["transformer_engine_torch"])["multi_tensor_adam"] = adam
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer, optimizer_config
    from transformer_engine.pytorch.optimizers import FusedAdam

    from megatron_prism.jobs import train

    optimizers.Adam = distrib_optimizer.Adam = FusedAdam
    optimizers.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    for module in (optimizers, optimizer_config):
        module.is_te_min_version = lambda *args, **more: True
    train.check_adam = lambda *args: []  # type: ignore[assignment]
