"""Checks between the values of `prism analyze cka`: pure functions that return every problem, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.check.gang import check_gang
from megatron_prism.core.config import CkaConfig
from megatron_prism.core.errors import Problem

STATES = "states"  # of an output: the hidden states of each model, as they are made


def check_cka(config: CkaConfig, world_size: int) -> list[Problem]:
    """Return the problems of the config's values on `world_size` ranks, and between them."""
    return [
        *check_bounds(config),
        *check_gang(config, world_size),
        *_check_models(config),
        *_check_prompts(config),
        *_check_layout(config),
    ]


def pairs(config: CkaConfig) -> list[tuple[str, str]]:
    """Return the pairs that are compared: those that are named, or each model with the first, and neighbours."""
    if config.pairs:
        return [(first, other) for first, _, other in (pair.partition("|") for pair in config.pairs)]
    names = [model.name for model in config.models]
    return list(dict.fromkeys([*((names[0], other) for other in names[1:]), *pairwise(names)]))


def _check_models(config: CkaConfig) -> Iterator[Problem]:
    names = [model.name for model in config.models]
    if len(names) < 2:
        yield Problem("models", f"{len(names)}", "at least two")
    for index, model in enumerate(config.models):
        if names.index(model.name) < index:
            yield Problem(f"models.{index}.name", f"{model.name} twice", "a name of its own for each model")
        if (model.checkpoint is None) == (model.hf is None):
            yield Problem(f"models.{index}", "both or none of checkpoint and hf", "one of them")
    for index, (first, other) in enumerate(pairs(config) if config.pairs else ()):
        if first not in names or other not in names or first == other:
            yield Problem(f"pairs.{index}", repr(config.pairs[index]), f"FIRST|OTHER of {', '.join(names)}")
    if len(set(config.pairs)) < len(config.pairs):
        yield Problem("pairs", ", ".join(config.pairs), "each pair once")


def _check_prompts(config: CkaConfig) -> Iterator[Problem]:
    if not config.distributions:
        yield Problem("distributions", "none", "at least one")
    for name, distribution in config.distributions.items():
        if distribution.set is not None and len(distribution.path) != 1:
            yield Problem(f"distributions.{name}.path", f"{len(distribution.path)} files of the set {distribution.set}", "one")
    if config.subsample is not None and config.subsample > config.num_prompts:
        yield Problem("subsample", str(config.subsample), f"at most num_prompts, {config.num_prompts}: it is without replacement")
    if (most := max(config.num_directions_removed, default=0)) > config.num_prompts - 4:
        yield Problem("num_directions_removed", str(most), f"at most {config.num_prompts - 4}, of {config.num_prompts} prompts")


def _check_layout(config: CkaConfig) -> Iterator[Problem]:
    if config.parallel.vpp is not None:
        yield Problem("parallel.vpp", str(config.parallel.vpp), "null: one model chunk a rank")
    if config.fp8 is not None:
        yield Problem("fp8", "weights and activations in FP8", "bf16 or fp32")
