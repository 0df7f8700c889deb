"""Checks of the optimizer's section against the rest of a run and its machine: pure functions that return every problem."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prism.core.check.precision import Machine, Version
from megatron_prism.core.config import GangConfig, RunConfig
from megatron_prism.core.errors import Problem

MOMENTS = "optimizer.moments"
LEAST_TE: Version = (2, 3)  # the first whose FusedAdam has moments in bf16
LARGEST_DECAY = 1 - 2.0**-8  # nearer to 1, a moment that decays may be rounded back to where it was: bf16 has 8 bits


def check_moments(config: RunConfig) -> Iterator[Problem]:
    """Yield why the moments cannot be kept in the dtype that a run names.

    Source: megatron/core/optimizer/optimizer_config.py; transformer_engine/pytorch/optimizers/fused_adam.py; Megatron-LM's issue 1842.
    """
    kept = config.optimizer.moments
    if kept == "fp32":
        return
    if config.precision != "bf16":
        yield Problem(MOMENTS, f"{kept} with precision {config.precision}", "fp32, or precision bf16")
    if not config.parallel.distributed_optimizer:
        yield Problem(MOMENTS, kept, "parallel.distributed_optimizer true too", "Megatron-Core has them with that optimizer alone")
    if config.offload.optimizer_fraction > 0:
        found, fix = (
            f"{kept} with offload.optimizer_fraction {config.offload.optimizer_fraction:g}",
            "what is offloaded keeps its moments in fp32",
        )
        yield Problem(MOMENTS, found, "fp32, or offload.optimizer_fraction 0", fix)
    if config.fp8 is not None and config.fp8.param:
        yield Problem(MOMENTS, f"{kept} with fp8.param", "fp32, or fp8.param false", "no test of ours shows that such a run resumes")
    for name in ("beta1", "beta2"):
        decay = getattr(config.optimizer, name)
        if LARGEST_DECAY < decay < 1:
            fix = "above it bf16 rounds a moment that should decay back to itself, and it never falls"
            yield Problem(f"optimizer.{name}", f"{decay:g} with {MOMENTS} {kept}", f"at most {LARGEST_DECAY:g}, or fp32 moments", fix)


def check_adam(config: GangConfig, machine: Machine) -> Iterator[Problem]:
    """Yield what a rank's machine lacks for the moments that a run names. A gang that trains nothing has none."""
    if not isinstance(config, RunConfig) or config.optimizer.moments == "fp32":
        return
    kept = config.optimizer.moments
    if not machine.has_cuda:
        yield Problem(MOMENTS, f"{kept} on a machine without a CUDA device", "an NVIDIA GPU", "remove it to run here")
    elif machine.transformer_engine is not None and machine.transformer_engine < LEAST_TE:
        there, least = (".".join(map(str, version)) for version in (machine.transformer_engine, LEAST_TE))
        yield Problem(MOMENTS, f"{kept} with Transformer Engine {there}", f"Transformer Engine {least} or newer")
