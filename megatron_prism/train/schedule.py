"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from megatron_prism.core.config import ScheduleConfig


def lr_at(step: int, steps: int, lr: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of the `step`-th update (1 to `steps`).

    Linear warm-up to `lr`, then `kind` down to lr * final_factor, reached at the last update. The shapes are
    lm-engine's, whose option names the paper's Tables 16 and 17 use; its exponential meets its end exactly.
    """
    if step <= schedule.warmup_steps:
        return lr * step / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / (steps - schedule.warmup_steps)
    final = schedule.final_factor
    if schedule.kind == "constant":
        factor = 1.0
    elif schedule.kind == "cosine":
        factor = final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    elif schedule.kind == "linear":
        factor = 1 - (1 - final) * progress
    elif schedule.kind == "exponential":
        factor = ((1 - final) * math.exp(1 - progress) + final * math.e - 1) / (math.e - 1)
    else:
        assert schedule.kind == "wsd" and schedule.wsd_decay_steps
        last = schedule.wsd_decay_steps
        factor = 1 - (1 - final) * max(0.0, (step - (steps - last)) / last)
    return lr * factor
