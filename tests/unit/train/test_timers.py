"""Seconds by phase, with a stand-in for CUDA's events: nothing is kept where nothing reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_prism.parallel import host
from megatron_prism.train.timers import Timers


class Event:
    """An event of a device whose clock ticks once an event."""

    made = 0
    passed = 1 << 30  # how far the device has come

    def __init__(self, enable_timing: bool):
        type(self).made += 1
        self.at = type(self).made

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.at <= type(self).passed

    def synchronize(self) -> None:
        raise AssertionError("it waits for the device")

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


def use(timers: Any) -> None:
    with timers.phase("data"), timers.phase("optimizer", on_device=True):
        pass
    phase = timers("forward-compute", log_level=2)
    phase.start()
    phase.stop()


def test_phases_are_timed_on_the_device_only_where_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timers, off = Timers(), Timers(enabled=False)
    use(timers)
    found = timers.read()
    assert (found["optimizer"], found["forward"]) == (1.0, 1.0) and 0 <= found["data"] < 1 and timers.read() == {}
    made = Event.made
    for _ in range(3):
        use(off)
    assert Event.made == made and off.read() == {}


def test_a_phase_that_the_device_is_still_at_is_read_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's kernels run on after a step is launched: to wait for them when the step is logged would be outside of its time."""
    monkeypatch.setattr(host, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timers = Timers()
    monkeypatch.setattr(Event, "passed", Event.made + 2)
    for _ in range(2):
        with timers.phase("optimizer", on_device=True):
            pass
    assert timers.read() == {"optimizer": 1.0} and timers.read() == {}
    monkeypatch.setattr(Event, "passed", Event.made)
    assert timers.read() == {"optimizer": 1.0} and timers.read() == {}
