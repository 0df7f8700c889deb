"""Responses out of records: what trains on another run's, and what computes a recorded step again.

Both stand in a Sampler's place. A group is found by its seed, which depends on the run's seed, the step that trains on it and the draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from megatron_prism.checkpoint import run_folder
from megatron_prism.core.config import RLConfig
from megatron_prism.core.errors import InputError, PrismError, Problem
from megatron_prism.core.load import flat, load
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.generate.engine import Engine, Rollout
from megatron_prism.grade.outcome import Graded
from megatron_prism.parallel.groups import from_first
from megatron_prism.rl import record_files
from megatron_prism.rl.record import Step
from megatron_prism.rl.rollout import Encoded, Grades, Response, Sampled, Sampler, draw, items_of

Groups = Mapping[int, Sequence[Response]]  # by seed
SAME = ("seed", "rollout.num_prompts", "rollout.num_samples", "rollout.max_tokens", "rollout.max_refills")


def check(config: RLConfig, prompts_sha256: str) -> list[Problem]:
    """Return why a run cannot train on the records of train_from: its prompts and draws are others, or steps of the run have no record."""
    source = config.train_from
    if source is None:
        return []
    if not (source / run_folder.CONFIG).is_file():
        return [Problem("train_from", f"{source}, no run", "the folder of a run of `prism rl --record`")]
    recorded, here = flat(load(source / run_folder.CONFIG, RLConfig)), flat(config)
    required = f"{{}}, as in {source}: the run draws the prompts of the recorded one"
    problems = [Problem(key, str(here[key]), required.format(recorded[key])) for key in SAME if here[key] != recorded[key]]
    theirs = run_folder.last_start(source).get("plan", {}).get("prompts_sha256", {}).get("prompts")
    if theirs != prompts_sha256:
        problems.append(Problem("prompts", f"{config.prompts}, another set", f"that of {source}: {recorded['prompts']}"))
    return problems + _check_records(source, config.steps)


def check_next(config: RLConfig, begins: int, prompts: Sequence[Encoded], spec: TokenizerSpec) -> list[Problem]:
    """Return what is wrong with the record that a run trains on first, so that nothing is written for it; of a new run its draws too.

    begins: the step of the run's checkpoint, 0 for none. A later record is read where its step begins.
    """
    source, num_prompts = config.train_from, config.rollout.num_prompts
    if source is None or begins >= config.steps:
        return []
    try:
        record = record_files.read(source, begins + 1)
        if begins == 0:
            draw(Recorded(config, spec, read=lambda step: record), prompts, 0, num_prompts, step=1, weights_step=0)
    except InputError as error:
        return list(error.problems)
    return []


def _check_records(source: Path, steps: int) -> list[Problem]:
    kept = set(record_files.steps(source))
    missing = [step for step in range(1, steps + 1) if step not in kept]
    if not missing:
        return []
    found = f"{source} without a record of {len(missing)} steps, step {missing[0]} the first"
    fix = f"record it with record.interval=1 and record.keep_last={steps}" + (
        f", or train steps={missing[0] - 1}" if missing[0] > 1 else ""
    )
    return [Problem("train_from", found, f"one of each of the {steps} steps", fix)]


class Nothing:
    """Stands where a sampler has its engine: every response is recorded."""

    def generate(self, *_: object) -> NoReturn:
        """Refuse: nothing is sampled."""
        raise AssertionError("a run that trains on records samples nothing")


@dataclass(frozen=True, kw_only=True)
class Recorded(Sampler):
    """Gives each step the responses that were recorded of it. It has no engine and no grader.

    read: returns the record of a step.
    """

    engine: Engine = field(default_factory=Nothing)
    grader: Grades | None = None
    read: Callable[[int], Step]

    def sample(self, prompts: Sequence[Encoded], num_samples: int, seeds: Sequence[int], step: int) -> Sampled:
        """Return the recorded responses to each prompt.

        Raises: InputError where the run draws another prompt than the recorded one drew.
        """
        groups = self.recorded(seeds, step)
        for prompt, seed in zip(prompts, seeds, strict=True):
            group = groups.get(seed, ())
            drawn = {(one.sample.prompt_id, one.sample.prompt_tokens) for one in group}
            if len(group) != num_samples or drawn != {(prompt.prompt.id, prompt.tokens)}:
                found = f"after step {step}, {len(group)} responses to this draw, and {num_samples} to prompt {prompt.prompt.id} are needed"
                fix = "prompts, seed and rollout.* as in the recorded run; with rollout.max_refills above 0 the algorithm too"
                raise InputError(Problem("train_from", found, "the draws of the recorded run", fix)).agreed()
        return Sampled(prompts, _rollouts(groups, seeds), (), step)

    def responses(self, sampled: Sampled, outcomes: dict[str, Graded] | PrismError) -> list[list[Response]]:
        """Return the recorded responses."""
        seeds = list(dict.fromkeys(rollout.seed for rollout in sampled.rollouts))
        groups = self.recorded(seeds, sampled.weights_step)
        return [list(groups[seed]) for seed in seeds]

    def recorded(self, seeds: Sequence[int], weights_step: int) -> Groups:
        """Return the groups of the next step's record, or one step off of the record after it, if it has the seeds."""
        groups = _by_seed(self.read(weights_step + 1))
        if self.config.rollout.lag and not groups.keys() & set(seeds):
            groups = _by_seed(self.read(weights_step + 2))
        return groups


@dataclass(frozen=True, kw_only=True)
class Replayed(Recorded):
    """Gives each step its recorded responses, and computes for the step `at` what engine and grader say now.

    The walk goes on from what was recorded: the tokens are sampled again from their seeds, and the recorded tokens are graded again. `again` has
    both as one response, by seed and sample. A run of mode train sampled nothing: its responses are taken as recorded.
    """

    at: int
    again: dict[tuple[int, int], Response] = field(default_factory=dict)
    _drawn: dict[tuple[int, int], Rollout] = field(default_factory=dict)

    def sample(self, prompts: Sequence[Encoded], num_samples: int, seeds: Sequence[int], step: int) -> Sampled:
        """Return the recorded responses to each prompt; new ones where they were not recorded, and none for a step after `at`."""
        groups = self.recorded(seeds, step)
        if not groups:
            return Sampled((), (), (), step)
        if not all(len(groups.get(seed, ())) == num_samples for seed in seeds):
            return Sampler.sample(self, prompts, num_samples, seeds, step)
        rollouts = _rollouts(groups, seeds)
        if self.config.mode == "train" or not groups.keys() <= _by_seed(self.read(self.at)).keys():
            return Sampled(prompts, rollouts, (), step)
        now = Sampler.sample(self, prompts, num_samples, seeds, step)
        self._drawn.update({(rollout.seed, rollout.sample): rollout for rollout in now.rollouts})
        return replace(now, rollouts=rollouts, items=items_of(prompts, rollouts, self.spec))

    def responses(self, sampled: Sampled, outcomes: dict[str, Graded] | PrismError) -> list[list[Response]]:
        """Return the recorded responses, or the new ones, and keep those of the step `at` in `again`."""
        if not sampled.items:
            return Recorded.responses(self, sampled, from_first(outcomes)) if sampled.rollouts else []
        graded = Sampler.responses(self, sampled, outcomes)
        groups = self.recorded([rollout.seed for rollout in sampled.rollouts], sampled.weights_step)
        for response in (response for group in graded for response in group):
            place = response.seed, response.sample.sample
            if (drawn := self._drawn.get(place)) is not None:
                own = replace(response.sample, token_ids=drawn.token_ids, logprobs=drawn.logprobs, ended=drawn.ended)
                self.again[place] = replace(response, sample=own)
        return [list(groups.get(group[0].seed, group)) for group in graded]

    def recorded(self, seeds: Sequence[int], weights_step: int) -> Groups:
        """Return the groups of the record that has the seeds; none for a step after `at`."""
        groups = _by_seed(self.read(weights_step + 1))
        if not self.config.rollout.lag or groups.keys() & set(seeds):
            return groups
        return _by_seed(self.read(weights_step + 2)) if weights_step + 2 <= self.at else {}


def _rollouts(groups: Groups, seeds: Sequence[int]) -> list[Rollout]:
    """Return recorded responses as an engine returns them."""
    members = ((index, one.seed, one.sample) for index, seed in enumerate(seeds) for one in groups[seed])
    return [Rollout(index, one.sample, seed, one.token_ids, one.logprobs, one.ended) for index, seed, one in members]


def _by_seed(record: Step) -> dict[int, list[Response]]:
    """Return a record's groups."""
    groups: dict[int, list[Response]] = {}
    for response in record.responses:
        groups.setdefault(response.seed, []).append(response)
    return groups
