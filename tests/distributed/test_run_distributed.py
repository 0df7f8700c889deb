"""The fixture run_distributed itself: each rank's result, the traceback of the one that fails, an end for one that hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_prism.parallel.groups import Groups

Run = Callable[..., list[Any]]


def add_up(groups: Groups, start: int) -> list[int]:
    """Return this rank's place in the tensor-parallel group, and a sum over that group."""
    value = torch.tensor([start + groups.rank])
    dist.all_reduce(value, group=groups.tp_group)
    return [groups.tp_rank, int(value)]


def fail_on_the_last(groups: Groups) -> None:
    if groups.rank == groups.world_size - 1:
        raise ValueError("the last rank cannot")
    dist.barrier()


def hang_on_the_first(groups: Groups) -> None:
    if groups.rank == 0:
        time.sleep(600)


def test_each_rank_returns_its_result(run_distributed: Run) -> None:
    assert run_distributed(add_up, 4, parallel={"tp": 2}, start=10) == [[0, 21], [1, 21], [0, 25], [1, 25]]


def test_the_traceback_of_the_rank_that_fails_is_seen(run_distributed: Run) -> None:
    with pytest.raises(AssertionError) as failure:
        run_distributed(fail_on_the_last, 2)
    first, *_ = str(failure.value).split("\nrank ")
    assert first.startswith("fail_on_the_last on 2 ranks: rank 1: exit code 1\nTraceback ")
    assert 'raise ValueError("the last rank cannot")\nValueError: the last rank cannot' in first
    assert run_distributed(add_up, 1, start=1) == [[0, 1]]  # the next gang is not harmed


def test_a_rank_that_hangs_is_killed(run_distributed: Run) -> None:
    with pytest.raises(AssertionError, match=r"rank 0: still running after 3 s"):
        run_distributed(hang_on_the_first, 2, timeout_s=3)
    assert [len(child.children()) for child in psutil.Process().children() if "tests.ranks" in " ".join(child.cmdline())] == [0]
