"""What an RL run's config is for NeMo-Aligner, and what of it NeMo-Aligner cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_prism.core.check.train import EXTENDS
from megatron_prism.core.config import RLConfig
from megatron_prism.core.config.grade import GradeConfig
from megatron_prism.core.errors import Problem
from megatron_prism.data.prompts import FILE

MAX_ROLLOUT_MICRO_BATCH = 8
# Keys that change nothing there, and what is done in their place.
NOT_CARRIED = (
    "algorithm.clip_low, clip_high, tis_cap: a step has one update, and nothing corrects the sampler's log-probabilities",
    "algorithm.kl_estimator: the mean of |log policy - log reference| lowers the reward of the whole response",
    "optimizer.beta1, beta2, eps, weight_decay: those of NeMo-Aligner's own config",
    "rollout.num_rows, recompute, logits_chunk_tokens, gc_interval, guard, limits, log, save.keep_last, keep_every, background: no part in it",
)


def values(config: RLConfig, gpus_per_node: int, out: Path) -> dict[str, Any]:
    """Return the keys of AlignerConfig that follow from an RL config without problems. out: the folder to be written."""
    rollout, grid, place = config.rollout, config.parallel, out.resolve()
    assert config.world_size is not None and config.init.checkpoint is not None
    validation = config.validation.prompts
    ranks = config.world_size // grid.tp  # resharded, the ranks of a pipeline sample on their own
    sizes = [size for size in range(1, MAX_ROLLOUT_MICRO_BATCH + 1) if rollout.num_prompts % (size * ranks) == 0]
    return {
        "checkpoint": str(config.init.checkpoint),
        "nemo": str(place / "model.nemo"),
        "results": str(place / "results"),
        "prompts": str(config.prompts / FILE),
        "validation_prompts": None if validation is None else str(validation / FILE),
        "num_nodes": config.world_size // gpus_per_node,
        "tp": grid.tp,
        "pp": grid.pp,
        "kl": config.algorithm.kl_beta,
        "num_prompts": rollout.num_prompts,
        "num_samples": rollout.num_samples,
        "steps": config.steps,
        "lr": config.optimizer.lr,
        "seq_length": config.batch.seq_length,
        "max_prompt_tokens": config.batch.seq_length - rollout.max_tokens,
        "micro_batch_size": config.batch.micro_size,
        "rollout_micro_batch_size": max(sizes, default=1),
        "validation_interval": config.validation.interval or config.steps,
        "save_interval": config.save.interval or config.steps,
        "seed": config.seed,
    }


def problems(config: RLConfig, gpus_per_node: int) -> Iterator[Problem]:
    """Yield each key whose value NeMo-Aligner 0.7.0, or the export for it, has no equal of."""
    yield from _placement_problems(config, gpus_per_node)
    yield from _algorithm_problems(config)
    grid, schedule = config.parallel, config.schedule
    only: tuple[tuple[str, Any, Any], ...] = (
        ("mode", config.mode, "all"),
        ("rollout.lag", config.rollout.lag, 0),
        ("rollout.max_refills", config.rollout.max_refills, 0),
        ("batch.num_minibatches", config.batch.num_minibatches, 1),
        ("parallel.cp", grid.cp, 1),
        ("parallel.vpp", grid.vpp, None),
        ("precision", config.precision, "bf16"),
        ("fp8", config.fp8, None),
        ("offload.optimizer_fraction", config.offload.optimizer_fraction, 0.0),
        ("trainable", config.trainable, ("*",)),
        *((f"init.{key}", getattr(config.init, key), None) for key in EXTENDS),
        ("optimizer.clip_grad", config.optimizer.clip_grad, 1.0),
        ("schedule.kind", schedule.kind, "linear"),
        ("schedule.warmup_steps", schedule.warmup_steps, 0),
        ("schedule.final_factor", schedule.final_factor, 0.0),
        ("grade", config.grade, GradeConfig()),
    )
    for where, found, required in only:
        if found != required:
            yield Problem(where, str(found), f"{required} under nemo_aligner")


def _placement_problems(config: RLConfig, gpus_per_node: int) -> Iterator[Problem]:
    if config.init.checkpoint is None:
        yield Problem("init.checkpoint", "no value", "a checkpoint: NeMo-Aligner starts from its weights as a .nemo")
    if config.world_size is None or gpus_per_node < 1 or config.world_size % gpus_per_node:
        yield Problem("world_size", str(config.world_size), f"a multiple of the cluster's gpus_per_node {gpus_per_node}")


def _algorithm_problems(config: RLConfig) -> Iterator[Problem]:
    algorithm, reference = config.algorithm, config.reference
    if algorithm.advantage != "rloo":
        fix = "algorithm.advantage=rloo, which is not the paper's GRPO, or prism rl without --backend"
        yield Problem("algorithm.advantage", algorithm.advantage, "rloo: NeMo-Aligner has no other baseline", fix)
    if algorithm.loss != "clip":
        yield Problem("algorithm.loss", algorithm.loss, "clip, which with one update a step is REINFORCE")
    if algorithm.normalization != "token":
        yield Problem("algorithm.normalization", algorithm.normalization, "token")
    if algorithm.overlong != "none":
        yield Problem("algorithm.overlong", algorithm.overlong, "none: a response that did not end is left out of the baseline there")
    for name in ("stop_penalty", "repetition_penalty"):
        if getattr(algorithm, name):
            yield Problem(f"algorithm.{name}", str(getattr(algorithm, name)), "0: the reward server answers 1 or 0")
    if algorithm.kl_beta > 0 and reference.interval:
        fix = "reference.interval=0, which is not the paper's soft update"
        yield Problem("reference.interval", str(reference.interval), "0: its reference is the policy that the run began with", fix)
