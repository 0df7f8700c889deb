"""Checks between the values of an RL config: pure functions that return every problem, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prism.core.check import precision
from megatron_prism.core.check.algorithm import check_algorithm
from megatron_prism.core.check.gang import check_model_on_gang
from megatron_prism.core.check.model import check_architecture
from megatron_prism.core.check.train import check_course, check_run
from megatron_prism.core.config import ModelConfig, RLConfig
from megatron_prism.core.errors import Problem


def check_rl(config: RLConfig, world_size: int) -> list[Problem]:
    """Return the problems of an RL config's values on `world_size` ranks, and between them."""
    return [
        *check_run(config, world_size),
        *check_algorithm(config.algorithm, config.parallel.cp, config.rollout.max_tokens),
        *_check_rollout(config),
        *_check_parts(config),
        *check_course(config),
    ]


def _check_rollout(config: RLConfig) -> Iterator[Problem]:
    rollout = config.rollout
    if rollout.temperature != 1.0:
        fix = "the ratio of trainer and sampler would compare two distributions"
        yield Problem("rollout.temperature", str(rollout.temperature), "1", fix)
    if rollout.lag and config.algorithm.tis_cap is None:
        required = "a cap: responses of older weights are weighted by truncated importance sampling"
        yield Problem("algorithm.tis_cap", f"null under rollout.lag {rollout.lag}", required, "for example 2 (paper)")
    reference, still = config.reference, 0.5
    if config.algorithm.kl_beta and reference.interval and config.precision == "bf16" and 0 < reference.alpha <= still:
        required = f"more than {still} in bf16: a smaller part of the last bit is rounded away, and the reference never moves"
        yield Problem("reference.alpha", str(reference.alpha), required, "a larger one at a longer reference.interval, or precision fp32")
    if rollout.num_samples == 1 and config.algorithm.advantage != "reinforce++":
        yield Problem("rollout.num_samples", "1", "at least 2: an advantage compares the responses to a prompt, or advantage reinforce++")
    if rollout.max_tokens >= config.batch.seq_length:
        yield Problem(
            "rollout.max_tokens",
            str(rollout.max_tokens),
            f"less than batch.seq_length {config.batch.seq_length}, which holds the prompt too",
        )
    if config.log.samples:
        yield Problem("log.samples", "true", "false", "an RL run keeps its responses: rollout.keep")


def _check_parts(config: RLConfig) -> Iterator[Problem]:
    """Yield what does not go together where a run does only a part of its work."""
    rollout = config.rollout
    if rollout.only and rollout.recorded is not None:
        yield Problem("rollout.only, rollout.recorded", "both", "one of them: a run that neither samples nor trains has nothing to do")
    if rollout.only and config.record.interval:
        yield Problem(
            "record.interval",
            str(config.record.interval),
            "0 beside rollout.only, which trains nothing",
            "the responses are kept in rollouts/",
        )
    if rollout.recorded is not None and config.validation.prompts is not None:
        yield Problem("validation.prompts", str(config.validation.prompts), "null beside rollout.recorded: nothing is sampled")
    if rollout.recorded is not None and rollout.recorded.resolve() == config.run_dir.resolve():
        yield Problem(
            "rollout.recorded", str(rollout.recorded), "another run's folder", "to compute a run's own step again: prism rl replay"
        )


def check_model(model: ModelConfig, config: RLConfig) -> list[Problem]:
    """Return the problems between an architecture and the RL config that trains it."""
    where = "batch.micro_size x batch.seq_length (tokens of a microbatch)"
    tokens = precision.check_tokens(config, config.batch.micro_size * config.batch.seq_length, where)
    return [*check_model_on_gang(model, config), *tokens, *check_architecture(model)]
