"""How often a verdict is wrong: 1,000 simulated evaluations of models of which the truth is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from megatron_prism.core.config.policy import PolicyConfig
from megatron_prism.eval.verdicts.change import Change, change_of
from megatron_prism.eval.verdicts.policy import judge, rules_of, whole
from tests.unit.eval.two_evaluations import drawn

NUM_SIMULATIONS = 1000
SLACK = 0.021  # three standard errors of a share of .05 among 1,000


def shares(policy: PolicyConfig, draw_changes: Callable[[np.random.Generator], dict[str, Change]]) -> dict[str | None, float]:
    """Return the share of each decision among simulated evaluations."""
    draw = np.random.default_rng(2026)
    rules = [(rule, {rule.measure: 1.0}) for rule in rules_of(policy)]
    drawn = (draw_changes(draw) for _ in range(NUM_SIMULATIONS))
    counts = Counter(whole(judge(rules, changes, {task: one.num_pairs for task, one in changes.items()}, policy)) for changes in drawn)
    return {decision: count / NUM_SIMULATIONS for decision, count in counts.items()}


def tasks(sizes: dict[str, tuple[int, int]], fall: float = 0.0) -> Callable[[np.random.Generator], dict[str, Change]]:
    """Return what draws tasks of (questions, samples), whose chances fall by the same share of them in the new model."""

    def draw_changes(draw: np.random.Generator) -> dict[str, Change]:
        changes = {}
        for name, (num_questions, num_samples) in sizes.items():
            old = draw.beta(1.0, 1.0, num_questions)
            changes[name] = change_of(drawn(name, old, old * (1 - 2 * fall), num_samples, draw))  # the mean of old is .5
        return changes

    return draw_changes


@pytest.mark.parametrize(
    "sizes",
    [{"a": (100, 1)}, {"a": (30, 1), "b": (100, 1), "c": (200, 1), "d": (60, 1)}, {"a": (30, 4), "b": (40, 3)}],
    ids=["one task", "four tasks", "samples"],
)
def test_without_a_true_difference_no_go_keeps_its_share(sizes: dict[str, tuple[int, int]]) -> None:
    policy = PolicyConfig(max_drop=dict.fromkeys(sizes, 0.0), alpha=0.05)
    assert shares(policy, tasks(sizes)).get("NO-GO", 0.0) <= policy.alpha + SLACK
    if len(sizes) < 4:
        return
    unadjusted = [shares(PolicyConfig(max_drop={name: 0.0}), tasks({name: size})).get("NO-GO", 0.0) for name, size in sizes.items()]
    assert 1 - np.prod([1 - share for share in unadjusted]) > policy.alpha + SLACK, "without Holm it would not"


def test_a_fall_of_the_margin_is_rarely_called_either_way_and_one_of_twice_the_margin_is_found() -> None:
    policy, sizes = PolicyConfig(max_drop={"a": 0.05}), {"a": (400, 4)}
    at_margin = shares(policy, tasks(sizes, fall=0.05))
    assert at_margin.get("NO-GO", 0.0) <= policy.alpha + SLACK and at_margin.get("GO", 0.0) <= policy.alpha + SLACK
    assert shares(policy, tasks(sizes, fall=0.1)).get("NO-GO", 0.0) > 0.9
    assert shares(policy, tasks(sizes)).get("GO", 0.0) > 0.9


def test_a_gain_that_is_asked_for_and_is_not_there_is_no_go() -> None:
    policy = PolicyConfig(min_gain={"a": 0.1})
    assert shares(policy, tasks({"a": (400, 4)})).get("NO-GO", 0.0) > 0.95
    assert shares(policy, tasks({"a": (400, 4)}, fall=-0.25)).get("GO", 0.0) > 0.9
