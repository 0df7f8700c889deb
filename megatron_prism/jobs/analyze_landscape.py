"""`prism analyze landscape`: evaluation's own score, and the held-out loss, of models between three models. Started again, it goes on.

Input: three models at rest, and tasks as `prism evaluate` has them. Output: landscape.json, and an evaluation of each point. The model is built once;
each point's weights are streamed into the gang's shards (eval/model.fill), and nothing of them goes to the disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from megatron_prism.analysis import landscape, path
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
            "ambiguities": path.AMBIGUITIES,
            "notes": list(resolved.notes),
            **path.figures(resolved.points, scored),
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
