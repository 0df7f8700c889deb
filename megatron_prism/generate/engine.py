"""What every generation engine takes and returns: prompts as token ids, how to sample, and rollouts. No torch here."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_prism.core.errors import Problem

Ending = Literal["end_token", "max_tokens", "max_context"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How each next token is chosen, and when a rollout ends.

    temperature: the logits are divided by it; 0 is greedy. top_k, then top_p, keep the likeliest tokens: so many of them, and the
    smallest set of that probability; the likeliest always stays, and so does what is exactly as likely as the last one kept.
    end_ids: the tokens that end a rollout; the rollout holds the one that ended it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    end_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One continuation of a prompt.

    prompt and sample number it within its call of generate(); seed is its prompt's. token_ids: the tokens after the prompt.
    logprobs: each token's log-probability under softmax(logits / temperature) over the whole vocabulary, so the distribution that was
    sampled from where top_p is 1 and top_k None, which is what policy gradients want; at temperature 0 under softmax(logits).
    ended: by an end token, after max_tokens, or with as many tokens as the model's context holds, the prompt's included.
    """

    prompt: int
    sample: int
    seed: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: Ending


class Engine(Protocol):
    """Continues prompts with one model."""

    def generate(self, prompts: Sequence[Sequence[int]], num_samples: int, sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        """Return num_samples rollouts of each prompt, ordered by prompt and sample; seeds holds one seed a prompt.

        Every rank of the gang calls this with the same arguments, and every rank returns all rollouts. Which number a token is drawn
        with depends on its prompt's seed, the number of its sample and its index in the rollout alone: not on the other prompts, the
        number of rows that decode together, or the layout.
        Raises: InputError with every problem of the arguments, on every rank.
        """
        ...


def seed_of(*numbers: int) -> int:
    """Return a seed (63 bits) of some numbers: seed_of(a run's seed, step, prompt) differs wherever one of them does."""
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
    """Return what is wrong with the arguments of generate()."""
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
