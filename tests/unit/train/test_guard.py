"""Which steps the guard lets pass, and what it remembers."""

from __future__ import annotations

import math

import pytest

from megatron_prism.core.config import GuardConfig
from megatron_prism.parallel import groups
from megatron_prism.train.guard import Decision, Guard, Verdict, decide, spike_limit

WINDOW = [3.0, 3.1, 2.9, 3.2, 2.8]  # median 3.0, median deviation 0.1


def guard(losses: list[float] = WINDOW, num_events: int = 0, **config: object) -> Guard:
    return Guard(GuardConfig(**{"spike_window": 5, "spike_deviations": 10.0, **config}), losses, num_events)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_no_number_is_not_taken(policy: str, loss: float, norm: float) -> None:
    assert guard(on_nonfinite=policy).judge(loss, norm)[0] is Verdict[policy.upper()]


@pytest.mark.parametrize(("loss", "is_spike"), [(3.99, False), (4.01, True), (-100.0, False)])
def test_a_spike_lies_above_the_median_by_so_many_deviations(loss: float, is_spike: bool) -> None:
    verdict, why = guard(on_spike="skip").judge(loss, 1.0)
    assert (verdict, bool(why)) == ((Verdict.SKIP, True) if is_spike else (Verdict.TAKE, False))
    assert guard(on_spike="ignore").judge(loss, 1.0) == (Verdict.TAKE, "")


def test_before_a_whole_window_nothing_is_a_spike_and_flat_losses_have_a_floor() -> None:
    assert spike_limit(WINDOW[:4], guard().config) == math.inf
    assert spike_limit([2.0] * 5, guard().config) == pytest.approx(2.0 + 10 * 0.02)
    assert spike_limit([-2.0] * 5, guard().config) == pytest.approx(-2.0 + 10 * 0.02)  # a policy's loss may be below 0


def test_it_passes_over_max_events_steps_and_stops_at_the_next() -> None:
    found = guard(on_nonfinite="skip", max_events=2)
    for _ in range(2):
        assert found.judge(math.nan, 1.0)[0] is Verdict.SKIP
        found.passed_over()
    verdict, why = found.judge(math.nan, 1.0)
    assert verdict is Verdict.STOP and "guard.max_events" in why
    verdict, why = guard(on_nonfinite="stop", num_events=2, max_events=2).judge(math.nan, 1.0)
    assert verdict is Verdict.STOP and "guard.max_events" not in why  # it would have stopped at the first


def test_what_a_checkpoint_keeps_is_all_it_knows() -> None:
    found = guard()
    found.took(5.0)
    found.passed_over()
    again = Guard(found.config, **found.state())
    assert again == found and again.losses == [*WINDOW[1:], 5.0] and again.num_events == 1


@pytest.mark.parametrize(
    ("loss", "other", "wanted"),
    [
        (3.0, (Verdict.TAKE, 0.0, False), Decision(Verdict.TAKE, "", 0.0, True)),
        (3.0, (Verdict.SKIP, 7.0, False), Decision(Verdict.SKIP, "not right on another rank", 7.0, True)),
        (math.nan, (Verdict.TAKE, 0.0, False), Decision(Verdict.REWIND, "loss nan, gradient norm 1.0: not a number", 0.0, True)),
    ],
)
def test_a_decision_is_the_gravest_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch, loss: float, other: tuple[float, ...], wanted: Decision
) -> None:
    monkeypatch.setattr(groups, "agree", lambda values: [float(max(pair)) for pair in zip(values, other, strict=True)])
    found = decide(guard(on_nonfinite="rewind"), loss, 1.0, stop_reason=0.0, is_writing=True)
    assert found == wanted and found.is_taken is (wanted.verdict is Verdict.TAKE)
    with pytest.raises(AttributeError):
        found.verdict = Verdict.TAKE  # type: ignore[misc]


def test_ranks_that_differ_agree_on_the_gravest() -> None:
    assert max(Verdict) is Verdict.STOP and sorted(Verdict) == [Verdict.TAKE, Verdict.SKIP, Verdict.REWIND, Verdict.STOP]
