"""What a step samples: prompts are drawn, continued by the engine, graded on rank 0, and rewarded. Every rank returns the same groups.

A response's random numbers depend on the run's seed, the step, its prompt's draw and its own number. A run that resumes draws them again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_prism.core import disk
from megatron_prism.core.config import RLConfig
from megatron_prism.core.errors import PrismError
from megatron_prism.core.manifest import write_text
from megatron_prism.data import tokenizer
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.generate.engine import Engine, Rollout, Sampling, seed_of
from megatron_prism.grade.outcome import Graded, Item
from megatron_prism.parallel.groups import from_first
from megatron_prism.rl import prompts as prompt_set
from megatron_prism.rl import rewards
from megatron_prism.rl.advantages import group_of, is_kept
from megatron_prism.rl.order import Order
from megatron_prism.rl.prompts import Prompt
from megatron_prism.rl.sample import Sample

FOLDER = "rollouts"
VALIDATION = 0  # in place of a step, in the seeds of validation: training begins with step 1


class Grades(Protocol):
    """What grades responses (grade.grader.Grader)."""

    def grade(self, items: Sequence[Item]) -> dict[str, Graded]:
        """Return each item's outcome by its id."""
        ...


@dataclass(frozen=True)
class Encoded:
    """A prompt and its tokens."""

    prompt: Prompt
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Response:
    """A sample with what a reader wants to see of it: its text, why it was graded so, and the seed of its group."""

    sample: Sample
    text: str
    why: str
    seed: int


Group = Sequence[Response]  # to one prompt


class Responds(Protocol):
    """What gives a step its responses: a Sampler, or what reads them of a record (rl/replay.py)."""

    @property
    def config(self) -> RLConfig: ...

    def respond(self, prompts: Sequence[Encoded], num_samples: int, seeds: Sequence[int], step: int) -> list[list[Response]]:
        """Return num_samples graded responses of each prompt, by the weights of a step. Every rank calls this."""
        ...


@dataclass(frozen=True)
class Sampler:
    """Engine, tokenizer and grader as one: from prompts to graded responses. grader: None but on rank 0."""

    config: RLConfig
    engine: Engine
    spec: TokenizerSpec
    grader: Grades | None

    def respond(self, prompts: Sequence[Encoded], num_samples: int, seeds: Sequence[int], step: int) -> list[list[Response]]:
        """Return num_samples graded responses of each prompt, by the weights of a step. Every rank calls this.

        Raises: on every rank, what the grader raised on rank 0.
        """
        return self.judge(prompts, self.sample(prompts, num_samples, seeds), num_samples, step)

    def sample(self, prompts: Sequence[Encoded], num_samples: int, seeds: Sequence[int]) -> list[Rollout]:
        """Return the engine's rollouts, ordered by prompt and sample."""
        rollout = self.config.rollout
        sampling = Sampling(max_tokens=rollout.max_tokens, temperature=rollout.temperature, end_ids=self.spec.end_ids)
        return self.engine.generate([one.tokens for one in prompts], num_samples, sampling, seeds)

    def judge(self, prompts: Sequence[Encoded], rollouts: Sequence[Rollout], num_samples: int, step: int) -> list[list[Response]]:
        """Return rollouts of the weights of a step as graded and rewarded responses, num_samples of each prompt.

        Raises: on every rank, what the grader raised on rank 0.
        """
        max_tokens = self.config.rollout.max_tokens
        items, responses = [], []
        for rollout in rollouts:
            one = prompts[rollout.prompt]
            shown = [token for token in rollout.token_ids if token not in self.spec.end_ids]
            text = tokenizer.continuation(one.tokens, shown, self.spec)
            items.append(prompt_set.item(one.prompt, f"{rollout.prompt}/{rollout.sample}", text, rollout.ended != "end_token"))
        graded = self._grade(items)
        for rollout, item in zip(rollouts, items, strict=True):
            prompt, outcome = prompts[rollout.prompt], graded[item.id]
            reward = rewards.reward(outcome.outcome, rollout.ended, rollout.token_ids, max_tokens, self.config.algorithm)
            sample = Sample(
                prompt_id=prompt.prompt.id,
                sample=rollout.sample,
                domain=prompt.prompt.domain,
                prompt_tokens=prompt.tokens,
                token_ids=rollout.token_ids,
                logprobs=rollout.logprobs,
                ended=rollout.ended,
                weights_step=step,
                outcome=outcome.outcome,
                reward=reward,
            )
            responses.append(Response(sample, item.response, outcome.why, rollout.seed))
        return [responses[at : at + num_samples] for at in range(0, len(responses), num_samples)]

    def _grade(self, items: Sequence[Item]) -> dict[str, Graded]:
        result: dict[str, Graded] | PrismError = {}
        if self.grader is not None:
            try:
                result = self.grader.grade(items)
            except PrismError as error:
                result = error
        result = from_first(result)
        if isinstance(result, PrismError):
            raise result.agreed()
        return result


@dataclass(frozen=True)
class Rollouts:
    """A step's groups: all that were sampled, those that are trained on, and the prompts drawn in the run after them."""

    groups: Sequence[Group]
    kept: Sequence[Group]
    num_drawn: int


def collect(sampler: Responds, prompts: Sequence[Encoded], num_drawn: int, step: int) -> Rollouts:
    """Sample a step's groups, with the weights of the step before it. Groups without variance are drawn again, at most max_refills times."""
    config, order = sampler.config, Order(len(prompts), sampler.config.seed)
    groups: list[Group] = []
    kept: list[Group] = []
    for _ in range(1 + config.rollout.max_refills):
        if not (missing := config.rollout.num_prompts - len(kept)):
            break
        draws = order.draw(num_drawn, missing)
        num_drawn += missing
        seeds = [seed_of(config.seed, step, draw.number) for draw in draws]
        drawn = sampler.respond([prompts[draw.prompt] for draw in draws], config.rollout.num_samples, seeds, step - 1)
        groups += drawn
        kept += [group for group in drawn if is_kept(group_of(samples([group]), config.algorithm), config.algorithm)]
    return Rollouts(groups, kept, num_drawn)


def validate(sampler: Responds, prompts: Sequence[Encoded], step: int) -> list[list[Response]]:
    """Return responses to the held-out prompts. Each validation of a run draws with the same seeds."""
    seeds = [seed_of(sampler.config.seed, VALIDATION, index) for index in range(len(prompts))]
    return sampler.respond(prompts, sampler.config.validation.num_samples, seeds, step)


def samples(groups: Sequence[Group]) -> list[Sample]:
    """Return the samples of groups, in order."""
    return [response.sample for group in groups for response in group]


def write(run_dir: Path, step: int, groups: Sequence[Group]) -> None:
    """Write a step's responses, a line each."""
    path = run_dir / FOLDER / f"step_{step:08d}.jsonl"
    with disk.writing(path):
        path.parent.mkdir(exist_ok=True)
        write_text(path, "".join(json.dumps(line(response)) + "\n" for group in groups for response in group))


def line(response: Response) -> dict[str, Any]:
    """Return a response as a line of JSON."""
    sample = response.sample
    return {
        "id": sample.prompt_id,
        "sample": sample.sample,
        "domain": sample.domain,
        "text": response.text,
        "outcome": sample.outcome,
        "why": response.why,
        "reward": sample.reward,
        "ended": sample.ended,
        "token_ids": sample.token_ids,
        "logprobs": sample.logprobs,
    }
