"""A task's process: started with its log, asked to stop, and read when it has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_prism.study import keeper

TAIL_BYTES = 4096


@dataclass(frozen=True)
class Ended:
    """How a task's process ended. exit_code: 128 + N where signal N killed it. cpu_s: of all its processes. log_begins: where its log does, in bytes."""

    exit_code: int
    seconds: float
    cpu_s: float
    log_begins: int = 0


@dataclass(eq=False)
class Child:
    """A task's process, behind its keeper (keeper.py)."""

    process: subprocess.Popen[bytes]
    log_begins: int = 0
    began: float = field(default_factory=time.monotonic)

    def ended(self) -> Ended | None:
        """Return how it ended; None while it runs."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            return None
        code = os.waitstatus_to_exitcode(status)
        self.process.returncode = code  # it is reaped: Popen must not wait for it
        if self.process.stdin is not None:
            self.process.stdin.close()
        seconds, cpu_s = time.monotonic() - self.began, usage.ru_utime + usage.ru_stime
        return Ended(code if code >= 0 else 128 - code, seconds, cpu_s, self.log_begins)

    def ask_to_stop(self) -> None:
        """Ask it to save and end."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it and all that it started."""
        if self.process.stdin is not None:
            self.process.stdin.close()  # the keeper sees the end of it


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Child:
    """Start a command behind its keeper. Its output goes to the log's end; a signal of the terminal does not reach it."""
    with log.open("ab") as stream:
        log_begins = os.fstat(stream.fileno()).st_size
        return Child(
            subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            ),
            log_begins,
        )


def last_line(log: Path, begins: int = 0) -> str:
    """Return the last line of a log that says something; empty where there is none after its first `begins` bytes."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(begins, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
