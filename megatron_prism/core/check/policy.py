"""Checks of a verdict's policy: a pure function that returns every problem."""

from __future__ import annotations

from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.config.policy import PolicyConfig
from megatron_prism.core.errors import Problem


def check_policy(policy: PolicyConfig, prefix: str = "") -> list[Problem]:
    """Return the problems of a policy. `prefix` is put before each key."""
    return [*check_bounds(policy, prefix), *check_rules(policy, prefix)]


def check_rules(policy: PolicyConfig, prefix: str = "") -> list[Problem]:
    """Return the problems between a policy's rules."""
    return [
        Problem(f"{prefix}min_gain.{name}", "a rule in max_drop too", "one rule a name", "a gain is the stricter one")
        for name in policy.min_gain
        if name in policy.max_drop
    ]
