"""Tasks over processes: their order, the memory they hold, and how workers end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prism.core.errors import EnvironmentFault, InputError, Problem
from megatron_prism.prepare import pool


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
