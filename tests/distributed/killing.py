"""Kill a rank of a test's gang: at a named point, or some time after a function began."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Point:
    """A function, how often it is called before the call at which the process is killed, and whether after that call."""

    owner: Any
    name: str
    after: int
    is_after: bool


def die(by: str = "SIGKILL") -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), signal.Signals[by])


@contextmanager
def killed(points: Mapping[str, Point], point: str | None, timed: tuple[Any, str], delay_s: float | None, by: str) -> Iterator[None]:
    """Within the block this process gets a signal at one of the points, or is killed so long after the `timed` function began, or neither."""
    if delay_s is not None:
        with _killed_in(*timed, delay_s):
            yield
    elif point is not None:
        with _killed_at(points[point], by):
            yield
    else:
        yield


@contextmanager
def _killed_at(point: Point, by: str) -> Iterator[None]:
    """Within the block this process gets a signal at a point."""
    kept: Callable[..., Any] = getattr(point.owner, point.name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = kept(*args, **kwargs) if point.is_after or calls <= point.after else None
        if calls == point.after + 1:
            die(by)
        return result

    with mock.patch.object(point.owner, point.name, counted):
        yield


@contextmanager
def _killed_in(owner: Any, name: str, delay_s: float) -> Iterator[None]:
    """Within the block this process is killed so long after a function began."""
    kept: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        threading.Timer(delay_s, die).start()
        return kept(*args, **kwargs)

    with mock.patch.object(owner, name, timed):
        yield
