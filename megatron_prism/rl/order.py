"""Which prompts a run draws, in which order: a pure function of the seed and the number of prompts drawn before. No table, no state.

Each epoch permutes the prompt set anew. A run keeps one number, the prompts drawn so far: a step that draws more prompts than it trains on
(zero-variance groups are refilled) counts all of them, and a resumed run continues with the next.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from megatron_prism.data.walk import permute


class Draw(NamedTuple):
    """The prompt that is drawn as number `number` of a run (from 0): its epoch, and its place in the prompt set.

    A step may draw a prompt twice where an epoch ends. `number` differs, so a rollout's seed is made from it, not from the prompt alone.
    """

    number: int
    epoch: int
    prompt: int


@dataclass(frozen=True)
class Order:
    """The prompts of a run, in the order of drawing. num_prompts: the size of the prompt set."""

    num_prompts: int
    seed: int

    def __post_init__(self) -> None:
        assert self.num_prompts > 0

    def draw(self, num_drawn: int, count: int) -> list[Draw]:
        """Return the next `count` prompts after num_drawn."""
        return [self.at(number) for number in range(num_drawn, num_drawn + count)]

    def at(self, number: int) -> Draw:
        """Return which prompt is drawn as number `number`."""
        assert number >= 0
        epoch, position = divmod(number, self.num_prompts)
        return Draw(number, epoch, permute(position, self.num_prompts, self._key(epoch)))

    def number(self, epoch: int, prompt: int) -> int:
        """Return when a prompt is drawn in an epoch, the inverse of `at`."""
        return epoch * self.num_prompts + permute(prompt, self.num_prompts, self._key(epoch), back=True)

    def _key(self, epoch: int) -> bytes:
        return hashlib.blake2b(f"prompts/{self.seed}/{epoch}".encode(), digest_size=16).digest()
