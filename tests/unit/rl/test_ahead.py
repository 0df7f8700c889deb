"""What is sampled ahead of its step: kept to the last bit, taken once, and discarded where nobody may train on it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.rl import ahead, rollout
from megatron_prism.rl.ahead import Ahead
from megatron_prism.rl.rollout import Response
from megatron_prism.rl.sample import Sample


def group(weights_step: int, logprob: float = -1 / 3, size: int = 2) -> list[Response]:
    return [
        Response(
            Sample(
                prompt_id="p",
                sample=number,
                domain="math",
                prompt_tokens=(1, 2),
                token_ids=(3,) * (number + 1),
                logprobs=(logprob,) * (number + 1),
                ended="end_token",
                weights_step=weights_step,
                outcome="right" if number else "wrong",
                reward=float(number),
            ),
            "a\u2028b",  # which splitlines would split
            "why",
            2**63 - 1,
        )
        for number in range(size)
    ]


@pytest.mark.parametrize("logprob", [-1 / 3, -1e-300, -0.1 - 0.2, 0.0])
def test_responses_come_back_from_lines_to_the_last_bit(logprob: float) -> None:
    groups = [group(3, logprob), group(4), group(5, size=1)]
    assert rollout.from_lines(rollout.to_lines(groups)) == groups


def test_a_checkpoint_keeps_them(tmp_path: Path) -> None:
    groups = [group(3), group(3)]
    for name, text in Ahead(_groups=groups).files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    taken = ahead.restored(tmp_path).take(5, lag=1, num_rewinds=0)
    assert taken.groups == groups and not taken.figures()
    assert Ahead().files() == {} and not ahead.restored(tmp_path / "without").take(5, 1, 0).groups


def test_they_are_taken_once() -> None:
    waiting = Ahead(_groups=[group(3)])
    assert waiting.take(5, 1, 0).groups and not waiting.take(6, 1, 0).groups


@pytest.mark.parametrize(("lag", "num_rewinds"), [(0, 0), (1, 1)], ids=["too old", "of weights that were given up"])
def test_what_nobody_may_train_on_is_discarded_and_counted(lag: int, num_rewinds: int) -> None:
    waiting = Ahead(_groups=[group(3)])
    taken = waiting.take(5, lag, num_rewinds)
    assert not taken.groups and taken.figures() == {"discarded": 2.0, "discarded_tokens": 1.5, "discarded_reward": 0.5}
    assert waiting.take(6, 1, num_rewinds).figures() == {}  # once


class Grades:
    """A sampler's outcomes, once `may` is set."""

    def __init__(self, result: Any):
        self.result, self.may = result, threading.Event()

    def outcomes(self, items: Sequence[Any]) -> Any:
        self.may.wait(10)
        if isinstance(self.result, ZeroDivisionError):
            raise self.result
        return self.result

    def responses(self, sampled: Any, outcomes: Any) -> Any:
        if isinstance(outcomes, EnvironmentFault):
            raise outcomes
        return [[outcomes]]


def test_grading_goes_on_beside_and_its_error_comes_where_the_groups_are_asked_for() -> None:
    for result, error in [
        ("graded", None),
        (EnvironmentFault("no worker"), EnvironmentFault),
        (ZeroDivisionError("ours"), ZeroDivisionError),
    ]:
        grades = Grades(result)
        waiting = Ahead()
        waiting.begin(grades, SimpleNamespace(items=[], num_drawn=4), 0)  # type: ignore[arg-type]  # returns while nothing is graded
        grades.may.set()
        if error is None:
            assert waiting.groups() == [["graded"]]
        else:
            with pytest.raises(error):
                waiting.groups()
