"""Log to standard error, once per gang: rank 0 logs everything, the other ranks only warnings."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NAME = "prism"


def get() -> logging.Logger:
    """Return the project's logger."""
    return logging.getLogger(NAME)


def setup() -> None:
    """Send the project's log to standard error. Ranks above 0 log from WARNING up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = get()
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_first() else logging.WARNING)


def is_first() -> bool:
    """Say whether this process is a gang's rank 0, or in no gang."""
    return int(os.environ.get("RANK", "0")) == 0


def duration(seconds: float) -> str:
    """Return a duration as hours:MM:SS: 0:00:07, 26:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def told(progress: Any, interval_s: float = 60.0) -> Iterator[Any]:
    """Show rich's progress bars. Where standard error is not a terminal, log a line every interval_s instead."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(interval_s):
            running = [f"{task.description} {task.percentage:.0f} %" for task in progress.tasks if not task.finished]
            if running:
                get().info("%s", ", ".join(running))

    teller = threading.Thread(target=tell, daemon=True)
    with progress:
        if progress.disable:
            teller.start()
        try:
            yield progress
        finally:
            done.set()


@contextmanager
def ticking(total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar of so many tensors, and yield what advances it by one."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with told(Progress(console=console, disable=not console.is_terminal)) as bar:
        task = bar.add_task("tensors", total=total)
        yield lambda: bar.advance(task)
