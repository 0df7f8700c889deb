"""Group statistics as a contract: a table of groups, the advantages of each by hand, and the rewards that go in."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch

from megatron_prism.core.config import AlgorithmConfig
from megatron_prism.core.config.rl import Advantage
from megatron_prism.generate.engine import ids_of, logprobs_of
from megatron_prism.rl import rewards
from megatron_prism.rl.advantages import Group, advantages, group_of, is_kept
from megatron_prism.rl.sample import Sample


def group(values: list[float], masked: tuple[int, ...] = (), right: list[int] | None = None) -> Group:
    """Return a group of rewards. Right are those above 0, if not said."""
    is_right = [value > 0 for value in values] if right is None else [bool(one) for one in right]
    is_counted = [row not in masked for row in range(len(values))]
    return Group(torch.tensor(values, dtype=torch.float64), torch.tensor(is_counted), torch.tensor(is_right))


def one(of: Group, **keys: Any) -> list[float]:
    (advantages_G,) = advantages([of], AlgorithmConfig(**keys))
    return advantages_G.tolist()


def sample(outcome: Any, **fields: Any) -> Sample:
    known = {
        "prompt_id": "p",
        "sample": 0,
        "domain": "math",
        "prompt_tokens": (1,),
        "token_ids": ids_of([2]),
        "logprobs": logprobs_of([-1.0]),
        "reward": 0.0,
    }
    return Sample(**{**known, "ended": "end_token", "weights_step": 0, "outcome": outcome, **fields})


@dataclass(frozen=True)
class Case:
    """A group of rows, and by hand: the counted rows, r - mean of those (0 elsewhere), leave one out, the population's standard deviation.

    seen: the rewards that reinforce++ sees, which has no group baseline; the rows' own if not said.
    """

    rows: list[Sample]
    counted: list[int]
    centered: list[float]
    leave_one_out: list[float]
    std: float
    is_kept: bool = True
    overlong: Any = "none"
    seen: list[float] | None = None


def still(rows: list[Sample], counted: list[int] | None = None, overlong: str = "none", seen: list[float] | None = None) -> Case:
    """Return the case of a group that teaches nothing: dropped, and all of its advantages 0."""
    zeros = [0.0] * len(rows)
    return Case(rows, [1] * len(rows) if counted is None else counted, zeros, zeros, 0.0, False, overlong, seen)


RIGHT, WRONG, NO_FORMAT, FAULT = (sample(outcome, reward=float(outcome == "right")) for outcome in ("right", "wrong", "no_format", "fault"))
CUT = sample("truncated", ended="max_tokens")
LONG, LONG_CUT = sample("right", reward=0.3), sample("truncated", ended="max_tokens", reward=-0.5)  # shaped: with a length penalty
REPETITIVE = sample("wrong", reward=-0.9)
UNDONE = sample("right", reward=0.0)  # its penalties took all
THIRD = 1 / 3
TABLE = {
    "plain": Case([RIGHT, RIGHT, WRONG, WRONG], [1, 1, 1, 1], [0.5, 0.5, -0.5, -0.5], [2 / 3, 2 / 3, -2 / 3, -2 / 3], 0.5),
    "failed: a wrong one's 0": Case([RIGHT, NO_FORMAT], [1, 1], [0.5, -0.5], [1, -1], 0.5),
    "masked: a fault": Case([RIGHT, FAULT, WRONG, WRONG], [1, 0, 1, 1], [2 / 3, 0, -THIRD, -THIRD], [1, 0, -0.5, -0.5], 2**0.5 / 3),
    "masked: it did not end": Case([RIGHT, CUT, WRONG], [1, 0, 1], [0.5, 0, -0.5], [1, 0, -1], 0.5, overlong="mask"),
    "masked: right, and it did not end": Case(
        [sample("right", ended="max_context", reward=1.0), RIGHT, WRONG], [0, 1, 1], [0, 0.5, -0.5], [0, 1, -1], 0.5, overlong="mask"
    ),
    "truncated: wrong, and counted": Case([RIGHT, CUT], [1, 1], [0.5, -0.5], [1, -1], 0.5),
    "shaped and truncated": Case(
        [RIGHT, WRONG, WRONG, LONG_CUT], [1] * 4, [0.875, -0.125, -0.125, -0.625], [7 / 6, -1 / 6, -1 / 6, -5 / 6], (19 / 64) ** 0.5
    ),
    "shaped, beside a fault": Case(
        [RIGHT, FAULT, LONG, WRONG], [1, 0, 1, 1], [17 / 30, 0, -4 / 30, -13 / 30], [0.85, 0, -0.2, -0.65], (158 / 900) ** 0.5
    ),
    "shaped: all wrong": still([LONG_CUT, REPETITIVE, WRONG, CUT], seen=[0, 0, 0, 0]),
    "shaped: all right": still([RIGHT, LONG, RIGHT], seen=[1, 1, 1]),
    "shaped: all wrong but for a fault": still([FAULT, REPETITIVE, WRONG], [0, 1, 1], seen=[0, 0, 0]),
    "shaped: the only right one masked": still(
        [sample("right", ended="max_tokens", reward=0.8), REPETITIVE, WRONG], [0, 1, 1], "mask", seen=[0, 0, 0]
    ),
    "shaped: penalties undo the outcome": still([UNDONE, WRONG]),
    "shaped: penalties undo the outcome, beside a fault": still([UNDONE, WRONG, sample("fault", reward=-0.5)], [1, 1, 0]),
    "zero variance: all right": still([RIGHT] * 3),
    "zero variance: all wrong": still([WRONG, NO_FORMAT, CUT]),
    "one": still([RIGHT]),
    "one counted": still([RIGHT, FAULT, FAULT], [1, 0, 0]),
    "none counted": still([FAULT, CUT], [0, 0], "mask"),
}
ADVANTAGES = get_args(Advantage)
ETA = 0.25


def expected(case: Case, advantage: str) -> list[float]:
    """Return a group's advantages by hand. Those that look at the whole batch see a second group too: one right, one wrong."""
    if advantage in ("dr_grpo", "rloo"):
        return case.centered if advantage == "dr_grpo" else case.leave_one_out
    if advantage == "grpo":
        return [value / (case.std + ETA) for value in case.centered]
    rewards_of_rows = [row.reward for row in case.rows] if case.seen is None else case.seen
    values, others = (case.centered, [0.5, -0.5]) if advantage == "reinforce++_baseline" else (rewards_of_rows, [1.0, 0.0])
    counted = [value for value, counts in zip(values, case.counted, strict=True) if counts] + others
    std = statistics.pstdev(counted) + ETA
    return [(value - statistics.mean(counted)) / std * counts for value, counts in zip(values, case.counted, strict=True)]


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("name", TABLE)
def test_the_contract_of_group_statistics(name: str, advantage: Any) -> None:
    case = TABLE[name]
    config = AlgorithmConfig(advantage=advantage, advantage_eta=ETA, overlong=case.overlong)
    of = group_of(case.rows, config)
    assert of.is_counted_G.tolist() == [bool(counts) for counts in case.counted]
    assert is_kept(of, config) == (any(case.counted) if advantage == "reinforce++" else case.is_kept)
    assert is_kept(of, replace(config, keep_zero_variance=True)) == any(case.counted)
    values = advantages([of, group([1, 0])], config)[0].tolist()
    assert values == pytest.approx(expected(case, advantage))
    assert all(value == 0 for value, counts in zip(values, case.counted, strict=True) if not counts)
    unread = [row if counts else replace(row, reward=-7.0) for row, counts in zip(case.rows, case.counted, strict=True)]
    assert advantages([group_of(unread, config), group([1, 0])], config)[0].tolist() == values


def test_a_masked_row_moves_nothing() -> None:
    """The trap: half of the group's mean with the masked row in it, [.5, .5, -.5, -.5]."""
    for advantage in ADVANTAGES:
        masked = one(group([1, 1, 0, 0], (1,)), advantage=advantage)
        without = one(group([1, 0, 0]), advantage=advantage)
        assert masked == pytest.approx([without[0], 0, *without[1:]])
        assert masked != pytest.approx(one(group([1, 1, 0, 0]), advantage=advantage))


def test_zero_variance_groups_are_kept_if_asked_for() -> None:
    of = group([-0.2, -0.9, 0], right=[0, 0, 0])
    assert not is_kept(of, AlgorithmConfig()) and is_kept(of, AlgorithmConfig(keep_zero_variance=True))
    assert one(of, keep_zero_variance=True) == [0, 0, 0]
    assert not is_kept(group([1, 0], (0, 1)), AlgorithmConfig(keep_zero_variance=True))


def test_reinforce_normalises_over_the_counted_rows_of_the_batch() -> None:
    groups = [group([1, 1, 0, 0], (1,)), group([0, 1]), group([1])]
    counted = [1, 0, 0, 0, 1, 1]
    mean, std = statistics.mean(counted), statistics.pstdev(counted)
    high, low = (1 - mean) / std, -mean / std
    values = [row.tolist() for row in advantages(groups, AlgorithmConfig(advantage="reinforce++"))]
    assert values == [pytest.approx([high, 0, low, low]), pytest.approx([low, high]), pytest.approx([high])]
    centered = [2 / 3, -1 / 3, -1 / 3, -0.5, 0.5, 0]
    std = statistics.pstdev(centered)
    values = [row.tolist() for row in advantages(groups, AlgorithmConfig(advantage="reinforce++_baseline"))]
    assert values == [pytest.approx([2 / 3 / std, 0, -1 / 3 / std, -1 / 3 / std]), pytest.approx([-0.5 / std, 0.5 / std]), [0]]
    assert all(is_kept(of, AlgorithmConfig(advantage="reinforce++")) for of in groups)


def test_reinforce_sees_no_penalties_in_a_unanimous_group() -> None:
    mixed = group([1, 0, 0, -0.5])
    shaped, plain = group([-0.2, -0.9], right=[0, 0]), group([0, 0])
    config = AlgorithmConfig(advantage="reinforce++")
    assert torch.equal(advantages([mixed, shaped], config)[1], advantages([mixed, plain], config)[1])
    assert advantages([], config) == [] and advantages([group([1], (0,))], config)[0].tolist() == [0]


def test_a_group_is_read_from_samples() -> None:
    """A fault never counts; what did not end counts unless it is masked."""
    cut = sample("truncated", ended="max_tokens", reward=-0.5)
    samples = [sample("right", reward=0.9), sample("wrong"), sample("no_format"), sample("fault"), cut]
    plain, masked = (group_of(samples, AlgorithmConfig(overlong=overlong)) for overlong in ("none", "mask"))  # type: ignore[arg-type]
    assert plain.rewards_G.tolist() == [0.9, 0, 0, 0, -0.5] and plain.is_right_G.tolist() == [True, False, False, False, False]
    assert plain.is_counted_G.tolist() == [True, True, True, False, True]
    assert masked.is_counted_G.tolist() == [True, True, True, False, False]
    with pytest.raises(ValueError, match="1 tokens and 2 log-probabilities"):
        sample("right", logprobs=logprobs_of([-1.0, -2.0]))


def test_rewards() -> None:
    plain = AlgorithmConfig()
    assert [rewards.reward(outcome, "max_tokens", [5] * 99, 99, plain) for outcome in ("right", "wrong", "no_format", "truncated")] == [
        1,
        0,
        0,
        0,
    ]
    shaped = AlgorithmConfig(overlong="shape", overlong_tokens=4, overlong_penalty=0.8)
    lengths = [rewards.reward("right", "end_token", [5] * tokens, 20, shaped) for tokens in (1, 16, 17, 18, 20)]
    assert lengths == pytest.approx([1, 1, 0.8, 0.6, 0.2])
    stopped = AlgorithmConfig(stop_penalty=0.3)
    assert rewards.reward("right", "end_token", [5], 20, stopped) == 1
    assert rewards.reward("wrong", "max_context", [5], 20, stopped) == -0.3
    repeated = AlgorithmConfig(repetition_penalty=0.5, repetition_ngram_tokens=2)
    assert rewards.reward("right", "end_token", [1, 2, 1, 2, 1], 20, repeated) == pytest.approx(1 - 0.5 * 2 / 4)  # 12 21 12 21
    assert rewards.reward("right", "end_token", [1, 2, 3, 4], 20, repeated) == rewards.reward("right", "end_token", [1], 20, repeated) == 1
    assert rewards.repeated_share([256, 1, 0, 256, 1, 0], 3) == 1 / 4  # ids whose bytes overlap are others: 256 1 0, 1 0 256, 0 256 1


def test_nothing_is_counted_where_repetition_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "repeated_share", None)
    assert rewards.reward("right", "end_token", [1, 1, 1], 20, AlgorithmConfig(repetition_ngram_tokens=1)) == 1
    with pytest.raises(TypeError):
        rewards.reward("right", "end_token", [1, 1, 1], 20, AlgorithmConfig(repetition_penalty=0.5))
