"""Why a run stops before its last step: a signal (parallel/signals.py), or its wall clock."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import psutil

from megatron_prism.core.errors import Stopped
from megatron_prism.parallel import signals

WALL_CLOCK = 1000.0  # beside the signals' numbers


class StopRequest:
    """Remembers a request to stop the run. Further signals change nothing: the step is completed and saved."""

    def __init__(self, wall_clock_s: float | None):
        self._signal = 0
        self._ends = None if wall_clock_s is None else time.monotonic() + wall_clock_s - _age_s()
        self._kept: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for name in signals.heeded():
            self._kept[name] = signal.signal(name, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, handler in self._kept.items():  # when the first rank ends, the launcher signals the others, which are about to end anyway
            signal.signal(name, signal.SIG_IGN if kind is Stopped else handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number

    def asked(self) -> int:
        """Return the signal that asked to stop; 0: none has."""
        return self._signal

    def reason(self, reserve_s: float) -> float:
        """Return the reason to stop after this step (0: none). reserve_s: what the next step and a save may take."""
        if self._signal:
            return float(self._signal)
        return WALL_CLOCK if self._ends is not None and time.monotonic() + reserve_s > self._ends else 0.0


def _age_s() -> float:
    """Return for how long this process has run. Asked once: the clock of the machine may be set while a run goes on."""
    return time.time() - psutil.Process().create_time()


def name(reason: float) -> str:
    """Return a reason in words."""
    return "limits.wall_clock_s" if reason == WALL_CLOCK else signal.Signals(int(reason)).name
