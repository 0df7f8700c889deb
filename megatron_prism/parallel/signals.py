"""The signals that ask a job to stop. A training run then finishes its step, saves it and ends with exit code 3."""

from __future__ import annotations

import signal

SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1)
TERMINALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)  # a closed terminal, Ctrl-C, Ctrl-\
STOPPING = (*SCHEDULERS, *TERMINALS)


def heeded() -> tuple[signal.Signals, ...]:
    """Return the signals that this process stops upon: not those of a terminal that were ignored when it started, as under nohup."""
    return (*SCHEDULERS, *(name for name in TERMINALS if signal.getsignal(name) is not signal.SIG_IGN))
