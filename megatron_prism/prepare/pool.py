"""Map a function over tasks in worker processes, with the results in task order."""

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

from megatron_prism.core.defect import WorkerDefect, WorkerFault, judged_here
from megatron_prism.core.errors import EnvironmentFault

Task = TypeVar("Task")
Result = TypeVar("Result")
Map = Callable[[Callable[[Task], Result], Iterable[Task]], Iterator[Result]]


@contextmanager
def workers(num_workers: int | None) -> Iterator[Map[Any, Any]]:
    """Yield a `map` over `num_workers` processes (None: one per core; 1: this process). It holds at most a few tasks per process.

    Raises: EnvironmentFault where a process dies.
    """
    num_workers = num_workers or len(os.sched_getaffinity(0))
    if num_workers == 1:
        yield map
        return
    # Spawned, not forked: the parent may have threads and locks (torch, a progress bar) that a fork would copy in an unknown state.
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_follow_parent)

    def run(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque()
        for task in tasks:
            waiting.append(pool.submit(_judged, function, task))
            if len(waiting) > 2 * num_workers:  # bounds the memory: the reader waits for the oldest task
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield run
    except BrokenProcessPool:
        raise EnvironmentFault("a worker process died (out of memory?); set num_workers lower") from None
    except (WorkerDefect, WorkerFault) as error:
        raise error from None  # its text is the worker's traceback already
    finally:
        pool.shutdown(cancel_futures=True)


def _judged(function: Callable[[Task], Result], task: Task) -> Result:
    with judged_here():
        return function(task)


def _follow_parent() -> None:
    """Tie a worker to its parent: the parent handles interrupts, and the worker ends when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def wait() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
