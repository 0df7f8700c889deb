"""Responses out of records: what trains on another run's, and what computes a recorded step again.

Both stand in a Sampler's place. A group is found by its seed, which depends on the run's seed, the step that trains on it and the draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_prism.core.errors import InputError, PrismError, Problem
from megatron_prism.generate.engine import Rollout
from megatron_prism.grade.outcome import Graded
from megatron_prism.parallel.groups import from_first
from megatron_prism.rl.record import Step
from megatron_prism.rl.rollout import Encoded, Response, Sampled, Sampler, to_item

Groups = Mapping[int, Sequence[Response]]  # by seed


@dataclass(frozen=True, kw_only=True)
class Recorded(Sampler):
    """Gives each step the responses that were recorded of it. Its engine samples nothing, and its grader grades nothing.

    read: returns the record of a step.
    """

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
                raise InputError(Problem("rollout.recorded", found, "the draws of the recorded run", fix)).agreed()
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
    both as one response, by seed and sample.
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
        if not groups.keys() <= _by_seed(self.read(self.at)).keys():
            return Sampled(prompts, rollouts, (), step)
        now = Sampler.sample(self, prompts, num_samples, seeds, step)
        self._drawn.update({(rollout.seed, rollout.sample): rollout for rollout in now.rollouts})
        return replace(now, rollouts=rollouts, items=[to_item(prompts[one.prompt], one, self.spec) for one in rollouts])

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
