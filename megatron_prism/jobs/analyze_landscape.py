"""`prism analyze landscape`: evaluation's own score, and the held-out loss, of models between three models. Started again, it goes on.

Input: three models at rest, and tasks as `prism evaluate` has them. Output: landscape.json, and an evaluation of each point. The model is built once;
each point's weights are streamed into the gang's shards (eval/model.fill), and nothing of them goes to the disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from megatron_prism.analysis import landscape
from megatron_prism.analysis.landscape import Point
from megatron_prism.checkpoint import at_rest, sharded, start
from megatron_prism.checkpoint.at_rest import Opened
from megatron_prism.checkpoint.folder import Checkpoint
from megatron_prism.core import log, resumable
from megatron_prism.core.check.landscape import MODELS, POINTS, SCORES, check_landscape, evaluation, unlike
from megatron_prism.core.config import LandscapeConfig
from megatron_prism.core.errors import InputError, Problem, raise_problems
from megatron_prism.core.load import to_dict
from megatron_prism.core.manifest import describe, sha256_json, write_json
from megatron_prism.data import tokenizer
from megatron_prism.eval import model as models_at_rest
from megatron_prism.eval import sample
from megatron_prism.eval.cache import Kept
from megatron_prism.eval.model import Evaluated
from megatron_prism.jobs import evaluate, train
from megatron_prism.models import build as models
from megatron_prism.parallel.groups import Groups, from_first, on_first
from megatron_prism.train.stop import StopRequest
from megatron_prism.train.watchdog import Watchdog

KIND, COMMAND, FILE = "landscape", "prism analyze landscape", "landscape.json"
AMBIGUITIES = {
    "path": "the paper names 11 points, and not where they lie: 7 from base to mid and 4 more to rl are read from its picture",
    "plane": "the paper names a 5 x 5 plane, and not where it lies: centred at mid, from -0.3 to 1.3 toward rl and toward base, is read from its "
    "picture; in Equation 3 that is b, and 1 - a",
    "monotonic": "no score along the path is below an earlier one; largest_drop says by how much one is. Its standard error takes the two scores for "
    "independent, though they are of the same questions",
    "gain_kept": "the share of rl's gain over mid; null where that gain is not above twice its standard error",
    "barrier": "the largest excess of the held-out loss over the straight line between its values at a leg's ends (arXiv 1912.05671 takes their mean)",
}


@dataclass(frozen=True)
class Resolved:
    """A landscape before a process starts. evaluation: of mid. models: all three by name. points: the path first."""

    config: LandscapeConfig
    evaluation: evaluate.Resolved
    models: Mapping[str, Evaluated]
    points: Sequence[Point]
    notes: tuple[str, ...]
    figures: dict[str, Any]


def resolve(config: LandscapeConfig, world_size: int) -> Resolved:
    """Check everything that can be checked before a process starts. Nothing is written.

    Raises: InputError with every problem found.
    """
    raise_problems(check_landscape(config, world_size))
    _, problems = start.attempt(partial(resumable.begun, config.out, KIND, COMMAND))
    opened: dict[str, Evaluated] = {}
    for name in MODELS:
        given = getattr(config, f"{name}_model")
        key = f"{name}_model.{'hf' if given.checkpoint is None else 'checkpoint'}"
        one, wrong = start.attempt(partial(models_at_rest.read, given), key)
        problems += wrong
        opened |= {} if one is None else {name: one}
    asked, wrong = start.attempt(lambda: evaluate.resolve(evaluation(config), world_size))
    problems += [problem for problem in wrong if not any(problem.where in named.where for named in problems)]  # mid's own are named
    for name in opened.keys() & {"base", "rl"} if "mid" in opened else ():
        problems += [*unlike(opened["mid"].model, opened[name].model, name), *_other_tokens(opened["mid"], opened[name], name)]
    raise_problems(problems)
    assert asked is not None and asked.reader is not None
    points = landscape.points(config.num_steps_to_mid, config.num_steps_to_rl, config.plane_size, config.keep_largest, config.num_nulls)
    figures = asked.figures | {
        **{name: str(opened[name].root) for name in MODELS},
        "points": len(points),
        "responses": len(points) * asked.figures["responses"],
        "out": str(config.out),
    }
    return Resolved(config, asked, opened, points, tuple(_asked_otherwise(asked.reader.spec.end_ids, opened)), figures)


def _other_tokens(mid: Evaluated, other: Evaluated, name: str) -> list[Problem]:
    if mid.tokenizer_sha256() == other.tokenizer_sha256():
        return []
    return [
        Problem(
            f"{name}: {tokenizer.FILE}", "another tokenizer", f"that of mid ({mid.assets})", "only models of one vocabulary can be mixed"
        )
    ]


def _asked_otherwise(end_ids: Sequence[int], opened: Mapping[str, Evaluated]) -> list[str]:
    """Return, in words, where an evaluation of base or rl alone would differ: all points are asked as mid is."""
    context = opened["mid"].model.max_position_embeddings
    notes = []
    for name in ("base", "rl"):
        own = tokenizer.load(opened[name].assets).end_ids
        notes += (
            [f"{name} ends a response at tokens {list(own)}; here it is asked as mid, at {list(end_ids)}"] if own != tuple(end_ids) else []
        )
        if (other := opened[name].model.max_position_embeddings) != context:
            notes.append(f"{name} has a context of {other}; here it is asked as mid, with {context}")
    return notes


def run(resolved: Resolved) -> dict[str, Any]:
    """Score the landscape; every rank of the gang calls this and returns the result.

    Raises: InputError before anything is written where this rank's machine cannot run the config.
    """
    return train.on_gang(resolved, landscape_in_gang)


@dataclass(eq=False)
class Gliding:
    """The model on this gang, whose weights become a point's. It is built, and its engine held against it, once, when a point needs it."""

    evaluation: evaluate.Resolved
    gang: evaluate.Gang
    models: Mapping[str, Opened]
    thresholds: Mapping[float, float]
    seed: int
    chunks: Sequence[Any] = ()
    sampler: sample.Sampler | None = field(default=None)

    def become(self, point: Point) -> Sequence[Any]:
        """Return the chunks with a point's weights. Raises: CheckpointError for a model that is damaged or holds a NaN or an inf."""
        reader = self.evaluation.reader
        assert reader is not None
        self.gang.watchdog.doing(f"reading {point.name}")
        self.chunks = self.chunks or models.build(reader.evaluated.model, self.gang.groups, reader.config)
        whole_of = partial(landscape.tensor, point, self.models, thresholds=self.thresholds, seed=self.seed)
        models_at_rest.fill(self.chunks, self.models["mid"].at_rest, whole_of)
        return self.chunks

    def sampler_of(self, chunks: Sequence[Any], work: sample.Work) -> sample.Sampler:
        """Return the engine over the chunks, which reads their current weights at each call. The trust gate opens once, at the first point."""
        self.sampler = self.sampler or evaluate.sampler_of(self.evaluation, chunks, work)
        return self.sampler


def landscape_in_gang(resolved: Resolved, groups: Groups) -> dict[str, Any]:
    """Score the landscape on an existing rank grid, point by point.

    Raises: Stopped where it was asked to stop. EnvironmentFault, CheckpointError.
    """
    config, limits = resolved.config, resolved.config.limits
    with ExitStack() as stack:
        stop_request = stack.enter_context(StopRequest(limits.wall_clock_s))
        gang = evaluate.Gang(groups, stop_request, stack.enter_context(Watchdog(limits.hang_timeout_s, groups.rank)))
        gang.watchdog.doing("reading the models' sums")
        evaluated = from_first(dict(resolved.models))  # a run that goes on may have written another checkpoint meanwhile
        identities = from_first(on_first(lambda: {name: one.identity() for name, one in evaluated.items()}))
        assert identities is not None
        for one in evaluated.values():
            if isinstance(one.source, Checkpoint):
                sharded.require_whole(one.root)
        kept = on_first(partial(_hold, config, identities, stack))
        sources = [one.source for one in evaluated.values()]
        at_rests = [at_rest.read(each.root, check_sums=False) if isinstance(each, Checkpoint) else each for each in sources]
        opened = dict(zip(evaluated, stack.enter_context(at_rest.opened(at_rests)), strict=True))
        gang.watchdog.doing("ranking the changes of rl")
        thresholds = from_first(on_first(lambda: landscape.largest(opened["mid"], opened["rl"], config.keep_largest))) or {}
        asked = evaluate.with_ruler(resolved.evaluation, groups, gang.watchdog)
        gliding = Gliding(asked, gang, opened, thresholds, config.seed)
        scored: dict[str, Any] = {}
        for point in resolved.points:
            of_point = replace(asked, config=replace(asked.config, out=config.out / POINTS / point.name))
            identity = _identity(point, identities, config.seed)
            if groups.rank == 0:
                log.get().info("point %d of %d: %s", len(scored) + 1, len(resolved.points), point.name)
            scored[point.name] = evaluate.score(of_point, identity, gang, partial(gliding.become, point), gliding.sampler_of)
            on_first(partial(_keep, kept, point.name, scored[point.name]))
        result = {
            "kind": "analysis",
            "analysis": KIND,
            "equation": "W = base + a (mid - base) + b (rl - mid)",
            "models": {name: {key: identities[name][key] for key in ("kind", "path", "sha256")} for name in MODELS},
            "ambiguities": AMBIGUITIES,
            "notes": list(resolved.notes),
            **_figures(resolved.points, scored),
            "out": str(config.out),
        }
        on_first(partial(write_json, config.out / FILE, result))
        return result


def _hold(config: LandscapeConfig, identities: Mapping[str, Any], stack: ExitStack) -> Kept:
    """Hold the folder until the stack ends, and return what points came to before. Raises: InputError where it is of other models."""
    described = partial(describe, KIND, {}, models=dict(identities), config=to_dict(config))
    begun = stack.enter_context(resumable.held(config.out, KIND, COMMAND, described))
    for name in MODELS:
        if (before := begun["models"][name])["sha256"] != identities[name]["sha256"]:
            required = f"{before['path']} as it was: the folder has a landscape of other weights"
            raise InputError(Problem(f"out ({config.out}): {name}_model", str(identities[name]["path"]), required, "choose another out"))
    return Kept(config.out / SCORES)


def _keep(kept: Kept | None, name: str, scores: Mapping[str, Any]) -> None:
    """Keep what a point came to: a file more for each that is new, by which `prism submit` sees that a start has got on."""
    assert kept is not None
    if kept.get(name) != scores:
        kept.write({name: scores})


def _identity(point: Point, identities: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return what a point's evaluation is of; of a point that is one of the models, that model."""
    if point.model is not None:
        return dict(identities[point.model])
    own: dict[str, Any] = {"weights": point.weights}
    if point.keep is not None or point.draw is not None:
        own = {"keep_largest": point.keep} if point.keep is not None else {"null": point.draw, "seed": seed}
    used = point.weights if "weights" in own else ("mid", "rl")
    sums = {name: identities[name]["sha256"] for name in used}
    return {"kind": "point", "path": point.name, **own, "models": sums, "sha256": sha256_json({**own, "models": sums})}


def _figures(points: Sequence[Point], scored: Mapping[str, Any]) -> dict[str, Any]:
    """Return each point's figures, and what the path's say. scored: by a point's name, what its evaluation came to."""
    rows: list[dict[str, Any]] = [
        {
            "name": point.name,
            "kind": point.kind,
            "a": point.a,
            "b": point.b,
            **({"keep_largest": point.keep} if point.keep is not None else {}),
            "tasks": {
                name: {key: part[key] for key in ("score", "standard_error", "num_questions") if key in part}
                for name, part in scored[point.name]["tasks"].items()
                if part["score"] is not None
            },
            "loss": _loss(scored[point.name]["tasks"]),
        }
        for point in points
    ]
    path = [row for row, point in zip(rows, points, strict=True) if point.kind == "path"]
    by_name = {row["name"]: row for row in rows}
    tasks = list(path[0]["tasks"])
    drops = {name: _largest_drop(path, name) for name in tasks}
    return {
        "points": rows,
        "monotonic": {name: drop["drop"] == 0 for name, drop in drops.items()},
        "largest_drop": drops,
        "barrier": _barriers(path, by_name),
        "gain_kept": {
            row["name"]: {name: _gain_kept(row, by_name, name) for name in tasks}
            for row, point in zip(rows, points, strict=True)
            if point.kind in ("keep_largest", "null")
        },
    }


def _loss(tasks: Mapping[str, Any]) -> float | None:
    """Return the mean held-out loss a token, of all sources of all tasks that have one."""
    of_sources = [loss for part in tasks.values() for loss in part.get("losses", {}).values()]
    num_tokens = sum(loss["num_tokens"] for loss in of_sources)
    return sum(loss["loss"] * loss["num_tokens"] for loss in of_sources) / num_tokens if num_tokens else None


def _largest_drop(path: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    first, last = (path[place] for place in landscape.largest_drop([row["tasks"][name]["score"] for row in path]))
    drop = first["tasks"][name]["score"] - last["tasks"][name]["score"]
    return {"drop": drop, "from": first["name"], "to": last["name"], "standard_error": _error(first, last, name)}


def _error(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> float | None:
    """Return the standard error of a difference of scores, taken for independent."""
    errors = [row["tasks"][name].get("standard_error") for row in (one, other)]
    return None if None in errors else math.hypot(*errors)


def _barriers(path: Sequence[Mapping[str, Any]], by_name: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the loss barrier of each leg of the path; None without a held-out loss."""
    at_mid = path.index(by_name["mid"])
    legs = {"base_to_mid": path[: at_mid + 1], "mid_to_rl": path[at_mid:]}
    if any(row["loss"] is None for row in path):
        return dict.fromkeys(legs)
    return {name: landscape.barrier([row["loss"] for row in leg]) for name, leg in legs.items()}


def _gain_kept(row: Mapping[str, Any], by_name: Mapping[str, Any], name: str) -> float | None:
    """Return the share of rl's gain over mid that a point has; None where that gain is not above twice its standard error."""
    mid, rl, own = (each["tasks"][name]["score"] for each in (by_name["mid"], by_name["rl"], row))
    return (own - mid) / (rl - mid) if rl - mid > 2 * (_error(by_name["mid"], by_name["rl"], name) or 0.0) else None
