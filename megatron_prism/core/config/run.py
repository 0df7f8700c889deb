"""How a training run watches itself, what it keeps, and when it stops: sections of TrainConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_prism.core.config.section import Section


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Section):
    """Validation: every `interval` steps (0: only at the start and the end), `sequences` of each source at the most."""

    interval: int = 0
    sequences: int = 64


@dataclass(frozen=True, kw_only=True)
class SaveConfig(Section):
    """Checkpoints: every `interval` steps (0: only the last step); the newest keep_last stay, and those of multiples of keep_every.

    background: training goes on while a checkpoint is written. timeout_s: a save that takes longer is given up, with an error.
    """

    interval: int = 0
    keep_last: int = 2
    keep_every: int = 0
    background: bool = True
    timeout_s: float = 1200.0


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Section):
    """What happens to a step whose loss or gradients cannot be right; the weights never take it. The paper states none: ours.

    on_nonfinite: a loss or a gradient norm that is no number. on_spike: a loss above the median of the last spike_window
    steps by more than spike_deviations times their median absolute deviation.
    stop: exit code 1. skip: the step is not taken, its data is passed over. rewind: go back to the last checkpoint, pass over the data
    from there to this step. More than max_events skips and rewinds in a run stop it.
    """

    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    on_spike: Literal["ignore", "stop", "skip", "rewind"] = "ignore"
    spike_window: int = 100
    spike_deviations: float = 20.0
    max_events: int = 10


@dataclass(frozen=True, kw_only=True)
class LimitsConfig(Section):
    """When a run stops of itself. wall_clock_s: after so long it saves, and exits with code 3, to be started again; None: never.

    collective_timeout_s: a rank waits so long for another one. hang_timeout_s: a step, a validation or a save that takes longer ends
    the process with every thread's stack on standard error; None: never.
    """

    wall_clock_s: float | None = None
    collective_timeout_s: float = 1800.0
    hang_timeout_s: float | None = 3600.0


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    """Metrics every `interval` steps; peak_tflops (dense, of the run's precision) is what MFU is a share of.

    samples: write which sequences each step read (samples/rank_N.jsonl). timers: seconds a step by phase, and the slowest rank.
    """

    interval: int = 1
    peak_tflops: float | None = None
    samples: bool = False
    timers: bool = True
