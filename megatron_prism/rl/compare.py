"""A step as it was recorded beside the same step replayed: stage by stage in the order of its walk. Pure functions of two Steps.

Each stage is computed from what was recorded of the stages before it, so a difference is named where it arises. On the same platform and layout
every bit must be the same. On another, fp32 and bf16 round at other places: there the bounds below hold, and what would not survive rounding
(which token a draw falls on, how rows are dealt to other ranks) is counted and not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isclose, prod
from typing import Any

import torch

from megatron_prism.checkpoint.fingerprint import Fingerprint
from megatron_prism.core.config import Precision
from megatron_prism.rl.record import Step
from megatron_prism.rl.rollout import Response


@dataclass(frozen=True)
class Bound:
    """What may stand between two platforms or layouts.

    log_prob: of one token, in nats. loss: of a mean over the step's tokens, as it is: most cancel to nearly 0. norm: of the gradient norm, as a
    share of it. gradient (moments too) and weight: the distance of two tensors as a share of their norm, as far as norms and sums show it; of a
    small tensor, as a share of a hundredth of the stage's largest norm.
    """

    log_prob: float
    loss: float
    norm: float
    gradient: float
    weight: float


BOUNDS: dict[Precision, Bound] = {
    "fp32": Bound(log_prob=1e-3, loss=1e-5, norm=1e-3, gradient=1e-3, weight=1e-4),
    "bf16": Bound(log_prob=1.0, loss=1e-2, norm=0.1, gradient=0.2, weight=1e-2),
}
BEFORE = ("stored_weights", "weights_before", "optimizer_before", "reference_before")
SMALL = 0.01  # of the largest norm of a stage


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was recorded, and both figures in words."""

    step: int
    stage: str
    name: str
    recorded: str
    replayed: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.stage}: {self.name}: recorded {self.recorded}; replayed {self.replayed}"


@dataclass(frozen=True)
class Stage:
    """A stage's comparison. num_equal: to the bit. largest: the largest difference between two numbers of it. judged: else only counted."""

    name: str
    num_compared: int
    num_equal: int
    largest: float
    differences: Sequence[Difference]
    judged: bool = True


@dataclass(frozen=True)
class Pair:
    """One thing as recorded and as replayed, in words; whether they are equal to the bit, near enough for the bound, and how far apart."""

    name: str
    recorded: str
    replayed: str
    is_equal: bool
    is_near: bool = False
    distance: float = 0.0


def compare(recorded: Step, replayed: Step, precision: Precision, is_exact: bool, exact_stages: Collection[str] = ()) -> list[Stage]:
    """Return all stages of a step. is_exact: the platform and the layout are the recorded ones. exact_stages: exact on any other too."""
    bound = BOUNDS[precision]
    stages: list[tuple[str, Callable[[], Iterator[Pair]]]] = [
        *((name, partial(_tensors, name, recorded, replayed, _of_before(name, bound))) for name in BEFORE if name in replayed.tensors),
        ("prompts", lambda: _responses(recorded, replayed, _prompt)),
        ("responses", lambda: _responses(recorded, replayed, _tokens)),
        ("sampler_log_probs", lambda: _sampler_log_probs(recorded, replayed, bound)),
        ("outcomes", lambda: _responses(recorded, replayed, lambda one: one.sample.outcome)),
        ("rewards", lambda: _responses(recorded, replayed, lambda one: one.sample.reward)),
        ("advantages", lambda: _advantages(recorded, replayed)),
        ("plan", lambda: _plan(recorded, replayed)),
        ("old_log_probs", lambda: _log_probs(recorded, recorded.old_log_probs, replayed.old_log_probs, bound)),
        ("ref_log_probs", lambda: _log_probs(recorded, recorded.ref_log_probs, replayed.ref_log_probs, bound)),
        ("loss", lambda: _figures(recorded, replayed, bound, lambda name: name not in ("grad_norm", "lr"))),
        ("gradients", lambda: _tensors("gradients", recorded, replayed, bound.gradient)),
        ("update", lambda: _figures(recorded, replayed, bound, lambda name: name in ("grad_norm", "lr"))),
        ("weights_after", lambda: _tensors("weights_after", recorded, replayed, bound.weight)),
        ("reference_after", lambda: _tensors("reference_after", recorded, replayed, bound.weight)),
    ]
    return [_stage(recorded.step, name, list(pairs()), is_exact or name in exact_stages, is_exact) for name, pairs in stages]


def _of_before(stage: str, bound: Bound) -> float:
    return bound.gradient if stage == "optimizer_before" else bound.weight


def first(stages: Sequence[Stage]) -> Difference | None:
    """Return the first difference of the walk."""
    return next((difference for stage in stages if stage.judged for difference in stage.differences), None)


def _stage(step: int, name: str, pairs: Sequence[Pair], is_exact: bool, is_same_place: bool) -> Stage:
    off = [pair for pair in pairs if not pair.is_equal and (is_exact or not pair.is_near)]
    differences = tuple(Difference(step, name, pair.name, pair.recorded, pair.replayed) for pair in off)
    largest = max((pair.distance for pair in pairs), default=0.0)
    judged = is_same_place or name not in ("responses", "plan")
    return Stage(name, len(pairs), sum(pair.is_equal for pair in pairs), largest, differences, judged)


def _tensors(stage: str, recorded: Step, replayed: Step, bound: float) -> Iterator[Pair]:
    ours = recorded.tensors.get("weights_before" if stage == "stored_weights" else stage, {})
    theirs = replayed.tensors.get(stage, {})
    least = SMALL * max((one.norm for one in ours.values()), default=0.0)
    for name in dict.fromkeys((*ours, *theirs)):
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None:
            yield Pair(name, _or_nothing(one), _or_nothing(other), False)
            continue
        distance, summed = abs(one.norm - other.norm), abs(one.sum - other.sum)
        limit = bound * max(one.norm, least)
        is_equal = (one.digest, one.shape, one.dtype) == (other.digest, other.shape, other.dtype)
        is_near = one.shape == other.shape and distance <= limit and summed <= limit * prod(one.shape) ** 0.5
        yield Pair(name, _or_nothing(one), _or_nothing(other), is_equal, is_near, 0.0 if is_equal else distance)


def _or_nothing(one: Fingerprint | None) -> str:
    return "no such tensor" if one is None else f"digest {one.digest}, sum {one.sum:.9g}, norm {one.norm:.9g}"


def _responses(recorded: Step, replayed: Step, look: Callable[[Response], Any]) -> Iterator[Pair]:
    """Compare something of each response. Where one side drew more, those are differences too."""
    ours, theirs = recorded.responses, replayed.responses
    for number in range(max(len(ours), len(theirs))):
        one, other = (side[number] if number < len(side) else None for side in (ours, theirs))
        name = _name(one or other)
        values = ["no such response" if side is None else look(side) for side in (one, other)]
        yield Pair(name, *_words(*values), values[0] == values[1])


def _name(response: Response | None) -> str:
    assert response is not None
    return f"prompt {response.sample.prompt_id} sample {response.sample.sample}"


def _words(one: Any, other: Any) -> tuple[str, str]:
    """Return two values in words; of two sequences only the first place where they part."""
    if not isinstance(one, tuple) or not isinstance(other, tuple):
        return str(one), str(other)
    place = next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return _at(one, place), _at(other, place)


def _at(tokens: Sequence[Any], place: int) -> str:
    return f"{tokens[place]} at place {place}" if place < len(tokens) else f"nothing at place {place}"


def _prompt(response: Response) -> str:
    tokens = " ".join(map(str, response.sample.prompt_tokens))
    return f"id {response.sample.prompt_id}, seed {response.seed}, tokens {tokens}"


def _tokens(response: Response) -> tuple[Any, ...]:
    return (*response.sample.token_ids, response.sample.ended)


def _sampler_log_probs(recorded: Step, replayed: Step, bound: Bound) -> Iterator[Pair]:
    """Compare those of the responses that are the same."""
    for one, other in zip(recorded.responses, replayed.responses, strict=False):
        if one.sample.token_ids == other.sample.token_ids:
            yield _tokenwise(_name(one), one.sample.log_probs(), other.sample.log_probs(), bound)


def _log_probs(recorded: Step, ours: Mapping[int, torch.Tensor], theirs: Mapping[int, torch.Tensor], bound: Bound) -> Iterator[Pair]:
    """Compare those of the responses that both sides trained on: which these are is a matter of the advantages."""
    for number in sorted(ours.keys() & theirs.keys()):
        yield _tokenwise(_name(recorded.responses[number]), ours[number], theirs[number], bound)


def _tokenwise(name: str, ours: torch.Tensor, theirs: torch.Tensor, bound: Bound) -> Pair:
    if len(ours) != len(theirs):
        return Pair(name, f"{len(ours)} tokens", f"{len(theirs)} tokens", False)
    off = (ours.double() - theirs.double()).abs()
    place = int(off.argmax())  # NaN is the largest of all
    figures = [f"{float(side[place]):.9g} at token {place}" for side in (ours, theirs)]
    distance = float(off[place])
    return Pair(name, figures[0], figures[1], torch.equal(ours, theirs), distance <= bound.log_prob, distance)


def _advantages(recorded: Step, replayed: Step) -> Iterator[Pair]:
    ours, theirs = recorded.advantages, replayed.advantages
    for number in sorted(ours.keys() | theirs.keys()):
        responses = recorded.responses if number < len(recorded.responses) else replayed.responses
        one, other = ours.get(number), theirs.get(number)
        if one is None or other is None:
            ours_said, theirs_said = ("not trained on" if side is None else f"{side:.9g}" for side in (one, other))
            yield Pair(_name(responses[number]), ours_said, theirs_said, False)
        else:
            near = isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
            yield Pair(_name(responses[number]), f"{one:.17g}", f"{other:.17g}", one == other, near, abs(one - other))


def _plan(recorded: Step, replayed: Step) -> Iterator[Pair]:
    for rank in range(max(len(recorded.plan), len(replayed.plan))):
        one, other = (side.plan[rank] if rank < len(side.plan) else None for side in (recorded, replayed))
        yield Pair(f"data-parallel rank {rank}", str(one), str(other), one == other)


def _figures(recorded: Step, replayed: Step, bound: Bound, is_wanted: Callable[[str], bool]) -> Iterator[Pair]:
    ours, theirs = recorded.figures, replayed.figures
    for name in filter(is_wanted, dict.fromkeys((*ours, *theirs))):
        one, other = ours.get(name, float("nan")), theirs.get(name, float("nan"))
        is_equal = one == other or (one != one and other != other)
        limit = {"lr": 0.0, "grad_norm": bound.norm * abs(one)}.get(name, bound.loss)
        near = abs(one - other) <= limit
        yield Pair(name, f"{one:.17g}", f"{other:.17g}", is_equal, near, abs(one - other))
