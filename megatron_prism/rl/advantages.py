"""From the rewards of a group of responses to one prompt, to their advantages. Pure functions of tensors.

The contract: a row that is not counted (a fault, a masked response) is out of every statistic and has advantage 0. Whether a group has
something to learn from is read from its outcomes, right or not, and never from penalties. In a group that is all right or all wrong every
penalty is ignored, or it would be all that the group teaches.
Shape legend: G responses of a group, N counted responses of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_prism.core.config import AlgorithmConfig
from megatron_prism.rl import rewards
from megatron_prism.rl.sample import Sample


@dataclass(frozen=True, eq=False)
class Group:
    """A group's rewards (fp64), which of them count, and which responses are right. Shapes: (G,)."""

    rewards_G: torch.Tensor
    is_counted_G: torch.Tensor
    is_right_G: torch.Tensor

    @property
    def is_unanimous(self) -> bool:
        """Say whether the counted responses are all right or all wrong. A group of one is, and one without a counted response."""
        return len(self.is_right_G[self.is_counted_G].unique()) < 2

    @property
    def has_variance(self) -> bool:
        """Say whether the counted rewards differ, in a group whose outcomes differ."""
        return not self.is_unanimous and len(self.rewards_G[self.is_counted_G].unique()) > 1


def group_of(samples: Sequence[Sample], config: AlgorithmConfig) -> Group:
    """Return the group that the samples of one prompt are."""
    return Group(
        torch.tensor([sample.reward for sample in samples], dtype=torch.float64),
        torch.tensor([rewards.is_counted(sample.outcome, sample.ended, config) for sample in samples]),
        torch.tensor([sample.is_right for sample in samples]),
    )


def is_kept(group: Group, config: AlgorithmConfig) -> bool:
    """Say whether a group is trained on. A dropped one gives no KL gradient either; another prompt takes its place."""
    if config.keep_zero_variance or config.advantage == "reinforce++":
        return bool(group.is_counted_G.any())
    return group.has_variance


def advantages(groups: Sequence[Group], config: AlgorithmConfig) -> list[torch.Tensor]:
    """Return each group's advantages (G,), fp64. The groups are a batch: those that are kept.

    Only the two reinforce++ look beyond a group: at all counted responses of the batch, each once. A standard deviation is the
    population's: divided by the number, not by one less.
    Source: grpo: the paper, section 9.1. dr_grpo: arXiv 2503.20783. rloo: arXiv 2402.14740. reinforce++: arXiv 2501.03262.
    """
    if config.advantage == "reinforce++":
        return _over_batch([_without_phantoms(group) for group in groups], groups, config, is_centered=False)
    by_group = [_within_group(group, config) for group in groups]
    return _over_batch(by_group, groups, config, is_centered=True) if config.advantage == "reinforce++_baseline" else by_group


def _within_group(group: Group, config: AlgorithmConfig) -> torch.Tensor:
    """Return (G,) by the group's own statistics: r - mean, and for grpo and rloo scaled. Zeros where there is no variance."""
    advantages_G = torch.zeros_like(group.rewards_G)
    if not group.has_variance:
        return advantages_G
    counted_N = group.rewards_G[group.is_counted_G]
    centered_N = counted_N - counted_N.mean()
    if config.advantage == "grpo":
        centered_N = centered_N / (counted_N.std(correction=0) + config.advantage_eta)
    elif config.advantage == "rloo":  # r - (sum - r) / (N - 1)
        centered_N = centered_N * len(counted_N) / (len(counted_N) - 1)
    advantages_G[group.is_counted_G] = centered_N
    return advantages_G


def _without_phantoms(group: Group) -> torch.Tensor:
    """Return a group's rewards (G,), without penalties where it is unanimous."""
    return group.is_right_G.double() if group.is_unanimous else group.rewards_G


def _over_batch(values: Sequence[torch.Tensor], groups: Sequence[Group], config: AlgorithmConfig, is_centered: bool) -> list[torch.Tensor]:
    """Return the groups' values (G,) by the statistics of the batch's counted responses: less their mean, over their standard deviation.

    is_centered: each group's values sum to 0, so that their mean is 0 but for rounding and is not subtracted.
    """
    if not groups:
        return []
    counted_N = torch.cat([values_G[group.is_counted_G] for values_G, group in zip(values, groups, strict=True)])
    if not len(counted_N):
        return [torch.zeros_like(values_G) for values_G in values]
    mean = 0.0 if is_centered else counted_N.mean()
    std = counted_N.std(correction=0) + config.advantage_eta
    return [(values_G - mean) / std * group.is_counted_G for values_G, group in zip(values, groups, strict=True)]
