"""What a step samples: prompts are drawn, continued by the engine, graded on rank 0, and rewarded. Every rank returns the same groups.

A response's random numbers depend on the run's seed, the step, its prompt's draw and its own number. A run that resumes draws them again.
A thread of the Sampler makes every call of the grader: what is sampled ahead of its step (rollout.lag) is graded while the step before trains.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_prism.core import disk
from megatron_prism.core.check.rl import ROLLOUTS
from megatron_prism.core.config import ModelConfig, RLConfig, SamplingConfig
from megatron_prism.core.errors import InputError, PrismError, Problem
from megatron_prism.core.manifest import write_text
from megatron_prism.data import tokenizer
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.generate import engines
from megatron_prism.generate.engine import Engine, Rollout, Sampling, ids_of, logprobs_of, seed_of
from megatron_prism.grade.outcome import Graded, Item, item_of
from megatron_prism.parallel.groups import Groups, from_first, shared
from megatron_prism.rl import rewards
from megatron_prism.rl.advantages import group_of, is_kept
from megatron_prism.rl.order import Order
from megatron_prism.rl.prompts import Prompt
from megatron_prism.rl.sample import Sample

FOLDER = ROLLOUTS
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


def max_context(config: RLConfig, model: ModelConfig) -> int:
    """Return the most tokens of a prompt and its response: a row of the batch holds all but the last."""
    return min(config.batch.seq_length + 1, model.max_position_embeddings)


def engine(config: RLConfig, chunks: Sequence[Any], model: ModelConfig, assets: Path, groups: Groups) -> Engine:
    """Return the engine that a run's config names, over this rank's model chunks; every rank calls this."""
    return engines.engine_of(config.rollout, config.precision, max_context(config, model), chunks, model, assets, groups)


@dataclass(frozen=True)
class Speed:
    """What an engine sampled, and in how many seconds of its own."""

    num_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Speed) -> Speed:
        return Speed(self.num_tokens + other.num_tokens, self.seconds + other.seconds)

    def tokens_per_s(self) -> float | None:
        """Return the tokens per second; None where nothing was sampled."""
        return self.num_tokens / self.seconds if self.num_tokens else None


@dataclass(frozen=True)
class Sampled:
    """Responses that are not graded. weights_step: the step whose weights sampled them. num_drawn: the prompts drawn up to them, in a run."""

    prompts: Sequence[Encoded]
    rollouts: Sequence[Rollout]
    items: Sequence[Item]
    weights_step: int
    speed: Speed = Speed()
    num_drawn: int = 0


def sample(
    engine: Engine,
    spec: TokenizerSpec,
    config: SamplingConfig,
    prompts: Sequence[Encoded],
    num_samples: int,
    seeds: Sequence[int],
    weights_step: int,
) -> Sampled:
    """Return num_samples responses of each prompt, in order of prompt and sample, with their texts. Every rank calls this."""
    sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature, end_ids=spec.end_ids)
    began = time.perf_counter()
    rollouts = engine.generate([one.tokens for one in prompts], num_samples, sampling, seeds)
    speed = Speed(sum(len(rollout.token_ids) for rollout in rollouts), time.perf_counter() - began)
    return Sampled(prompts, rollouts, items_of(prompts, rollouts, spec), weights_step, speed)


def items_of(prompts: Sequence[Encoded], rollouts: Sequence[Rollout], spec: TokenizerSpec) -> list[Item]:
    """Return responses as the grader takes them, on every rank: their texts without end tokens.

    Each rank makes the texts of its part. The tokenizer takes seconds for a step of long ones, in which no device would work.
    """
    texts = shared(lambda one: tokenizer.continuation(prompts[one.prompt].tokens, one.token_ids, spec), rollouts)
    return [
        item_of(prompts[one.prompt].prompt, f"{one.prompt}/{one.sample}", text, one.ended != "end_token")
        for one, text in zip(rollouts, texts, strict=True)
    ]


def grade(grader: Grades | None, items: Sequence[Item]) -> dict[str, Graded] | PrismError:
    """Return what the grader says or raises on rank 0, and nothing elsewhere, where there is none. Without items it is not called."""
    try:
        return grader.grade(items) if grader is not None and items else {}
    except PrismError as error:
        return error


def agreed(outcomes: dict[str, Graded] | PrismError) -> dict[str, Graded]:
    """Return rank 0's outcomes on every rank. Raises: on every rank, the error that rank 0 has."""
    outcomes = from_first(outcomes)
    if isinstance(outcomes, PrismError):
        raise outcomes.agreed()
    return outcomes


@dataclass(frozen=True)
class Sampler:
    """Engine, tokenizer and grader as one: from prompts to graded responses. grader: None but on rank 0. One thread makes all its calls."""

    config: RLConfig
    engine: Engine
    spec: TokenizerSpec
    grader: Grades | None
    _thread: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "grade"))

    def sample(self, prompts: Sequence[Encoded], num_samples: int, seeds: Sequence[int], step: int) -> Sampled:
        """Return num_samples responses of each prompt, by the weights of a step. Every rank calls this."""
        return sample(self.engine, self.spec, self.config.rollout, prompts, num_samples, seeds, step)

    def grade(self, sampled: Sampled) -> Grading:
        """Begin to grade responses on rank 0. Every rank calls this."""
        return Grading(self, sampled, self._thread.submit(grade, self.grader, sampled.items))

    def responses(self, sampled: Sampled, outcomes: dict[str, Graded] | PrismError) -> list[list[Response]]:
        """Return responses with rank 0's outcomes, by prompt. Every rank calls this. Raises: on every rank, the error that rank 0 has.

        Each rank makes the rewards of its part: the repetition of 8,192 long responses takes a minute, in which no device would work.
        """
        by_id = agreed(outcomes)
        graded = [by_id[item.id] for item in sampled.items]
        values = shared(self._reward, list(zip(sampled.rollouts, graded, strict=True)))
        groups: list[list[Response]] = [[] for _ in sampled.prompts]
        for rollout, item, one, reward in zip(sampled.rollouts, sampled.items, graded, values, strict=True):
            groups[rollout.prompt].append(self._response(sampled, rollout, item, one, reward))
        return groups

    def _reward(self, response: tuple[Rollout, Graded]) -> float:
        rollout, graded = response
        return rewards.reward(graded.outcome, rollout.ended, rollout.token_ids, self.config.rollout.max_tokens, self.config.algorithm)

    def _response(self, sampled: Sampled, rollout: Rollout, item: Item, graded: Graded, reward: float) -> Response:
        prompt = sampled.prompts[rollout.prompt]
        sample = Sample(
            prompt_id=prompt.prompt.id,
            sample=rollout.sample,
            domain=prompt.prompt.domain,
            prompt_tokens=prompt.tokens,
            token_ids=rollout.token_ids,
            logprobs=rollout.logprobs,
            ended=rollout.ended,
            weights_step=sampled.weights_step,
            outcome=graded.outcome,
            reward=reward,
        )
        return Response(sample, item.response, graded.why, rollout.seed)


@dataclass(frozen=True)
class Grading:
    """Responses that the Sampler's thread is grading. Every rank has one, and every rank asks for its groups."""

    sampler: Sampler
    sampled: Sampled
    outcomes: Future[dict[str, Graded] | PrismError]

    def groups(self) -> list[list[Response]]:
        """Return the graded groups, once they are. Raises: on every rank, what the grader raised on rank 0; a defect's error on rank 0 alone."""
        return self.sampler.responses(self.sampled, self.outcomes.result())


@dataclass(frozen=True)
class Rollouts:
    """A step's groups: all that were sampled, those that are trained on, and the prompts drawn in the run after them."""

    groups: Sequence[Group]
    kept: Sequence[Group]
    num_drawn: int
    speed: Speed = Speed()


def draw(sampler: Sampler, prompts: Sequence[Encoded], num_drawn: int, count: int, step: int, weights_step: int) -> Sampled:
    """Draw the next `count` prompts after num_drawn, for a step, and sample a group of responses to each by the weights of weights_step."""
    config = sampler.config
    draws = Order(len(prompts), config.seed).draw(num_drawn, count)
    seeds = [seed_of(config.seed, step, one.number) for one in draws]
    sampled = sampler.sample([prompts[one.prompt] for one in draws], config.rollout.num_samples, seeds, weights_step)
    return replace(sampled, num_drawn=num_drawn + count)


def collect(
    sampler: Sampler,
    prompts: Sequence[Encoded],
    num_drawn: int,
    step: int,
    ahead: Sequence[Group] = (),
    speed: Speed = Speed(),
    weights_step: int | None = None,
) -> Rollouts:
    """Return a step's groups: those that were sampled ahead, or new ones by the weights of weights_step, or else of the step before it.

    num_drawn: the prompts drawn so far, with those of `ahead`. speed: of `ahead`. Groups without variance are drawn again, at most max_refills times.
    """
    config = sampler.config
    weights_step = step - 1 if weights_step is None else weights_step
    groups: list[Group] = []
    kept: list[Group] = []
    for attempt in range(1 + config.rollout.max_refills):
        if not (missing := config.rollout.num_prompts - len(kept)):
            break
        if attempt == 0 and ahead:
            drawn = list(ahead)
        else:
            sampled = draw(sampler, prompts, num_drawn, missing, step, weights_step)
            drawn = [*sampler.grade(sampled).groups()]
            num_drawn, speed = sampled.num_drawn, speed + sampled.speed
        groups += drawn
        kept += [group for group in drawn if is_kept(group_of(samples([group]), config.algorithm), config.algorithm)]
    return Rollouts(groups, kept, num_drawn, speed)


def validate(sampler: Sampler, prompts: Sequence[Encoded], step: int) -> list[list[Response]]:
    """Return responses to the held-out prompts. Each validation of a run draws with the same seeds."""
    seeds = [seed_of(sampler.config.seed, VALIDATION, index) for index in range(len(prompts))]
    return sampler.grade(sampler.sample(prompts, sampler.config.validation.num_samples, seeds, step)).groups()


def samples(groups: Sequence[Group]) -> list[Sample]:
    """Return the samples of groups, in order."""
    return [response.sample for group in groups for response in group]


def write(run_dir: Path, step: int, groups: Sequence[Group]) -> None:
    """Write a step's responses, a line each."""
    path = run_dir / FOLDER / f"step_{step:08d}.jsonl"
    with disk.writing(path):
        path.parent.mkdir(exist_ok=True)
        write_text(path, to_lines(groups))


def to_lines(groups: Sequence[Group]) -> str:
    """Return responses as lines of JSON. Every number is written in full."""
    return "".join(json.dumps(_line(response)) + "\n" for group in groups for response in group)


def from_lines(text: str, where: str) -> list[list[Response]]:
    """Return the groups of such lines: a group begins where a sample has number 0. where: the file they are of.

    Raises: InputError with the line that is no response of its group.
    """
    groups: list[list[Response]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            response = _response(json.loads(line))
            if response.sample.sample == 0:
                groups.append([])
            if not groups:
                raise ValueError(f"sample {response.sample.sample}, and none before it")
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(Problem(f"{where}:{number}", found, "a response, as a run writes it")) from None
        groups[-1].append(response)
    return groups


def _response(values: dict[str, Any]) -> Response:
    """Return a line's response. Raises: ValueError, TypeError, AttributeError, KeyError or OverflowError where it is none."""
    shown, why, seed = values.pop("text"), values.pop("why"), values.pop("seed")
    prompt, tokens, logprobs = tuple(values.pop("prompt_tokens")), ids_of(values.pop("token_ids")), logprobs_of(values.pop("logprobs"))
    sample = Sample(prompt_id=values.pop("id"), prompt_tokens=prompt, token_ids=tokens, logprobs=logprobs, **values)
    return Response(sample, shown, why, seed)


def _line(response: Response) -> dict[str, Any]:
    sample = response.sample
    return {
        "id": sample.prompt_id,
        "sample": sample.sample,
        "seed": response.seed,
        "domain": sample.domain,
        "weights_step": sample.weights_step,
        "text": response.text,
        "outcome": sample.outcome,
        "why": response.why,
        "reward": sample.reward,
        "ended": sample.ended,
        "prompt_tokens": sample.prompt_tokens,
        "token_ids": sample.token_ids.tolist(),
        "logprobs": sample.logprobs.tolist(),
    }
