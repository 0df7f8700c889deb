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
from megatron_prism.core.config import RLConfig, SamplingConfig
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
    """A sample with what a reader wants to see of it: its text, and why it was graded so."""

    sample: Sample
    text: str
    why: str


Group = Sequence[Response]  # to one prompt


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
        rollout, algorithm = self.config.rollout, self.config.algorithm
        responses = []
        for answer in answers(prompts, num_samples, seeds, rollout, self.engine, self.spec, self.grader):
            prompt, sampled = prompts[answer.rollout.prompt], answer.rollout
            outcome = answer.graded.outcome
            sample = Sample(
                prompt_id=prompt.prompt.id,
                sample=sampled.sample,
                domain=prompt.prompt.domain,
                prompt_tokens=prompt.tokens,
                token_ids=sampled.token_ids,
                logprobs=sampled.logprobs,
                ended=sampled.ended,
                weights_step=step,
                outcome=outcome,
                reward=rewards.reward(outcome, sampled.ended, sampled.token_ids, rollout.max_tokens, algorithm),
            )
            responses.append(Response(sample, answer.text, answer.graded.why))
        return [responses[at : at + num_samples] for at in range(0, len(responses), num_samples)]


@dataclass(frozen=True)
class Answer:
    """A sampled continuation of a prompt, its text without the end token, and its outcome."""

    rollout: Rollout
    text: str
    graded: Graded


def answers(
    prompts: Sequence[Encoded],
    num_samples: int,
    seeds: Sequence[int],
    config: SamplingConfig,
    engine: Engine,
    spec: TokenizerSpec,
    grader: Grades | None,
) -> list[Answer]:
    """Return num_samples graded answers to each prompt, in order of prompt and sample. grader: None but on rank 0. Every rank calls this.

    Raises: on every rank, what the grader raised on rank 0.
    """
    sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature, end_ids=spec.end_ids)
    rollouts = engine.generate([one.tokens for one in prompts], num_samples, sampling, seeds)
    items = []
    for rollout in rollouts:
        one = prompts[rollout.prompt]
        shown = [token for token in rollout.token_ids if token not in spec.end_ids]
        text = tokenizer.continuation(one.tokens, shown, spec)
        items.append(prompt_set.item(one.prompt, f"{rollout.prompt}/{rollout.sample}", text, rollout.ended != "end_token"))
    graded = _graded(items, grader)
    return [Answer(rollout, item.response, graded[item.id]) for rollout, item in zip(rollouts, items, strict=True)]


def _graded(items: Sequence[Item], grader: Grades | None) -> dict[str, Graded]:
    result: dict[str, Graded] | PrismError = {}
    if grader is not None:
        try:
            result = grader.grade(items)
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


def collect(sampler: Sampler, prompts: Sequence[Encoded], num_drawn: int, step: int) -> Rollouts:
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


def validate(sampler: Sampler, prompts: Sequence[Encoded], step: int) -> list[list[Response]]:
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
        write_text(path, "".join(json.dumps(_line(response)) + "\n" for group in groups for response in group))


def _line(response: Response) -> dict[str, Any]:
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
