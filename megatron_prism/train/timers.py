"""Where a step's time goes: seconds by phase, on this rank and the slowest. Device time is measured by CUDA events, without waiting."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from megatron_prism.parallel import groups, host

PHASES = {"forward-compute": "forward", "backward-compute": "backward"}  # Megatron-Core's names (pipeline_parallel/schedules.py)
COMPUTE = ("forward", "backward")


class Timers:
    """Seconds by phase since they were last read. Megatron-Core's schedules call it as its own timers (config.timers).

    enabled: false where nothing reads them. Each phase would keep two CUDA events until then.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []
        self._phases = {name: _Phase(self, phase) for name, phase in PHASES.items()}

    def __call__(self, name: str, log_level: int = 0) -> Any:
        return self._phases.get(name, _NOTHING) if self.enabled else _NOTHING

    @contextmanager
    def phase(self, name: str, on_device: bool = False) -> Iterator[None]:
        """Time a block of work of this process, or of its device."""
        began = self.begin(on_device) if self.enabled else None
        yield
        if self.enabled:
            self.end(name, began)

    def begin(self, on_device: bool) -> Any:
        """Return the start time of a phase."""
        if not (on_device and host.has_cuda()):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self, name: str, began: Any) -> None:
        """Add the time since `began` to a phase."""
        if isinstance(began, float):
            self._seconds[name] += time.perf_counter() - began
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append((name, began, event))

    def read(self) -> dict[str, float]:
        """Return the seconds by phase, and reset. A phase that the device is still at is read the next time: to wait here would be outside of any step's time."""
        events, self._events = self._events, []
        for name, began, ended in events:
            if ended.query():
                self._seconds[name] += began.elapsed_time(ended) / 1e3
            else:
                self._events.append((name, began, ended))
        by_phase = dict(self._seconds)
        self._seconds.clear()
        return by_phase


class _Phase:
    """A phase as Megatron-Core's schedules time it: start and stop, one inside no other of its kind."""

    def __init__(self, timers: Timers, name: str):
        self._timers, self._name = timers, name

    def start(self, barrier: bool = False) -> None:
        self._began = self._timers.begin(on_device=True)

    def stop(self, barrier: bool = False) -> None:
        self._timers.end(self._name, self._began)


class _Nothing:
    def start(self, barrier: bool = False) -> None:
        return None

    stop = start


_NOTHING = _Nothing()


def summary(seconds: Mapping[str, float], num_steps: int) -> dict[str, float]:
    """Return seconds a step by phase on this rank, and how the ranks differ in computing; every rank calls this.

    straggler: the slowest rank's forward and backward over the median rank's; slowest_rank: who it is.
    """
    own = sum(seconds.get(phase, 0.0) for phase in COMPUTE)
    by_rank = groups.gather(own)
    slowest = max(range(len(by_rank)), key=by_rank.__getitem__)
    metrics = {f"time/{phase}_s": value / num_steps for phase, value in sorted(seconds.items())}
    middle = median(by_rank)
    return metrics | {"time/straggler": by_rank[slowest] / middle if middle else 1.0, "time/slowest_rank": float(slowest)}


@dataclass(frozen=True)
class Pace:
    """Steps, tokens and seconds since the last log line; validation and saving are not counted."""

    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    def plus(self, num_tokens: int, seconds: float) -> Pace:
        """Return the pace with one step more."""
        return Pace(self.num_steps + 1, self.num_tokens + num_tokens, self.seconds + seconds)
