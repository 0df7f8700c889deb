"""Group statistics as a contract: a table of groups, the advantages of each by hand, and the rewards that go in."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from megatron_prism.core.config import AlgorithmConfig
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


THIRD = 1 / 3
# name: (group, is it kept, r - mean, leave one out)
TABLE: dict[str, tuple[Group, bool, list[float], list[float]]] = {
    "plain": (group([1, 1, 0, 0]), True, [0.5, 0.5, -0.5, -0.5], [2 / 3, 2 / 3, -2 / 3, -2 / 3]),
    "masked": (group([1, 1, 0, 0], (1,)), True, [2 * THIRD, 0, -THIRD, -THIRD], [1, 0, -0.5, -0.5]),
    "masked: a fault's reward is never read": (group([1, -7, 0, 0], (1,)), True, [2 * THIRD, 0, -THIRD, -THIRD], [1, 0, -0.5, -0.5]),
    "the only right one masked": (group([1, 0, 0, 0], (0,)), False, [0] * 4, [0] * 4),
    "one counted": (group([1, 0, 0, 0], (1, 2, 3)), False, [0] * 4, [0] * 4),
    "none counted": (group([1, 0], (0, 1)), False, [0] * 2, [0] * 2),
    "truncated: wrong, and counted": (group([1, 0, 0, -0.5]), True, [0.875, -0.125, -0.125, -0.625], [7 / 6, -1 / 6, -1 / 6, -5 / 6]),
    "all wrong, shaped": (group([-0.2, -0.9, 0, 0], right=[0, 0, 0, 0]), False, [0] * 4, [0] * 4),
    "all right, shaped": (group([1, 0.3, 1, 1]), False, [0] * 4, [0] * 4),
    "all wrong but for a masked one, shaped": (group([1, -0.9, 0, 0], (0,)), False, [0] * 4, [0] * 4),
    "penalties that undo the outcome": (group([0.0, 0.0], right=[1, 0]), False, [0] * 2, [0] * 2),
    "all right": (group([1, 1, 1]), False, [0] * 3, [0] * 3),
    "all wrong": (group([0, 0, 0]), False, [0] * 3, [0] * 3),
    "one": (group([1]), False, [0], [0]),
    "two": (group([0, 1]), True, [-0.5, 0.5], [-1, 1]),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_contract_of_group_statistics(name: str) -> None:
    of, kept, centered, leave_one_out = TABLE[name]
    assert is_kept(of, AlgorithmConfig()) == kept
    assert one(of, advantage="dr_grpo") == pytest.approx(centered)
    assert one(of, advantage="rloo") == pytest.approx(leave_one_out)
    std = statistics.pstdev(
        reward for reward, counts in zip(of.rewards_G.tolist(), of.is_counted_G.tolist(), strict=True) if counts or not kept
    )
    assert one(of, advantage="grpo", advantage_eta=0.5) == pytest.approx([value / (std + 0.5) for value in centered])
    baseline = one(of, advantage="reinforce++_baseline")
    assert [value > 0 for value in baseline] == [value > 0 for value in centered]  # one group is the whole batch


def test_a_masked_row_moves_nothing() -> None:
    """The trap: half of the group's mean with the masked row in it, [.5, .5, -.5, -.5]."""
    for advantage in ("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline"):
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


def sample(outcome: Any, **fields: Any) -> Sample:
    known = {"prompt_id": "p", "sample": 0, "domain": "math", "prompt_tokens": (1,), "token_ids": (2,), "logprobs": (-1.0,), "reward": 0.0}
    return Sample(**{**known, "ended": "end_token", "weights_step": 0, "outcome": outcome, **fields})


def test_a_group_is_read_from_samples() -> None:
    """A fault never counts; what did not end counts unless it is masked."""
    cut = sample("truncated", ended="max_tokens", reward=-0.5)
    samples = [sample("right", reward=0.9), sample("wrong"), sample("no_format"), sample("fault"), cut]
    plain, masked = (group_of(samples, AlgorithmConfig(overlong=overlong)) for overlong in ("none", "mask"))  # type: ignore[arg-type]
    assert plain.rewards_G.tolist() == [0.9, 0, 0, 0, -0.5] and plain.is_right_G.tolist() == [True, False, False, False, False]
    assert plain.is_counted_G.tolist() == [True, True, True, False, True]
    assert masked.is_counted_G.tolist() == [True, True, True, False, False]
    with pytest.raises(ValueError, match="1 tokens and 2 log-probabilities"):
        sample("right", logprobs=(-1.0, -2.0))


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
