"""Run a function over tasks in other processes, its results in the order of the tasks."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import Any, TypeVar

from megatron_prism.core.errors import EnvironmentFault

Task = TypeVar("Task")
Result = TypeVar("Result")
Map = Callable[[Callable[[Task], Result], Iterable[Task]], Iterator[Result]]


@contextmanager
def workers(num_workers: int | None) -> Iterator[Map[Any, Any]]:
    """Yield a `map` over `num_workers` processes (None: one a core; 1: this one). It holds a few tasks a process, however many there are.

    Raises: EnvironmentFault where a process dies.
    """
    num_workers = num_workers or len(os.sched_getaffinity(0))
    if num_workers == 1:
        yield map
        return
    # Spawned, not forked: the parent may hold threads and locks (torch, a progress bar) that a fork would copy half-way.
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_follow_parent)

    def run(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque()
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) > 2 * num_workers:  # bounds the memory: the reader waits for the oldest task
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield run
    except BrokenProcessPool:
        raise EnvironmentFault("a worker process died (out of memory?); set num_workers lower") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave a worker's end to its parent: an interrupt is the parent's to handle, and a killed parent leaves no worker waiting."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def wait() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
