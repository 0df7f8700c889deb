"""What a policy's rule may name: a task, or an average, as the weights of its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_prism.eval.averages import CODE, GPQA, MATH, OTHERS, SIX

LEADERBOARD_V1 = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")
MEMBERS: Mapping[str, tuple[str, ...]] = {
    "code": CODE,
    "math": MATH,
    "gpqa": GPQA,
    "avg": ("code", "math", "gpqa"),
    "avg_of_six": SIX,
    "v1": LEADERBOARD_V1,
}  # an average is the plain mean of its members, which may be averages


@dataclass(frozen=True)
class Tasks:
    """The tasks of two evaluations. sets: the tasks that ask a set, by its name. groups: lm-eval's tasks, by the benchmark they are parts of."""

    names: frozenset[str]
    sets: Mapping[str, frozenset[str]]
    groups: Mapping[str, frozenset[str]]

    def weights(self, measure: str) -> dict[str, float] | None:
        """Return the weights, summing to 1, by which tasks make a measure. None: it is no task of these, and no average.

        A name stands for the task of that name, else for the only task that asks the set of that name, else for the mean over lm-eval's tasks
        of that benchmark. What an average needs and these do not have is named as a task.
        """
        if measure in self.names:
            return {measure: 1.0}
        if len(of_set := self.sets.get(OTHERS.get(measure, measure), frozenset())) == 1:
            return dict.fromkeys(of_set, 1.0)
        if parts := self.groups.get(measure):
            return dict.fromkeys(sorted(parts), 1 / len(parts))
        if measure not in MEMBERS:
            return None
        weights: dict[str, float] = {}
        for member in MEMBERS[measure]:
            for task, weight in (self.weights(member) or {member: 1.0}).items():
                weights[task] = weights.get(task, 0.0) + weight / len(MEMBERS[measure])
        return weights
