"""Validation, checkpoints, the guard, limits and logs of a training run: sections of TrainConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_prism.core.config.section import Range, Section


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Section):
    """Validation on the documents that the mixture holds out."""

    interval: Annotated[int, Range(ge=0)] = 0
    """The steps between validations. 0: only at the start and at the end."""

    sequences: Annotated[int, Range(ge=1)] = 64
    """The most sequences of each source."""


@dataclass(frozen=True, kw_only=True)
class SaveConfig(Section):
    """When to save checkpoints, and which to keep."""

    interval: Annotated[int, Range(ge=0)] = 0
    """The steps between saves. 0: only the last step."""

    keep_last: Annotated[int, Range(ge=1)] = 2
    """The number of newest checkpoints to keep."""

    keep_every: Annotated[int, Range(ge=0)] = 0
    """Also keep the checkpoints of every multiple of this many steps. 0: none."""

    background: bool = True
    """Training continues while a checkpoint is written."""

    timeout_s: Annotated[float, Range(gt=0)] = 1200.0
    """A save that takes longer is aborted with an error. Must be less than limits.collective_timeout_s."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Section):
    """What to do with a step whose loss or gradients are bad. It is never applied to the weights. The paper states no guard: ours.

    stop: the run ends with exit code 1. skip: the step is not applied, and its data is skipped. rewind: the run returns to the last
    checkpoint, and skips the data from there to this step.
    """

    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """When the loss or the gradient norm is NaN or inf."""

    on_spike: Literal["ignore", "stop", "skip", "rewind"] = "ignore"
    """When the loss is above the median of the last spike_window steps by more than spike_deviations times their median absolute deviation."""

    spike_window: Annotated[int, Range(ge=1)] = 100
    """The number of last steps that a spike is measured against."""

    spike_deviations: Annotated[float, Range(gt=0)] = 20.0
    """The number of median absolute deviations above the median that make a spike."""

    max_events: Annotated[int, Range(ge=0)] = 10
    """The run stops after more skips and rewinds than this."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig(Section):
    """When a run stops by itself."""

    wall_clock_s: Annotated[float | None, Range(gt=0)] = None
    """After this time the run saves and exits with code 3, to be started again. Null: never."""

    collective_timeout_s: Annotated[float, Range(gt=0)] = 1800.0
    """A rank that waits longer than this for another one fails."""

    hang_timeout_s: Annotated[float | None, Range(gt=0)] = 3600.0
    """A step, a validation or a save that takes longer ends the process, with every thread's stack on standard error. Null: never."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    """What a run writes about itself."""

    interval: Annotated[int, Range(ge=1)] = 1
    """The steps between two lines of metrics."""

    peak_tflops: Annotated[float | None, Range(gt=0)] = None
    """The device's dense peak in the run's precision, for MFU. Null: the known peak of an H100, H200 or A100."""

    samples: bool = False
    """Write which sequences each step read (samples/rank_N.jsonl)."""

    timers: bool = True
    """Write the seconds of a step by phase, and the slowest rank."""
