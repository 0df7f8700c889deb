"""One step off: the responses of the next step, sampled before this step's update, and graded while it trains (rollout.lag 1).

A checkpoint keeps them: the weights that sampled them are gone when a run resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from megatron_prism.core import log
from megatron_prism.rl.rollout import Grading, Group, Sampled, Sampler, Speed, from_lines, samples, to_lines

FILE = "ahead.jsonl"  # in a checkpoint


@dataclass
class Ahead:
    """What is sampled for the next step already; empty at first, and after each `take`."""

    _waiting: Grading | None = None
    _groups: Sequence[Group] = ()
    _num_rewinds: int = 0  # of the run, when they were sampled
    _speed: Speed = field(default_factory=Speed)

    def begin(self, sampler: Sampler, sampled: Sampled, num_rewinds: int) -> None:
        """Begin to grade the responses of the next step."""
        assert self._waiting is None and not self._groups
        self._waiting, self._num_rewinds, self._speed = sampler.grade(sampled), num_rewinds, sampled.speed

    def groups(self) -> Sequence[Group]:
        """Return the next step's groups, graded. Every rank calls this. Raises: on every rank, what the grader raised on rank 0."""
        if self._waiting is not None:
            self._groups, self._waiting = self._waiting.groups(), None
        return self._groups

    def take(self, step: int, lag: int, num_rewinds: int) -> Taken:
        """Return the groups that were sampled for a step, and leave nothing here.

        Those of weights that are more than `lag` updates old, or that the run has gone back behind since, are discarded.
        """
        groups, self._groups = self.groups(), ()
        is_rewound = num_rewinds != self._num_rewinds
        speed, self._speed = self._speed, Speed()
        fresh = [group for group in groups if not is_rewound and lag_of(group, step) <= lag]
        return Taken(fresh, [group for group in groups if not any(group is one for one in fresh)], speed)

    def files(self, num_rewinds: int, is_first: bool) -> dict[str, str]:
        """Return on rank 0 what a checkpoint keeps of it, file names and their texts: nothing where the run has gone back since.

        Every rank calls this: it waits until the responses are graded.
        """
        groups = self.groups()
        return {FILE: to_lines(groups)} if groups and is_first and num_rewinds == self._num_rewinds else {}


def restored(checkpoint: Path) -> Ahead:
    """Return what a checkpoint keeps of it."""
    path = checkpoint / FILE
    return Ahead(_groups=from_lines(path.read_text(encoding="utf-8"), str(path))) if path.is_file() else Ahead()


@dataclass(frozen=True)
class Taken:
    """A step's groups that were sampled ahead, and those that nobody trains on. speed: of both, where this process sampled them."""

    groups: Sequence[Group] = ()
    discarded: Sequence[Group] = field(default=())
    speed: Speed = field(default_factory=Speed)

    def figures(self) -> dict[str, float]:
        """Return the metrics of what was discarded: what is thrown away must not be the short answers, or the wrong ones, alone."""
        gone = samples(self.discarded)
        if not gone:
            return {}
        return {
            "discarded": float(len(gone)),
            "discarded_tokens": fmean(len(sample.token_ids) for sample in gone),
            "discarded_reward": fmean(sample.reward for sample in gone),
        }

    def say(self, step: int) -> None:
        """Name in the log what was discarded."""
        if values := self.figures():
            shown = "  ".join(f"{name} {value:g}" for name, value in values.items())
            log.get().warning("step %d: responses of weights that are too old, or were given up, are not trained on: %s", step, shown)


def lag_of(group: Group, step: int) -> int:
    """Return how many updates lie between the weights that sampled a group and those that it trains, in this step."""
    return step - 1 - group[0].sample.weights_step
