"""Whether a step may be applied: loss and gradients are finite, and the loss is no spike. Decided before the weights move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from statistics import median
from typing import Any

from megatron_prism.core.config import GuardConfig
from megatron_prism.parallel import groups

FLOOR = 0.01  # the least deviation, as a part of the median: losses that hardly move would make every step a spike


class Verdict(IntEnum):
    """What to do with a step, in order of gravity. Ranks whose verdicts differ agree on the largest."""

    TAKE = 0
    SKIP = 1
    REWIND = 2
    STOP = 3


@dataclass(frozen=True)
class Decision:
    """What all ranks do with a step. Equal on every rank, except `why`: this rank's reason not to take the step.

    stop_reason: why the run stops after this step (train/stop.py); 0: it does not. is_writing: whether any rank still writes a checkpoint.
    """

    verdict: Verdict
    why: str
    stop_reason: float
    is_writing: bool

    @property
    def is_taken(self) -> bool:
        return self.verdict is Verdict.TAKE


@dataclass
class Guard:
    """The losses of the last steps taken, and the number of steps passed over. Both are saved in a checkpoint, so a resumed run judges alike."""

    config: GuardConfig
    losses: list[float] = field(default_factory=list)
    num_events: int = 0

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps for a resumed run."""
        return {"losses": self.losses, "num_events": self.num_events}

    def judge(self, loss: float, grad_norm: float) -> tuple[Verdict, str]:
        """Return the verdict on a measured step, and the reason where it is not taken."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return self._event(self.config.on_nonfinite, f"loss {loss}, gradient norm {grad_norm}: not a number")
        if self.config.on_spike != "ignore" and loss > (limit := spike_limit(self.losses, self.config)):
            return self._event(self.config.on_spike, f"loss {loss:.4f} above {limit:.4f} (guard.on_spike)")
        return Verdict.TAKE, ""

    def _event(self, policy: str, reason: str) -> tuple[Verdict, str]:
        if policy != "stop" and self.num_events >= self.config.max_events:
            return Verdict.STOP, f"{reason}; {self.num_events} steps were passed over before (guard.max_events)"
        return Verdict[policy.upper()], reason

    def took(self, loss: float) -> None:
        """Remember the loss of a step that was taken."""
        self.losses = [*self.losses, loss][-self.config.spike_window :]

    def passed_over(self) -> None:
        """Count a step that was not taken."""
        self.num_events += 1


def decide(guard: Guard, loss: float, grad_norm: float, stop_reason: float, is_writing: bool) -> Decision:
    """Judge a measured step on every rank, and return what the ranks agree on: the largest of each answer, in one collective."""
    verdict, why = guard.judge(loss, grad_norm)
    agreed = groups.agree([verdict, stop_reason, is_writing])
    agreed_verdict = Verdict(int(agreed[0]))
    elsewhere = "" if agreed_verdict is Verdict.TAKE else "not right on another rank"
    return Decision(agreed_verdict, why or elsewhere, agreed[1], agreed[2] != 0)


def spike_limit(losses: Sequence[float], config: GuardConfig) -> float:
    """Return the loss above which a step is a spike. It is infinite until the window of losses is full."""
    if len(losses) < config.spike_window:
        return math.inf
    middle = median(losses)
    deviation = median(abs(loss - middle) for loss in losses)
    return middle + config.spike_deviations * max(deviation, FLOOR * abs(middle))
