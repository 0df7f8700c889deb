"""Megatron-Core's data-parallel wrapper and optimizer around the model chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_prism.core.config import GangConfig, OptimizerConfig, ParallelConfig
from megatron_prism.models.build import DTYPES


def wrap(chunks: Sequence[Any], gang: GangConfig) -> list[Any]:
    """Return the chunks inside Megatron's DistributedDataParallel: gradients summed over DP and CP, in parallel.grad_reduce.

    They are sums: what to divide them by, a whole number or not, is the objective's (step.forward_backward).
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    parallel = gang.parallel
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=gang.fp8 is not None and gang.fp8.param,
        grad_reduce_in_fp32=parallel.grad_reduce == "fp32",
    )
    config = chunks[0].config
    wrapped = [DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)]
    config.finalize_model_grads_func = _sum_gradients
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def build(chunks: Sequence[Any], optimizer: OptimizerConfig, gang: GangConfig) -> Any:
    """Return Megatron's AdamW over the wrapped chunks, with fp32 master weights under bf16.

    Biases and norms are not decayed (Megatron-Core's standard; the paper does not say). Moments in bf16, and what is offloaded, go the way of
    the precision-aware optimizer; what is offloaded stays in fp32. Its weights' remainders of 16 bits are never used: main weights are whole.
    """
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer

    fraction, is_bf16 = gang.offload.optimizer_fraction, gang.precision == "bf16"
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=0.0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=is_bf16,
        params_dtype=DTYPES[gang.precision],
        use_distributed_optimizer=gang.parallel.distributed_optimizer,
        overlap_param_gather=gang.parallel.overlap_param_gather,
        fp8_recipe=None if gang.fp8 is None else gang.fp8.recipe,
        optimizer_cpu_offload=fraction > 0,
        optimizer_offload_fraction=fraction,
        overlap_cpu_optimizer_d2h_h2d=fraction > 0,
        use_precision_aware_optimizer=fraction > 0 or optimizer.moments != "fp32",
        exp_avg_dtype=DTYPES[optimizer.moments],
        exp_avg_sq_dtype=DTYPES[optimizer.moments],
        store_param_remainders=False,
    )
    built = get_megatron_optimizer(settings, list(chunks))
    chunks[0].config.grad_scale_func = built.scale_loss if is_bf16 else None
    return built


def _sum_gradients(chunks: list[Any], num_tokens: torch.Tensor, **groups: Any) -> None:
    """Finalize the gradients as Megatron does, without its division by the number of tokens."""
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(chunks, None, **groups)


def set_rates(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Set the learning rate and the weight decay of every parameter group (megatron/core/optimizer_param_scheduler.py)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


@torch.no_grad()
def measure(optimizer: Any) -> Any:
    """Copy the reduced gradients to the optimizer, and return their norm over all ranks before clipping, as a float or a scalar tensor.

    It is inf where a loss scaler met NaN or inf. The weights do not move. Source: the first half of ChainedOptimizer.step
    (megatron/core/optimizer/optimizer.py).
    """
    has_overflow = optimizer.prepare_grads()
    return math.inf if has_overflow else optimizer.get_grad_norm()


@torch.no_grad()
def apply(optimizer: Any, grad_norm: Any, lr: float, weight_decay: float) -> None:
    """Clip the measured gradients and update the weights. Source: the second half of ChainedOptimizer.step.

    A step that is not to be taken is one where this is not called: measure leaves nothing in weights or moments, and the next
    forward_backward begins with gradients of zero.
    """
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    set_rates(optimizer, lr, weight_decay)
    for part in optimizer.chained_optimizers:
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            is_decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm, use_decoupled_grad=is_decoupled)
    optimizer.step_with_ready_grads()


@torch.no_grad()
def are_finite(chunks: Sequence[Any]) -> bool:
    """Return whether every weight of this rank is finite: a NaN or an inf makes the sum of its tensor NaN or inf."""
    sums = [parameter.sum(dtype=torch.float32) for chunk in chunks for parameter in chunk.parameters()]
    return bool(torch.stack(sums).isfinite().all())


@contextmanager
def settled(chunks: Sequence[Any], parallel: ParallelConfig) -> Iterator[None]:
    """Within the block all weights are up to date. Otherwise, under overlap_param_gather, they arrive with the next forward pass."""
    if not parallel.overlap_param_gather:
        yield
        return
    for chunk in chunks:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.enable_forward_pre_hook()
