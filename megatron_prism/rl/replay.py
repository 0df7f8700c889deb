"""Responses out of records: what trains on another run's, and what computes a recorded step again.

Both stand in a Sampler's place (rollout.Responds). A group is found by its seed, which depends on the run's seed, the step and the draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megatron_prism.core.config import RLConfig
from megatron_prism.core.errors import InputError, Problem
from megatron_prism.generate.engine import Rollout
from megatron_prism.rl.record import Step
from megatron_prism.rl.rollout import Encoded, Response, Sampler


@dataclass(frozen=True)
class Recorded:
    """Gives a step the responses that were recorded of it. Nothing is sampled and nothing is graded.

    read: returns the record of a step.
    """

    config: RLConfig
    read: Callable[[int], Step]

    def respond(self, prompts: Sequence[Encoded], num_samples: int, seeds: Sequence[int], step: int) -> list[list[Response]]:
        """Return the recorded responses to each prompt.

        Raises: InputError where the run draws another prompt than the recorded one drew.
        """
        groups = _groups(self.read(step + 1))
        for prompt, seed in zip(prompts, seeds, strict=True):
            group = groups.get(seed, ())
            drawn = {(one.sample.prompt_id, one.sample.prompt_tokens) for one in group}
            if len(group) != num_samples or drawn != {(prompt.prompt.id, prompt.tokens)}:
                found = f"step {step + 1} has {len(group)} responses for this draw, and it takes {num_samples} to prompt {prompt.prompt.id}"
                fix = "prompts, seed and rollout.* as in the recorded run; with rollout.max_refills above 0 the algorithm too"
                raise InputError(Problem("rollout.recorded", found, "the draws of the recorded run", fix)).agreed()
        return [list(groups[seed]) for seed in seeds]


@dataclass
class Replayed:
    """Gives a step its recorded responses, and computes for the step `at` what sampler and grader say now.

    The walk goes on from what was recorded: the tokens are sampled again from the seeds, and the recorded tokens are graded again. `again`
    has both, in the order in which the step asked; before that step it stays empty.
    """

    sampler: Sampler
    read: Callable[[int], Step]
    at: int
    again: list[Response] = field(default_factory=list)

    @property
    def config(self) -> RLConfig:
        """Return the run's config."""
        return self.sampler.config

    def respond(self, prompts: Sequence[Encoded], num_samples: int, seeds: Sequence[int], step: int) -> list[list[Response]]:
        """Return the recorded responses to each prompt; to one that was not recorded, new ones."""
        groups = _groups(self.read(step + 1))
        is_known = all(len(groups.get(seed, ())) == num_samples for seed in seeds)
        if not is_known:
            new = self.sampler.respond(prompts, num_samples, seeds, step)
            self.again += [response for group in new for response in group] if step + 1 == self.at else []
            return new
        recorded = [groups[seed] for seed in seeds]
        if step + 1 == self.at:
            sampled = self.sampler.sample(prompts, num_samples, seeds)
            kept = [
                Rollout(index, one.sample.sample, one.seed, one.sample.token_ids, one.sample.logprobs, one.sample.ended)
                for index, group in enumerate(recorded)
                for one in group
            ]
            graded = [response for group in self.sampler.judge(prompts, kept, num_samples, step) for response in group]
            self.again += [_of(rollout, response) for rollout, response in zip(sampled, graded, strict=True)]
        return recorded


def _of(rollout: Rollout, response: Response) -> Response:
    """Return what was sampled again, with the outcome and the reward of what was recorded."""
    tokens, logprobs = rollout.token_ids, rollout.logprobs
    return replace(response, sample=replace(response.sample, token_ids=tokens, logprobs=logprobs, ended=rollout.ended))


def _groups(record: Step) -> dict[int, list[Response]]:
    """Return a record's groups by their seeds."""
    groups: dict[int, list[Response]] = {}
    for response in record.responses:
        groups.setdefault(response.seed, []).append(response)
    return groups
