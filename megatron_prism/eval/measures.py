"""What a policy's rule may name: a task, or an average, as the weights of its tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

MEMBERS: Mapping[str, tuple[str, ...]] = {
    "code": ("livecodebench", "codeforces"),
    "math": ("aime24", "aime25", "math500"),
    "gpqa": ("gpqa_diamond",),
    "avg": ("code", "math", "gpqa"),
    "avg_of_six": ("livecodebench", "codeforces", "aime24", "aime25", "math500", "gpqa_diamond"),
}  # an average is the plain mean of its members, which may be averages


def weights_of(measure: str, tasks: Collection[str]) -> dict[str, float] | None:
    """Return the weights by which the tasks make a measure, summing to 1. None: it is no task of these, and no average."""
    if measure in tasks or measure not in MEMBERS:
        return {measure: 1.0} if measure in tasks else None
    weights: dict[str, float] = {}
    for member in MEMBERS[measure]:
        for task, weight in (weights_of(member, tasks) or {member: 1.0}).items():
            weights[task] = weights.get(task, 0.0) + weight / len(MEMBERS[measure])
    return weights
