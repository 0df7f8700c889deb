"""What is sampled ahead of its step: kept to the last bit, taken once, and discarded where nobody may train on it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from megatron_prism.core.config import AlgorithmConfig
from megatron_prism.core.errors import EnvironmentFault
from megatron_prism.generate.engine import Rollout, ids_of, logprobs_of
from megatron_prism.grade.outcome import Graded, Item
from megatron_prism.rl import ahead, rollout
from megatron_prism.rl.ahead import Ahead
from megatron_prism.rl.prompts import Prompt
from megatron_prism.rl.rollout import Encoded, Response, Sampled, Sampler, Speed
from megatron_prism.rl.sample import Sample
from megatron_prism.train import safety
from megatron_prism.train.timers import Timers


def group(weights_step: int, logprob: float = -1 / 3, size: int = 2) -> list[Response]:
    return [
        Response(
            Sample(
                prompt_id="p",
                sample=number,
                domain="math",
                prompt_tokens=(1, 2),
                token_ids=ids_of((3,) * (number + 1)),
                logprobs=logprobs_of((logprob,) * (number + 1)),
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


@pytest.mark.parametrize("logprob", [-1 / 3, -1e-38, -0.1 - 0.2, 0.0])
def test_responses_come_back_from_lines_to_the_last_bit(logprob: float) -> None:
    groups = [group(3, logprob), group(4), group(5, size=1)]
    assert rollout.from_lines(rollout.to_lines(groups), "lines") == groups


def test_a_checkpoint_keeps_them(tmp_path: Path) -> None:
    groups = [group(3), group(3)]
    for name, text in Ahead(_groups=groups).files(0, is_first=True).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    taken = ahead.restored(tmp_path).take(5, lag=1, num_rewinds=0)
    assert taken.groups == groups and not taken.figures()
    assert Ahead().files(0, is_first=True) == {} and not ahead.restored(tmp_path / "without").take(5, 1, 0).groups


def test_they_are_taken_once() -> None:
    waiting = Ahead(_groups=[group(3)])
    assert waiting.take(5, 1, 0).groups and not waiting.take(6, 1, 0).groups


@pytest.mark.parametrize(("lag", "num_rewinds"), [(0, 0), (1, 1)], ids=["too old", "of weights that were given up"])
def test_what_nobody_may_train_on_is_discarded_and_counted(lag: int, num_rewinds: int) -> None:
    waiting = Ahead(_groups=[group(3)])
    taken = waiting.take(5, lag, num_rewinds)
    assert not taken.groups and taken.figures() == {"discarded": 2.0, "discarded_tokens": 1.5, "discarded_reward": 0.5}
    assert waiting.take(6, 1, num_rewinds).figures() == {}  # once


class Grader:
    """Gives a result, or raises it, once `may` is set; keeps the threads that called it."""

    def __init__(self, result: dict[str, Graded] | Exception):
        self.result, self.may, self.threads = result, threading.Event(), set[int]()

    def grade(self, items: Sequence[Item]) -> dict[str, Graded]:
        self.threads.add(threading.get_ident())
        self.may.wait(10)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def sampler_of(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> Sampler:
    monkeypatch.setattr(rollout, "from_first", lambda value: value)
    monkeypatch.setattr(rollout, "shared", lambda make, values: [make(value) for value in values])
    config = SimpleNamespace(rollout=SimpleNamespace(max_tokens=8), algorithm=AlgorithmConfig())
    return Sampler(config, None, None, grader)  # type: ignore[arg-type]


def a_sample(weights_step: int = 3, num_drawn: int = 4) -> Sampled:
    prompt = Prompt(id="p", domain="math", kind="math", prompt="?", gold="1")
    item = Item(id="0/0", kind="math", response="a")
    speed = Speed(num_tokens=6, seconds=2.0)
    return Sampled(
        [Encoded(prompt, (1,))], [Rollout(0, 0, 7, ids_of([3]), logprobs_of([-0.5]), "end_token")], [item], weights_step, speed, num_drawn
    )


RIGHT = {"0/0": Graded(id="0/0", outcome="right")}


def test_grading_goes_on_beside_and_its_error_comes_where_the_groups_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for result in (RIGHT, EnvironmentFault("no worker"), ZeroDivisionError("ours")):
        grader, waiting = Grader(result), Ahead()
        waiting.begin(sampler_of(grader, monkeypatch), a_sample(), 0)  # returns while nothing is graded
        grader.may.set()
        if isinstance(result, Exception):
            with pytest.raises(type(result)):
                waiting.groups()
        else:
            assert [one.reward for one in rollout.samples(waiting.groups())] == [1.0]


def test_one_thread_makes_every_call_of_the_grader(monkeypatch: pytest.MonkeyPatch) -> None:
    grader = Grader(RIGHT)
    sampler = sampler_of(grader, monkeypatch)
    grader.may.set()
    for _ in range(3):
        waiting = Ahead()
        waiting.begin(sampler, a_sample(), 0)
        sampler.grade(a_sample()).groups()
        waiting.groups()
    assert len(grader.threads) == 1 and threading.get_ident() not in grader.threads


def test_each_rank_makes_the_rewards_of_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The repetition of a long response takes milliseconds, and a step has thousands."""
    grader = Grader(RIGHT)
    grader.may.set()
    sampler = sampler_of(grader, monkeypatch)
    monkeypatch.setattr(rollout, "shared", lambda make, values: [make(value) - 0.75 for value in values])  # another rank's
    assert [one.reward for one in rollout.samples(sampler.grade(a_sample()).groups())] == [0.25]


def test_a_rate_counts_what_was_sampled_ahead_and_the_seconds_of_the_engine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    grader, waiting = Grader(RIGHT), Ahead()
    grader.may.set()
    waiting.begin(sampler_of(grader, monkeypatch), a_sample(), 0)
    taken = waiting.take(5, 1, 0)
    assert taken.speed.tokens_per_s() == 3.0 and (taken.speed + Speed(6, 1.0)).tokens_per_s() == 4.0
    assert waiting.take(6, 1, 0).speed.tokens_per_s() is None  # once


def test_a_checkpoint_keeps_nothing_of_weights_that_were_given_up(tmp_path: Path) -> None:
    """The run discards them at its next step, and so must one that resumes; and rank 0 alone writes."""
    waiting = Ahead(_groups=[group(3)], _num_rewinds=1)
    assert waiting.files(2, is_first=True) == {} == waiting.files(1, is_first=False)
    assert [*waiting.files(1, is_first=True)] == [ahead.FILE]


def test_what_is_saved_is_asked_for_once_the_run_has_gone_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not finite are found by the save itself."""
    monkeypatch.setattr(safety.optim, "settled", lambda *_: nullcontext())
    monkeypatch.setattr(safety.optim, "are_finite", lambda _: False)
    monkeypatch.setattr(safety.groups, "agree", lambda values: values)
    run = MagicMock()
    run.config.guard.on_nonfinite, run.guard.num_events, run.config.guard.max_events, run.saver.num_rewinds = "rewind", 0, 3, 0

    def rewind() -> int:
        run.saver.num_rewinds += 1
        return 2

    run.saver.rewind, run.guard.state.return_value = rewind, {}
    waiting = Ahead(_groups=[group(3)])
    safety.save(run, 4, Timers(), False, lambda: {"files": waiting.files(run.saver.num_rewinds, is_first=True)})
    run.saver.begin.assert_called_once_with(4, {"guard": {}, "files": {}})
