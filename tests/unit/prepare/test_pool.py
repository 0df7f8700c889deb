"""Tasks over processes: their order, the memory they hold, and how workers end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_prism.core.defect import WorkerDefect, WorkerFault, is_defect
from megatron_prism.core.errors import BackendMissing, EnvironmentFault, InputError, Problem
from megatron_prism.prepare import dedup, pool


def counted(count: int, read: list[int]) -> Iterator[int]:
    for number in range(count):
        read.append(number)
        yield number


@pytest.mark.parametrize(("num_workers", "ahead"), [(1, 1), (2, 5)])
def test_results_come_in_order_and_few_tasks_are_held(num_workers: int, ahead: int) -> None:
    read: list[int] = []
    with pool.workers(num_workers) as run:
        results = iter(run(hex, counted(100, read)))
        assert next(results) == "0x0" and len(read) == ahead
        assert list(results) == [hex(number) for number in range(1, 100)]
        assert list(run(abs, [-1])) == [1]  # the same processes, another function


def test_a_dead_worker_is_an_environment_fault() -> None:
    with pytest.raises(EnvironmentFault, match="a worker process died"), pool.workers(2) as run:
        list(run(os._exit, [9]))


def wrong(where: str) -> None:
    raise InputError([Problem(where, "x", "y"), Problem("b", "x", "y")])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_a_worker_raises_arrives_whole(num_workers: int) -> None:
    with pytest.raises(InputError) as caught, pool.workers(num_workers) as run:
        list(run(wrong, ["a"]))
    assert [problem.where for problem in caught.value.problems] == ["a", "b"]


def sparse(name: str) -> None:
    raise BackendMissing(name, "a figure", "install it")


RAISERS: dict[
    str, tuple[Callable[..., object], object, type[BaseException], bool]
] = {  # what a worker runs, its task, what arrives, and whether that is a defect of ours
    "numpy's own code": (np.stack, [], WorkerFault, False),
    "our code": (dedup.exact_key, None, WorkerDefect, True),
    "an error for the user": (sparse, "a", BackendMissing, False),
    "the machine": (os.stat, "absent/file", FileNotFoundError, False),
}


@pytest.mark.parametrize("name", RAISERS)
def test_an_error_is_judged_in_the_worker_that_met_it(name: str) -> None:
    function, task, kind, is_ours = RAISERS[name]
    with pytest.raises(kind) as caught, pool.workers(2) as run:
        list(run(function, [task]))
    assert type(caught.value) is kind and (kind is BackendMissing or is_defect(caught.value) == is_ours)
    assert kind is not WorkerFault or "need at least one array to stack" in str(caught.value)


def test_a_readers_error_ends_the_workers() -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise InputError([])

    with pytest.raises(InputError), pool.workers(2) as run:
        list(run(abs, tasks()))


ENDLESS = """
import itertools
from megatron_prism.prepare import pool

if __name__ == "__main__":
    with pool.workers(2) as run:
        for _ in run(abs, itertools.count()):
            print("ready", flush=True)
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    with subprocess.Popen([sys.executable, str(tmp_path / "endless.py")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.communicate(timeout=30)  # returns once the last worker has closed its copy of the pipe
