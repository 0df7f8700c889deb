"""From changes to a decision: GO, NO-GO or INCONCLUSIVE for each rule of a policy, and for all.

A rule demands that a change be at least some value: -0.02 for a fall of at most 0.02. NO-GO: the change is below it with confidence. GO: it is
above it with confidence. INCONCLUSIVE: the pairs do not say. So a rule is a test in each direction, and never "no significant difference".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_prism.core.config.policy import PolicyConfig
from megatron_prism.core.student import t_quantile
from megatron_prism.eval.verdicts.change import Change, Estimate, estimate

Decision = Literal["GO", "NO-GO", "INCONCLUSIVE"]
POWER = 0.8  # of the number of pairs that an inconclusive rule would need


@dataclass(frozen=True)
class Rule:
    """A demand on the change of a task or an average."""

    measure: str
    least_change: float

    def __str__(self) -> str:
        if self.least_change > 0:
            return f"{self.measure} must rise by at least {100 * self.least_change:g} points"
        return f"{self.measure} may fall by at most {abs(100 * self.least_change):g} points"


@dataclass(frozen=True)
class Judged:
    """A rule and what came of it. tasks: by weight in the change. low, high: the one-sided bounds at the policy's alpha that the decision reads.

    p_no_go: how probable so low a change would be if the rule just held; adjusted: by Holm
    over all rules. p_go: how probable so high a change would be if the rule were just broken. pairs_needed: about how many pairs of the same
    kind would decide an inconclusive rule for GO, four times of five, if nothing has changed.
    """

    measure: str
    least_change: float
    decision: Decision
    why: str
    tasks: Mapping[str, float]
    num_pairs: int
    change: float | None = None
    low: float | None = None
    high: float | None = None
    p_no_go: float | None = None
    p_no_go_adjusted: float | None = None
    p_go: float | None = None
    pairs_needed: int | None = None


def rules_of(policy: PolicyConfig) -> list[Rule]:
    """Return a policy's rules."""
    falls = [Rule(name, -drop if drop else 0.0) for name, drop in policy.max_drop.items()]
    return [*falls, *(Rule(name, gain) for name, gain in policy.min_gain.items())]


def judge(
    rules: Sequence[tuple[Rule, Mapping[str, float]]], changes: Mapping[str, Change], num_pairs: Mapping[str, int], policy: PolicyConfig
) -> list[Judged]:
    """Return each rule judged. With a rule come the weights of its tasks, all of which have changes if they have two pairs or more.

    num_pairs: the paired questions of every task, one without a change too.
    """
    estimates: list[Estimate | None] = []
    for _, weights in rules:
        parts = [(weight, changes[task]) for task, weight in weights.items() if task in changes]
        is_whole = len(parts) == len(weights) and all(one.num_pairs >= policy.min_pairs for _, one in parts)
        estimates.append(estimate(parts, policy.seed, policy.test) if is_whole else None)
    adjusted = iter(holm([one.p_below(rule.least_change) for (rule, _), one in zip(rules, estimates, strict=True) if one is not None]))
    return [
        _too_few(rule, {task: num_pairs[task] for task in weights}, weights, policy)
        if one is None
        else _judged(rule, weights, one, next(adjusted), policy)
        for (rule, weights), one in zip(rules, estimates, strict=True)
    ]


def _too_few(rule: Rule, num_pairs: Mapping[str, int], weights: Mapping[str, float], policy: PolicyConfig) -> Judged:
    task = min(num_pairs, key=num_pairs.__getitem__)
    why = f"{num_pairs[task]} pairs of {task}, and at least {policy.min_pairs} decide (min_pairs)"
    return Judged(rule.measure, rule.least_change, "INCONCLUSIVE", why, weights, num_pairs[task])


def _judged(rule: Rule, weights: Mapping[str, float], one: Estimate, p_adjusted: float, policy: PolicyConfig) -> Judged:
    low, high = one.bounds(policy.alpha)
    p_go = one.p_above(rule.least_change)
    decision: Decision = "NO-GO" if p_adjusted <= policy.alpha else "GO" if p_go <= policy.alpha else "INCONCLUSIVE"
    needed = _pairs_needed(rule, one, policy.alpha) if decision == "INCONCLUSIVE" and rule.least_change < 0 else None
    why = {
        "NO-GO": f"{rule}; with confidence it is below that",
        "GO": f"{rule}; with confidence it keeps that",
        "INCONCLUSIVE": f"{rule}; {one.num_pairs} pairs do not say whether it does"
        + (f", about {needed} would if nothing has changed" if needed is not None and needed > one.num_pairs else ""),
    }[decision]
    return Judged(
        rule.measure,
        rule.least_change,
        decision,
        why,
        weights,
        one.num_pairs,
        one.change,
        low,
        high,
        one.p_below(rule.least_change),
        p_adjusted,
        p_go,
        needed,
    )


def _pairs_needed(rule: Rule, one: Estimate, alpha: float) -> int:
    reach = t_quantile(alpha, one.df) + t_quantile(1 - POWER, one.df)
    return math.ceil(one.num_pairs * (reach * one.standard_error / rule.least_change) ** 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that the share of any false rejection is at most alpha, whatever their dependence.

    Source: Holm 1979, the step-down method.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def whole(judged: Sequence[Judged]) -> Decision | None:
    """Return the decision of all rules: NO-GO where one is, GO where all are. None: there is no rule.

    GO needs no adjustment: it is wrong only if a broken rule passes its own test (an intersection-union test).
    """
    decisions = {one.decision for one in judged}
    if not decisions:
        return None
    return "NO-GO" if "NO-GO" in decisions else "INCONCLUSIVE" if "INCONCLUSIVE" in decisions else "GO"
