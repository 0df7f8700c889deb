"""A graded response: what reinforcement learning knows of one, from the sampler to the loss."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import torch

from megatron_prism.generate.engine import Ending
from megatron_prism.grade.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response to a prompt. The sampled ids are what is trained on: nothing is tokenised again.

    sample: its number within its group. token_ids, logprobs and ended: the engine's (engine.Rollout), a log-probability for each token. weights_step: the step
    whose weights sampled it. reward: with its penalties (rewards.reward).
    Raises: ValueError where there is nothing to train on: no prompt, no token, or not one log-probability a token.
    """

    prompt_id: str
    sample: int
    domain: str
    prompt_tokens: tuple[int, ...]
    token_ids: array[int]
    logprobs: array[float]
    ended: Ending
    weights_step: int
    outcome: Outcome
    reward: float

    def __post_init__(self) -> None:
        if not self.prompt_tokens or not self.token_ids or len(self.logprobs) != len(self.token_ids):
            sizes = f"{len(self.prompt_tokens)} prompt tokens, {len(self.token_ids)} tokens and {len(self.logprobs)} log-probabilities"
            raise ValueError(f"sample {self.sample} of prompt {self.prompt_id!r} has {sizes}")

    def log_probs(self) -> torch.Tensor:
        """Return the sampler's log-probabilities as a tensor (R,) of its own."""
        return torch.from_numpy(np.array(self.logprobs))

    @property
    def is_right(self) -> bool:
        """Say whether the answer is right: the outcome without penalties."""
        return self.outcome == "right"
