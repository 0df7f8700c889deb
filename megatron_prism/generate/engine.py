"""The interface of all generation engines: prompts as token ids, sampling settings, and rollouts. No torch here."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_prism.core.errors import CheckpointError, Problem

Ending = Literal["end_token", "stop", "max_tokens", "max_context"]
Stop = Callable[[Sequence[int]], bool]  # says whether a rollout's tokens end it; equal on every rank, also in its repr


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How each next token is chosen, and when a rollout ends.

    temperature: divides the logits; 0 is greedy. top_k keeps this many of the likeliest tokens, then top_p the smallest set of at least this
    probability. The likeliest token is always kept, and so are tokens exactly as likely as the last one kept.
    end_ids: the tokens that end a rollout. The rollout includes the end token. stop: ends one too, for example by its text (stop.StopTexts).
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    end_ids: tuple[int, ...] = ()
    stop: Stop | None = None


@dataclass(frozen=True)
class Rollout:
    """One continuation of a prompt.

    prompt and sample: its indices within the call of generate(). seed: its prompt's. token_ids: the tokens after the prompt (int32).
    logprobs: each token's log-probability under softmax(logits / temperature) over the whole vocabulary (fp32). With top_p 1 and top_k None
    this is the distribution that was sampled, as policy gradients require. At temperature 0 it is softmax(logits). Empty where the engine has
    none. Arrays, since every rank holds all rollouts of a step: 8 bytes a token, where tuples take 68.
    ended: by an end token, by sampling.stop, after max_tokens, or when prompt and rollout fill the model's context.
    """

    prompt: int
    sample: int
    seed: int
    token_ids: array[int]
    logprobs: array[float]
    ended: Ending


def ids_of(tokens: Iterable[int]) -> array[int]:
    """Return tokens as rollouts hold them."""
    return array("i", tokens)


def logprobs_of(values: Iterable[float]) -> array[float]:
    """Return log-probabilities as rollouts hold them."""
    return array("f", values)


class Engine(Protocol):
    """Continues prompts with one model."""

    def generate(self, prompts: Sequence[Sequence[int]], num_samples: int, sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        """Return num_samples rollouts of each prompt, ordered by prompt and sample. seeds: one seed per prompt.

        Every rank of the gang calls this with the same arguments, and every rank returns all rollouts. The random number for a token
        depends only on its prompt's seed, its sample's number and its index in the rollout. It does not depend on the other prompts, the
        number of rows that decode together, or the layout.
        Raises: InputError with every problem of the arguments, on every rank.
        """
        ...


def longest_first(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the prompts' indices in the order in which replicas take turns with them."""
    return sorted(range(len(prompts)), key=lambda prompt: -len(prompts[prompt]))


def in_order(parts: Iterable[Sequence[Rollout]]) -> list[Rollout]:
    """Return the replicas' rollouts, ordered by prompt and sample."""
    return sorted((rollout for part in parts for rollout in part), key=lambda rollout: (rollout.prompt, rollout.sample))


def not_finite(where: str) -> CheckpointError:
    """Return the error of a model whose logits are NaN or inf: whatever is drawn, scored or chosen by them says nothing of it."""
    return CheckpointError(Problem(where, "logits that are NaN or inf", "finite logits", "look for damaged or far too large weights"))


def seed_of(*numbers: int) -> int:
    """Return a seed (63 bits) from numbers, for example seed_of(a run's seed, step, prompt). It differs wherever one number differs."""
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def problems(
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    sampling: Sampling,
    seeds: Sequence[int],
    vocab_size: int,
    max_context: int,
    max_shown: int = 8,
) -> list[Problem]:
    """Return the problems of the arguments of generate()."""
    wrong = []
    for name, value, is_right, required in (
        ("num_samples", num_samples, num_samples >= 1, "at least 1"),
        ("sampling.max_tokens", sampling.max_tokens, sampling.max_tokens >= 1, "at least 1"),
        ("sampling.temperature", sampling.temperature, 0 <= sampling.temperature < math.inf, "0 (greedy) or more, and finite"),
        ("sampling.top_p", sampling.top_p, 0 <= sampling.top_p <= 1, "0 to 1"),
        ("sampling.top_k", sampling.top_k, sampling.top_k is None or sampling.top_k >= 1, "at least 1, or None"),
        ("seeds", f"{len(seeds)} seeds", len(seeds) == len(prompts), f"one for each of {len(prompts)} prompts"),
    ):
        if not is_right:
            wrong.append(Problem(name, str(value), required))
    for number, prompt in enumerate(prompts):
        where = f"prompts[{number}]"
        if not 1 <= len(prompt) < max_context:
            wrong.append(Problem(where, f"{len(prompt)} tokens", f"1 to {max_context - 1}: a context of {max_context} holds one more"))
        elif not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong.append(Problem(where, f"token ids {min(prompt)} to {max(prompt)}", f"0 to {vocab_size - 1}"))
    more = len(wrong) - max_shown
    return wrong[:max_shown] + ([Problem("prompts", f"{more} problems more", "none")] if more > 0 else [])
