"""What a step's minibatches do to weights, guard and metrics, with the training step stood in for."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from megatron_prism.rl import loop
from megatron_prism.train.guard import Decision, Verdict
from megatron_prism.train.step import Means, mean_of
from megatron_prism.train.timers import Pace, Timers


def run_of(taken: list[float], num_rewinds: int = 0) -> Any:
    """Return a Run whose guard remembers in `taken`."""
    return SimpleNamespace(
        config=SimpleNamespace(optimizer=SimpleNamespace(weight_decay=0.0)),
        chunks=[],
        groups=SimpleNamespace(rank=0),
        objective=None,
        optimizer=None,
        scorer=SimpleNamespace(observer=SimpleNamespace(measured=lambda *_: None)),
        stop=SimpleNamespace(reason=lambda _: 0.0),
        saver=SimpleNamespace(num_rewinds=num_rewinds, is_writing=lambda: False, is_saving=lambda: False, longest_s=0.0),
        guard=SimpleNamespace(took=taken.append, passed_over=lambda: None),
        watchdog=None,
    )


def update(run: Any, weights: list[float], norms: list[float], verdicts: list[Verdict]) -> tuple[loop.Updated, int]:
    """Run minibatches of these weights, gradient norms and verdicts; return what came of them, and how often weights were moved."""
    means = iter([Means(loss=1.0, weight=weight, num_tokens=int(weight), reports={"ratio": 1.0}) for weight in weights])
    measured, decided, moved = iter(norms), iter(verdicts), []

    def remember(run: Any, step: int, loss: float | None, decision: Decision, timers: Timers) -> None:
        if decision.is_taken and loss is not None:
            run.guard.took(loss)
        if decision.verdict is Verdict.REWIND:
            run.saver.num_rewinds += 1

    with (
        patch.object(loop, "forward_backward", lambda *_: None),
        patch.object(loop, "read", lambda _, grad_norm: (next(means), grad_norm)),
        patch.object(loop.optim, "measure", lambda _: next(measured)),
        patch.object(loop.optim, "apply", lambda *_: moved.append(1)),
        patch.object(loop, "decide", lambda *_: Decision(next(decided), "", 0.0, False)),
        patch.object(loop.safety, "remember", remember),
    ):
        return loop._update(run, 1, 0.1, [[] for _ in weights], Timers(), 0.0), len(moved)


def test_each_minibatch_is_an_update_and_the_means_are_of_all() -> None:
    updated, num_moved = update(run_of([]), [1.0, 3.0], [2.0, 1.0], [Verdict.TAKE, Verdict.TAKE])
    assert (num_moved, updated.num_taken, updated.grad_norm, updated.means.weight) == (2, 2, 2.0, 4.0)


def test_a_minibatch_without_weight_moves_nothing_and_is_no_loss_of_the_guard() -> None:
    taken: list[float] = []
    updated, num_moved = update(run_of(taken), [0.0, 2.0], [0.0, 1.0], [Verdict.TAKE, Verdict.TAKE])
    assert (num_moved, updated.num_taken, taken) == (1, 1, [1.0])


def test_a_gradient_norm_that_is_no_number_is_reported() -> None:
    updated, num_moved = update(run_of([]), [1.0, 1.0], [1.0, math.nan], [Verdict.TAKE, Verdict.SKIP])
    assert math.isnan(updated.grad_norm) and (num_moved, updated.num_passed_over) == (1, 1)


def test_after_a_rewind_the_other_minibatches_are_left() -> None:
    updated, num_moved = update(run_of([]), [1.0, 1.0, 1.0], [1.0] * 3, [Verdict.TAKE, Verdict.REWIND, Verdict.TAKE])
    assert (num_moved, updated.num_taken, updated.num_passed_over) == (1, 0, 1)  # what was taken is given up, and no reference follows it


def test_a_save_that_ends_between_minibatches_is_timed_by_itself() -> None:
    with patch.object(loop.time, "perf_counter", itertools.count(0.0).__next__):
        updated, _ = update(run_of([]), [1.0, 1.0], [1.0] * 2, [Verdict.TAKE] * 2)
    assert updated.saving_s == 2  # the clock ticks once around each of two


@pytest.mark.parametrize("weights", [(1.0, 3.0), (0.0, 2.0), (0.0, 0.0)])
def test_means_are_by_weight(weights: tuple[float, float]) -> None:
    one, two = (
        Means(loss=loss, weight=weight, num_tokens=2, reports={"kl": 10 * loss}) for loss, weight in zip((1.0, 2.0), weights, strict=True)
    )
    total = sum(weights)
    expected = (weights[0] + 2 * weights[1]) / total if total else 1.5
    whole = mean_of([one, two])
    assert whole.loss == pytest.approx(expected) and whole.reports["kl"] == pytest.approx(10 * expected)
    assert (whole.weight, whole.num_tokens) == (total, 4)
    assert mean_of([one]) == one


def test_a_step_that_trained_on_nothing_has_no_means() -> None:
    """0 would look like a collapse of the entropy, or of the ratio."""
    updated, _ = update(run_of([]), [0.0], [0.0], [Verdict.TAKE])
    values = loop._metrics(updated, 0.1, Pace(1, 0, 2.0))
    assert values["loss"] is None and values["ratio"] is None and values["step_s"] == 2.0
    updated, _ = update(run_of([]), [2.0], [0.0], [Verdict.TAKE])
    assert loop._metrics(updated, 0.1, Pace(1, 2, 2.0)) | {"loss": 1.0, "ratio": 1.0} == loop._metrics(updated, 0.1, Pace(1, 2, 2.0))
