"""The jobs that are a gang of processes: how the config of each is checked, and what shows that it gets on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prism.checkpoint.run_folder import CHECKPOINTS
from megatron_prism.core.check.cka import STATES, check_cka
from megatron_prism.core.check.evaluate import check_evaluate
from megatron_prism.core.check.filter import check_filter
from megatron_prism.core.check.landscape import SCORES, check_landscape
from megatron_prism.core.check.rl import ROLLOUTS
from megatron_prism.core.config import CkaConfig, EvaluateConfig, FilterConfig, LandscapeConfig, RLConfig, TrainConfig
from megatron_prism.core.errors import Problem
from megatron_prism.eval.folder import ANSWERS, GRADES, SAMPLES, TASKS
from megatron_prism.launch.pipeline import output
from megatron_prism.planning import layouts
from megatron_prism.rl.passes import SHARDS

Gang = TrainConfig | RLConfig | FilterConfig | EvaluateConfig | CkaConfig | LandscapeConfig


@dataclass(frozen=True)
class GangJob:
    """A job of a gang.

    check: the problems of its config on so many processes, as far as they can be said before its inputs are there.
    progress: the folders of its output whose newest files show that a start has got on.
    """

    check: Callable[[Any, int], list[Problem]]
    progress: tuple[str, ...]


GANGS: Mapping[type, GangJob] = {
    TrainConfig: GangJob(layouts.problems, (CHECKPOINTS,)),
    RLConfig: GangJob(layouts.problems, (CHECKPOINTS,)),
    FilterConfig: GangJob(check_filter, (SHARDS,)),
    EvaluateConfig: GangJob(check_evaluate, (SAMPLES, GRADES, TASKS, ANSWERS)),
    LandscapeConfig: GangJob(check_landscape, (SCORES,)),
    CkaConfig: GangJob(check_cka, (STATES,)),
}  # by the config


def progress(config: Gang) -> tuple[Path, ...]:
    """Return the folders whose newest files show that a start has got on."""
    only_samples = isinstance(config, RLConfig) and config.mode == "rollout"  # it keeps no checkpoint
    return tuple(output(config) / name for name in ((ROLLOUTS,) if only_samples else GANGS[type(config)].progress))


def resolve(config: Gang, world_size: int) -> None:
    """Check a config in full, with its data and its checkpoint. Raises: InputError with every problem found."""
    from megatron_prism.jobs import analyze_cka, analyze_landscape, evaluate, rl, rl_filter, train  # bring torch along

    resolvers: Mapping[type, Callable[[Any, int], Any]] = {
        TrainConfig: train.resolve,
        RLConfig: rl.resolve,
        FilterConfig: rl_filter.resolve,
        EvaluateConfig: evaluate.resolve,
        LandscapeConfig: analyze_landscape.resolve,
        CkaConfig: analyze_cka.resolve,
    }
    resolvers[type(config)](config, world_size)
