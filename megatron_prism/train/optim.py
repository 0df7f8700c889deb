"""Megatron-Core's data-parallel wrapper and optimizer around the model chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_prism.core.config import GangConfig, OptimizerConfig, ParallelConfig
from megatron_prism.models.build import DTYPES


def wrap(chunks: Sequence[Any], gang: GangConfig) -> list[Any]:
    """Return the chunks inside Megatron's DistributedDataParallel: gradients summed in fp32, over DP and CP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    parallel = gang.parallel
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=gang.fp8 is not None and gang.fp8.param,
        grad_reduce_in_fp32=True,
    )
    config = chunks[0].config
    wrapped = [DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)]
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def build(chunks: Sequence[Any], optimizer: OptimizerConfig, gang: GangConfig) -> Any:
    """Return Megatron's AdamW over the wrapped chunks, with fp32 master weights under bf16.

    Biases and norms are not decayed (Megatron-Core's standard; the paper does not say). What is offloaded goes the way of the
    precision-aware optimizer, as Megatron-LM's arguments.py wants it; its states stay in fp32.
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
        use_precision_aware_optimizer=fraction > 0,
    )
    built = get_megatron_optimizer(settings, list(chunks))
    chunks[0].config.grad_scale_func = built.scale_loss if is_bf16 else None
    return built


def set_rates(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Set the learning rate and the weight decay of every parameter group (megatron/core/optimizer_param_scheduler.py)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def update(optimizer: Any, accept: Callable[[float], bool]) -> tuple[float, bool]:
    """Run Megatron-Core's optimizer step; once the gradients are summed and measured, `accept(gradient norm)` says whether it is taken.

    Returns the gradient norm before clipping, and whether the weights moved. Source: ChainedOptimizer.step (megatron/core/optimizer/optimizer.py).
    """
    measure, step, found = optimizer.get_grad_norm, optimizer.step_with_ready_grads, [0.0, False]

    def measured() -> float:
        found[0] = norm = measure()
        found[1] = accept(float(norm))
        return norm

    optimizer.get_grad_norm = measured
    optimizer.step_with_ready_grads = lambda: step() if found[1] else False
    try:
        optimizer.step()
    finally:
        del optimizer.get_grad_norm, optimizer.step_with_ready_grads  # the class's own again
    return float(found[0]), bool(found[1])


@torch.no_grad()
def are_finite(chunks: Sequence[Any]) -> bool:
    """Say whether every weight of this rank is a number: a NaN or an infinity makes the sum of its tensor one."""
    sums = [parameter.sum(dtype=torch.float32) for chunk in chunks for parameter in chunk.parameters()]
    return bool(torch.stack(sums).isfinite().all())


@contextmanager
def settled(chunks: Sequence[Any], parallel: ParallelConfig) -> Iterator[None]:
    """Hold the weights still and whole: under overlap_param_gather they else arrive with the next forward pass."""
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
