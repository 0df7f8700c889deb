"""How a training run watches itself, what it keeps, and when it stops: sections of TrainConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_prism.core.config.section import Range, Section


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Section):
    """Validation on the documents that the mixture holds out."""

    interval: Annotated[int, Range(ge=0)] = 0
    """Validate every so many steps. 0: at the start and at the end alone."""

    sequences: Annotated[int, Range(ge=1)] = 64
    """At most so many sequences of each source."""


@dataclass(frozen=True, kw_only=True)
class SaveConfig(Section):
    """Checkpoints, and which of them stay."""

    interval: Annotated[int, Range(ge=0)] = 0
    """Save every so many steps. 0: the last step alone."""

    keep_last: Annotated[int, Range(ge=1)] = 2
    """The newest so many checkpoints stay."""

    keep_every: Annotated[int, Range(ge=0)] = 0
    """Checkpoints of multiples of so many steps stay too. 0: none."""

    background: bool = True
    """Training goes on while a checkpoint is written."""

    timeout_s: Annotated[float, Range(gt=0)] = 1200.0
    """A save that takes longer is given up, with an error. Less than limits.collective_timeout_s."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Section):
    """What happens to a step whose loss or gradients cannot be right. The weights never take it. The paper states no guard: ours.

    stop: the run ends with exit code 1. skip: the step is not taken, and its data is passed over. rewind: the run goes back to the last
    checkpoint, and passes over the data from there to this step.
    """

    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """When the loss or the gradient norm is NaN or inf."""

    on_spike: Literal["ignore", "stop", "skip", "rewind"] = "ignore"
    """When the loss is above the median of the last spike_window steps by more than spike_deviations times their median absolute deviation."""

    spike_window: Annotated[int, Range(ge=1)] = 100
    """The steps that a spike is measured against."""

    spike_deviations: Annotated[float, Range(gt=0)] = 20.0
    """How many median absolute deviations above the median make a spike."""

    max_events: Annotated[int, Range(ge=0)] = 10
    """More skips and rewinds than this in a run stop it."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig(Section):
    """When a run stops of itself."""

    wall_clock_s: Annotated[float | None, Range(gt=0)] = None
    """After so long the run saves and exits with code 3, to be started again. Null: never."""

    collective_timeout_s: Annotated[float, Range(gt=0)] = 1800.0
    """A rank waits so long for another one, then fails."""

    hang_timeout_s: Annotated[float | None, Range(gt=0)] = 3600.0
    """A step, a validation or a save that takes longer ends the process, with every thread's stack on standard error. Null: never."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    """What a run writes about itself."""

    interval: Annotated[int, Range(ge=1)] = 1
    """Write metrics every so many steps."""

    peak_tflops: Annotated[float | None, Range(gt=0)] = None
    """The device's dense peak in the run's precision, of which MFU is a share. Null: as known for H100, H200 and A100."""

    samples: bool = False
    """Write which sequences each step read (samples/rank_N.jsonl)."""

    timers: bool = True
    """Write the seconds of a step by phase, and the slowest rank."""
