"""Checks between the values of a landscape's config: pure functions that return every problem, before any model is opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.check.evaluate import check_evaluate
from megatron_prism.core.config import AskingConfig, EvaluateConfig, EvaluatedConfig, LandscapeConfig, ModelConfig
from megatron_prism.core.errors import Problem

MODELS = ("base", "mid", "rl")
POINTS, SCORES = "points", "scores"  # folders: of each point's evaluation, and of what each came to (eval/cache.py)
MAY_DIFFER = ("max_position_embeddings", "init_method_std")  # no weight's meaning depends on them


def evaluation(config: LandscapeConfig) -> EvaluateConfig:
    """Return the evaluation of mid that a landscape's config asks for. That of another point has another folder and other weights."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(AskingConfig)}
    return EvaluateConfig(
        **shared, out=config.out / POINTS / "mid", model=EvaluatedConfig(checkpoint=config.mid_model.checkpoint, hf=config.mid_model.hf)
    )


def check_landscape(config: LandscapeConfig, world_size: int) -> list[Problem]:
    """Return the problems of a landscape's values on `world_size` ranks, and between them."""
    problems = []
    for name in MODELS:
        given = [key for key in ("checkpoint", "hf") if getattr(getattr(config, f"{name}_model"), key) is not None]
        if len(given) != 1:
            problems.append(Problem(f"{name}_model", " and ".join(given) or "none of them", "one of checkpoint and hf"))
    if config.engine != "cached":
        problems.append(Problem("engine", config.engine, "cached: no other was run on weights that change"))
    names = [f"{share:g}" for share in config.keep_largest]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(Problem("keep_largest", f"{', '.join(twice)} twice", "each share once: a point is named by it, to six digits"))
    if config.plane_size == 1:
        problems.append(Problem("plane_size", "1", "0 for no plane, or at least 2: one point is a corner of it"))
    of_evaluation = [problem for problem in check_evaluate(evaluation(config), world_size) if problem.where != "model"]
    return list(dict.fromkeys([*problems, *check_bounds(config), *of_evaluation]))


def unlike(mid: ModelConfig, other: ModelConfig, name: str) -> Iterator[Problem]:
    """Yield why no model lies between mid and another one: every field of both but MAY_DIFFER must be the same."""
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(mid, field.name), getattr(other, field.name)
        if ours != theirs and field.name not in MAY_DIFFER:
            yield Problem(f"{name}_model: {field.name}", str(theirs), f"{ours}, as of mid")
