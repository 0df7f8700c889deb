"""Ends a process that hangs: torch's process groups notice a rank that is silent, but not a loader, a file system or a kernel that is."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

HUNG = 4  # EnvironmentFault's exit code


class Watchdog:
    """Says where every thread is, and ends the process, once nothing was done for timeout_s; None: never."""

    def __init__(self, timeout_s: float | None, rank: int):
        self._timeout_s, self._rank = timeout_s, rank
        self._doing, self._since = "starting", time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._timeout_s is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()

    def doing(self, what: str) -> None:
        """Note that something has begun: there is progress."""
        self._doing, self._since = what, time.monotonic()

    def _watch(self) -> None:
        assert self._timeout_s is not None
        while not self._stopped.wait(min(self._timeout_s / 10, 10.0)):
            silent_s = time.monotonic() - self._since
            if silent_s > self._timeout_s:
                told = f"prism: rank {self._rank} on {os.uname().nodename}: {self._doing} for {silent_s:.0f} s (limits.hang_timeout_s): every thread's stack:"
                print(told, file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(HUNG)
