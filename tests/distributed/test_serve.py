"""Rank 0 leads and the others follow: what fails on rank 0 fails on every rank, and nobody waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_prism.core.errors import InputError, Problem
from megatron_prism.eval.retention.serve import Asking, lead
from megatron_prism.parallel.groups import Groups

pytestmark = pytest.mark.slow


class Doubling:
    """In place of serve.Served: counts its calls."""

    def __init__(self, groups: Groups):
        self.groups, self.num_calls = groups, 0

    def scores(self, rows: Any) -> Any:
        self.num_calls += 1
        if rows == "wrong":
            raise InputError(Problem("rows", "wrong", "right"))
        return rows * 2


def led(groups: Groups) -> list[Any]:
    """Return what a rank has of work that succeeds, that fails between two calls, and that fails within a call of every rank."""
    served = Doubling(groups)

    def between(asking: Asking) -> None:
        asking.scores(1)  # type: ignore[arg-type]
        raise InputError(Problem("a file", "none", "one"))

    made: list[Any] = [lead(served, lambda asking: asking.scores(21))]  # type: ignore[arg-type, type-var]
    for work in (between, lambda asking: asking.scores("wrong")):
        try:
            lead(served, work)  # type: ignore[arg-type]
        except InputError as error:
            made.append([str(error), error.is_agreed])
    return [*made, served.num_calls, groups.rank]


def test_a_failure_of_rank_0_is_every_ranks(run_distributed: Callable[..., list[Any]]) -> None:
    first, second = run_distributed(led, 2)
    failures = [["a file: found none; required one", True], ["rows: found wrong; required right", True]]
    assert first == [42, *failures, 3, 0]
    assert [second[0], second[1], second[3], second[4]] == [None, failures[0], 3, 1]
    assert second[2][0] == failures[1][0]
