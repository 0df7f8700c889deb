"""End a process that hangs, or a rank whose launcher is gone.

torch's process groups notice a silent rank, but not a loader, a file system or a kernel that hangs.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from types import TracebackType

from megatron_prism.parallel import launch

HUNG = 4  # EnvironmentFault's exit code


class Watchdog:
    """Prints every thread's stack and ends the process after timeout_s without progress (None: never), or when a rank's launcher is gone.

    A process without a launcher outlives its parent: the shell that started it, perhaps with nohup, may end.
    """

    def __init__(self, timeout_s: float | None, rank: int):
        self._timeout_s, self._rank = timeout_s, rank
        self._doing, self._since = "starting", time.monotonic()
        self._stopped, self._launcher = threading.Event(), os.getppid() if launch.has_launcher() else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()

    def doing(self, what: str) -> None:
        """Record progress: the name of the work that begins now."""
        self._doing, self._since = what, time.monotonic()

    def _watch(self) -> None:
        timeout_s = self._timeout_s if self._timeout_s is not None else math.inf
        while not self._stopped.wait(min(timeout_s / 10, 2.0)):
            if self._launcher is not None and os.getppid() != self._launcher:
                self._end("its launcher is gone")
            silent_s = time.monotonic() - self._since
            if silent_s > timeout_s:
                self._end(f"{self._doing} for {silent_s:.0f} s (limits.hang_timeout_s); every thread's stack:")

    def _end(self, why: str) -> None:
        try:
            print(f"prism: rank {self._rank} on {os.uname().nodename}: {why}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        finally:  # also where standard error is gone
            os._exit(HUNG)
