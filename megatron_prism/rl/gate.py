"""The trust gate: what a sampler says it drew, beside what the trainer's own pass says of the same tokens.

It stands at a run's start and after each hand-over of weights. The trainer's side takes the training path: the samples are packed as a step
packs them, and the log-probabilities come from the training forward pass. So the gate sees a multiplier that an engine ignores, weights that
are stale, and state that leaks from one sample into another, on either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_prism.core.config import Precision, SamplingConfig
from megatron_prism.core.errors import Problem, ResultFailure, raise_problems
from megatron_prism.generate.engine import Engine, Rollout, Sampling, seed_of
from megatron_prism.models import forward
from megatron_prism.parallel import groups as ranks
from megatron_prism.parallel.groups import Groups
from megatron_prism.rl import batches
from megatron_prism.rl.batches import Shape
from megatron_prism.rl.losses import k3
from megatron_prism.rl.sample import Sample


@dataclass(frozen=True)
class Bound:
    """The most that may stand between sampler and trainer: kl, the mean over the tokens, and the difference of one token, in nats."""

    kl: float
    difference: float


# fp32: that of rounding. bf16: both sides round, at different places. Two roundings of the logits of a vocabulary of 128k alone can give 1e-3
# (computed for logits of up to 16), so ours is ten times that; a missing multiplier or the weights of another step are beyond it
BOUNDS: dict[Precision, Bound] = {"fp32": Bound(kl=1e-9, difference=1e-3), "bf16": Bound(kl=1e-2, difference=2.0)}
START_PROMPTS, START_SAMPLES, START_TOKENS = 4, 2, 64  # prompts: at least one for each replica
MAX_AHEAD = 8  # of the responses sampled ahead, as many are compared in a step


@dataclass(frozen=True)
class Trust:
    """Sampler beside trainer on one batch. kl: the mean over its tokens of exp(d) - 1 - d, d = trainer - sampler (k3, never negative).

    difference: the largest of a token, and `worst` says which token it is.
    """

    num_tokens: int
    kl: float
    difference: float
    worst: str

    def is_within(self, bound: Bound) -> bool:
        """Return whether both are within a bound. What is not a number is not."""
        return self.kl <= bound.kl and self.difference <= bound.difference


def bound_of(precision: Precision, sampling: SamplingConfig) -> Bound:
    """Return the bound of a precision, with the config's own KL where it names one."""
    bound = BOUNDS[precision]
    return bound if sampling.max_sampler_kl is None else replace(bound, kl=sampling.max_sampler_kl)


def compare(samples: Sequence[Sample], trainer: Sequence[torch.Tensor]) -> Trust:
    """Compare the samples' own log-probabilities with the trainer's (R,) of each sample."""
    sampled = [sample.log_probs().double() for sample in samples]
    differences = [theirs.double() - ours for ours, theirs in zip(sampled, trainer, strict=True)]
    all_T = torch.cat(differences)
    # NaN is the largest of all: max and argmax say so
    number = max(range(len(samples)), key=lambda index: _largest(differences[index]))
    sample, token = samples[number], int(differences[number].abs().argmax())
    said = f"sampler {sampled[number][token]:.6g}, trainer {float(trainer[number][token]):.6g}"
    where = f"prompt {sample.prompt_id} sample {sample.sample}: token {token} (id {sample.token_ids[token]})"
    kl = float(k3(-all_T).mean())
    return Trust(len(all_T), kl, float(all_T.abs().max()), f"{where}: {said}")


def _largest(difference_R: torch.Tensor) -> float:
    largest = float(difference_R.abs().max())
    return float("inf") if largest != largest else largest


def trainer_log_probs(chunks: Sequence[Any], samples: Sequence[Sample], shape: Shape, groups: Groups) -> list[torch.Tensor]:
    """Return the trainer's log-probabilities of each sample's tokens (R,), on the host. Every rank calls this, and gets all of them."""
    plan = batches.plan(samples, shape, groups.dp)
    microbatches = batches.microbatches(plan, groups.dp_rank, samples, [0.0] * len(samples), {})
    mine = batches.by_sample(plan, groups.dp_rank, forward.log_probs(chunks, microbatches, groups))
    parts = ranks.gather(mine, groups.dp_cp_group) if groups.dp > 1 else [mine]
    by_number = {number: values for part in parts for number, values in part.items()}
    return [by_number[number] for number in range(len(samples))]


def measure(
    engine: Engine,
    chunks: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    sampling: Sampling,
    shape: Shape,
    groups: Groups,
) -> Trust:
    """Let the engine continue prompts, and compare. Every rank calls this with the same arguments, and with whole weights (optim.settled).

    Raises: InputError where the sampler draws from another distribution than the one whose log-probabilities it gives.
    """
    raise_problems(check_sampling(sampling))
    seeds = [seed_of(number) for number in range(len(prompts))]
    samples = samples_of(engine.generate(prompts, num_samples, sampling, seeds), prompts)
    return compare(samples, trainer_log_probs(chunks, samples, shape, groups))


def samples_of(rollouts: Sequence[Rollout], prompts: Sequence[Sequence[int]], count: int | None = None) -> list[Sample]:
    """Return rollouts, or `count` of them spread over all, as samples that nobody grades."""
    step = 1 if count is None else -(-len(rollouts) // count)
    return [
        Sample(
            prompt_id=str(rollout.prompt),
            sample=rollout.sample,
            domain="",
            prompt_tokens=tuple(prompts[rollout.prompt]),
            token_ids=rollout.token_ids,
            logprobs=rollout.logprobs,
            ended=rollout.ended,
            weights_step=0,
            outcome="fault",
            reward=0.0,
        )
        for rollout in rollouts[::step]
    ]


def at_start(
    engine: Engine, chunks: Sequence[Any], prompts: Sequence[Sequence[int]], sampling: Sampling, shape: Shape, groups: Groups
) -> Trust:
    """Compare on the longest prompts with a few tokens each, on every replica: what a run does before its first step."""
    some = sorted(prompts, key=lambda tokens: -len(tokens))[: max(START_PROMPTS, groups.dp)]
    short = replace(sampling, max_tokens=min(sampling.max_tokens, START_TOKENS))
    row_tokens = START_SAMPLES * (
        len(some[0]) + short.max_tokens
    )  # a row for each prompt, so that each rank has one; a row holds several samples
    return measure(engine, chunks, some, START_SAMPLES, short, replace(shape, seq_length=min(shape.seq_length, row_tokens)), groups)


def require_kl(samples: Sequence[Sample], mine: Mapping[int, torch.Tensor], bound: Bound, groups: Groups) -> None:
    """Let no step train on samples of a sampler that is not the trainer's; every rank calls this.

    mine: this rank's log-probabilities (R,) by sample. Only their mean is looked at: among a step's millions of tokens one may be far off.
    Raises: ResultFailure naming the token that is furthest off.
    """
    differences = [values.double() - samples[number].log_probs().double() for number, values in mine.items()]
    sums = [float(k3(-one).sum()) for one in differences], [float(len(one)) for one in differences]
    parts = ranks.gather([sum(part) for part in sums], groups.dp_cp_group)
    kl, num_tokens = (sum(part) for part in zip(*parts, strict=True))
    if kl <= bound.kl * num_tokens:
        return
    by_number = {number: values for part in ranks.gather(dict(mine), groups.dp_cp_group) for number, values in part.items()}
    trust = compare(samples, [by_number[number] for number in range(len(samples))])
    require(trust, replace(bound, difference=float("inf")))


def check_sampling(sampling: Sampling) -> list[Problem]:
    """Return what makes a sampler draw from another distribution than the trainer's: its log-probabilities are of the whole vocabulary at T 1."""
    required = "{}: the trainer's log-probabilities are those of the whole vocabulary at temperature 1"
    wrong = []
    if sampling.temperature != 1:
        wrong.append(Problem("rollout.temperature", str(sampling.temperature), required.format("1")))
    if sampling.top_p != 1:
        wrong.append(Problem("rollout.top_p", str(sampling.top_p), required.format("1")))
    if sampling.top_k is not None:
        wrong.append(Problem("rollout.top_k", str(sampling.top_k), required.format("null")))
    return wrong


def require(trust: Trust, bound: Bound) -> None:
    """Let no run go on with a sampler that is not the trainer's.

    Raises: ResultFailure naming the token that is furthest off.
    """
    if not trust.is_within(bound):
        found = f"KL {trust.kl:.3g} over {trust.num_tokens} tokens, largest difference {trust.difference:.3g} nats"
        required = f"at most {bound.kl:g} and {bound.difference:g}"
        raise ResultFailure(f"sampler and trainer disagree: {found}; required: {required}; {trust.worst}; nothing was trained on it")
