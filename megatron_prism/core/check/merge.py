"""Checks between the values of a merge's config: pure functions that return every problem, before any model is opened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.config import MergeConfig
from megatron_prism.core.errors import Problem

WITH_BASE = ("task_arithmetic", "ties")
ONLY_FOR = {"t": ("slerp",), "density": ("ties",), "scale": WITH_BASE, "any_sum": ("linear",), "base_model": WITH_BASE}
SUM_TOLERANCE = 5e-7  # of each weight: half of the last of six digits


def check_merge(config: MergeConfig) -> list[Problem]:
    """Return the problems of a merge's values, and between them."""
    if problems := list(check_bounds(config)):
        return problems
    return [*_check_method(config), *_check_weights(config), *_check_paths(config)]


def _check_method(config: MergeConfig) -> Iterator[Problem]:
    method, count = config.method, len(config.models)
    for key, methods in ONLY_FOR.items():
        value = getattr(config, key)
        if value != MergeConfig.__dataclass_fields__[key].default and method not in methods:
            yield Problem(
                key, f"{value} with method {method}", f"a value only with {' or '.join(methods)}", "remove it, or name the method"
            )
    if method == "slerp" and config.normalize is not None:
        yield Problem("normalize", "a value with method slerp", "null: slerp has no weights")
    if method in WITH_BASE and config.base_model is None:
        yield Problem("base_model", "no value", f"the model that the others were trained from, for {method}")
    if method == "slerp" and config.t is None:
        yield Problem("t", "no value", "how far to go from the first model to the second, 0 to 1, for slerp")
    least = 1 if method in WITH_BASE else 2
    if count < least or (method == "slerp" and count != 2):
        required = "exactly 2 models, for slerp" if method == "slerp" else f"at least {least}"
        yield Problem("models", str(count), required, "name each model once: path and weight")


def _check_weights(config: MergeConfig) -> Iterator[Problem]:
    weights = [model.weight for model in config.models]
    for index, weight in enumerate(weights):
        if config.method == "slerp" and weight is not None:
            yield Problem(f"models.{index}.weight", str(weight), "no weight: slerp takes t")
        if config.method != "slerp" and weight is None:
            yield Problem(
                f"models.{index}.weight", "no value", f"the weight of {config.models[index].path}", "as --model DIR=0.15 or weight: 0.15"
            )
    if config.method != "linear" or not weights or None in weights:
        return
    total = sum(weight for weight in weights if weight is not None)
    tolerance = len(weights) * SUM_TOLERANCE * (1 + 1e-6)  # the sum has roundings of its own
    if config.normalize and config.any_sum:
        yield Problem("any_sum", "true with normalize: true", "one of them", "normalize divides by the sum, any_sum does not")
    elif config.normalize and abs(total) <= tolerance:
        yield Problem("models", f"weights that sum to {total:g}", "a sum to divide by")
    elif not config.normalize and not config.any_sum and abs(total - 1) > tolerance:
        fix = "--normalize (normalize: true) divides them by their sum, --any-sum (any_sum: true) takes them as they are"
        yield Problem("models", f"weights that sum to {total:g}", "weights that sum to 1", fix)


def _check_paths(config: MergeConfig) -> Iterator[Problem]:
    named: dict[Path, str] = {}
    for place, path in places(config):
        other = named.setdefault(path.resolve(), place)
        if other != place:
            yield Problem(f"{place} ({path})", f"the model that {other} is too", "each model once")
    if config.config_from is not None and config.config_from.resolve() not in named:
        yield Problem("config_from", str(config.config_from), f"one of {', '.join(str(path) for _, path in places(config))}")


def places(config: MergeConfig) -> list[tuple[str, Path]]:
    """Return the models of a merge by their keys, the base first where there is one: the order in which their pieces are merged."""
    base = [] if config.base_model is None else [("base_model", config.base_model)]
    return [*base, *((f"models.{index}.path", model.path) for index, model in enumerate(config.models))]
