"""Checks between the values of an RL config: pure functions that return every problem, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prism.core.check import precision
from megatron_prism.core.check.algorithm import check_algorithm
from megatron_prism.core.check.gang import check_model_on_gang
from megatron_prism.core.check.model import check_architecture
from megatron_prism.core.check.train import check_course, check_run, check_sampler
from megatron_prism.core.config import ModelConfig, RLConfig
from megatron_prism.core.errors import Problem

ROLLOUTS = "rollouts"  # of a run: the responses of each step, where they are kept


def check_rl(config: RLConfig, world_size: int) -> list[Problem]:
    """Return the problems of an RL config's values on `world_size` ranks, and between them."""
    return [
        *check_run(config, world_size),
        *check_algorithm(config.algorithm, config.parallel.cp, config.rollout.max_tokens),
        *_check_rollout(config),
        *_check_mode(config),
        *check_course(config),
    ]


def _check_rollout(config: RLConfig) -> Iterator[Problem]:
    rollout = config.rollout
    yield from check_sampler(config.init, rollout.engine)
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
    if config.batch.num_minibatches > rollout.num_prompts:
        required = f"at most rollout.num_prompts {rollout.num_prompts}: a minibatch has whole groups"
        yield Problem("batch.num_minibatches", str(config.batch.num_minibatches), required)
    if rollout.max_refills and (config.algorithm.keep_zero_variance or config.algorithm.advantage == "reinforce++"):
        cause = "keep_zero_variance" if config.algorithm.keep_zero_variance else "advantage reinforce++"
        fix = "groups are drawn again for those without variance, and all of them are kept"
        yield Problem("rollout.max_refills", f"{rollout.max_refills} with algorithm.{cause}", "0", fix)
    if config.validation.interval and config.validation.prompts is None:
        required = "0, or validation.prompts: without them nothing is validated"
        yield Problem("validation.interval", str(config.validation.interval), required, "name held-out prompts, or leave the interval out")
    if config.log.samples:
        yield Problem("log.samples", "true", "false", "an RL run keeps its responses: rollout.keep")


def _check_mode(config: RLConfig) -> Iterator[Problem]:
    """Yield what a run that does only a part of its work has no use for, and what that part needs."""
    validation = ("validation.prompts", config.validation.prompts, "null, with validation.interval 0")
    lag, record = ("rollout.lag", config.rollout.lag, "0"), ("record.interval", config.record.interval, "0")
    unused, why = {
        "all": ((), ""),
        "rollout": ((lag, validation, record), "the weights do not change, and the responses are kept in rollouts/"),
        "train": ((validation,), "nothing is sampled"),
    }[config.mode]
    for key, value, required in unused:
        if value:
            yield Problem(key, f"{value} under mode {config.mode}", f"{required}: {why}")
    if config.mode == "train" and config.train_from is None:
        yield Problem("train_from", "null under mode train", "the folder of a run that was recorded", "--only train --from RUN")
    if config.mode != "train" and config.train_from is not None:
        yield Problem("train_from", f"{config.train_from} under mode {config.mode}", "null, or mode train", "--only train --from RUN")
    if config.train_from is not None and config.train_from.resolve() == config.run_dir.resolve():
        fix = "to compute a run's own step again: prism rl replay"
        yield Problem("train_from", str(config.train_from), "another run's folder", fix)


def check_model(model: ModelConfig, config: RLConfig) -> list[Problem]:
    """Return the problems between an architecture and the RL config that trains it."""
    where = "batch.micro_size x batch.seq_length (tokens of a microbatch)"
    tokens = precision.check_tokens(config, config.batch.micro_size * config.batch.seq_length, where)
    return [*check_model_on_gang(model, config), *tokens, *check_architecture(model)]
