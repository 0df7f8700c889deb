"""Checks between the values of a filter's config: pure functions that return every problem, before anything starts."""

from __future__ import annotations

from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.check.gang import check_gang
from megatron_prism.core.check.train import check_sampler
from megatron_prism.core.config import FilterConfig
from megatron_prism.core.errors import Problem


def check_filter(config: FilterConfig, world_size: int) -> list[Problem]:
    """Return the problems of a filter's values on `world_size` ranks, and between them."""
    problems = [*check_bounds(config), *check_gang(config, world_size), *check_sampler(config.init, config.rollout.engine)]
    if config.init.checkpoint is None:
        problems.append(Problem("init.checkpoint", "no value", "the checkpoint whose model answers"))
    if config.init.tokenizer is not None:
        problems.append(Problem("init.tokenizer", "a value", "null", "a checkpoint brings its own tokenizer: remove it"))
    return problems
