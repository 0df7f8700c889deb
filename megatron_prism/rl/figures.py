"""The metrics of a step's responses and of a validation: pure functions of graded samples."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from megatron_prism.eval.score import pass_at
from megatron_prism.rl.rollout import Rollouts, samples
from megatron_prism.rl.sample import Sample


def of_rollouts(rollouts: Rollouts) -> dict[str, float]:
    """Return the metrics of all that was sampled, kept or not. A fault of the grader has no reward."""
    everything = samples(rollouts.groups)
    by_domain: dict[str, list[float]] = {}
    for sample in everything:
        if sample.outcome != "fault":
            by_domain.setdefault(sample.domain, []).append(sample.reward)
    rewards = [reward for domain in by_domain.values() for reward in domain]
    return {
        "reward": fmean(rewards) if rewards else 0.0,
        **{f"reward/{domain}": fmean(values) for domain, values in sorted(by_domain.items())},
        "right": _share(everything, "right"),
        "kept_groups": len(rollouts.kept) / len(rollouts.groups),
        "response_tokens": fmean(len(sample.token_ids) for sample in everything),
        "truncated": fmean(sample.ended != "end_token" for sample in everything),
        "no_format": _share(everything, "no_format"),
        "grader_faults": _share(everything, "fault"),
    }


def by_domain(rollouts: Rollouts) -> dict[str, float]:
    """Return the metrics of a step's responses by domain, as of_rollouts has them of all domains together: NAME/DOMAIN."""
    values: dict[str, float] = {}
    for domain in sorted({group[0].sample.domain for group in rollouts.groups}):
        groups = [group for group in rollouts.groups if group[0].sample.domain == domain]
        kept = [group for group in rollouts.kept if group[0].sample.domain == domain]
        of_domain = of_rollouts(Rollouts(groups, kept, rollouts.num_drawn))
        values |= {f"{name}/{domain}": value for name, value in of_domain.items() if "/" not in name and name != "reward"}
    return values


def _share(group: Sequence[Sample], outcome: str) -> float:
    return fmean(sample.outcome == outcome for sample in group)


def of_validation(groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Return pass@1 and pass@n by domain, n being the responses to a prompt. Faults of the grader are left out of a prompt's n."""
    by_domain: dict[str, list[tuple[int, int]]] = {}
    faults: dict[str, list[bool]] = {}
    num_samples = len(groups[0])
    for group in groups:
        faults.setdefault(group[0].domain, []).extend(sample.outcome == "fault" for sample in group)
        judged = [sample for sample in group if sample.outcome != "fault"]
        if judged:
            by_domain.setdefault(group[0].domain, []).append((len(judged), sum(sample.is_right for sample in judged)))
    values = {f"{domain}/grader_faults": fmean(one) for domain, one in sorted(faults.items())}
    for domain, counts in sorted(by_domain.items()):
        for k in dict.fromkeys((1, num_samples)):
            values[f"{domain}/pass_at_{k}"] = fmean(pass_at(n, c, min(k, n)) for n, c in counts)
    return values
