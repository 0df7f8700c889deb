"""The paper's averages over tasks and the leaderboards': their values, and as weights of their tasks, by which a policy judges a change.

An average whose tasks are not all there is None: nothing stands in for a task.
Source: PRISM, Table 6 (Code Avg, Math Avg) and the footnote of section 13 (AVG); the project page's AVG is another mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from megatron_prism.eval.retention.leaderboards import BY_VERSION, Benchmark, slope

# avg: the paper's, in which domains weigh the same. avg_of_six: the project page's, of the six benchmarks.
DOMAINS: Mapping[str, tuple[str, ...]] = {
    "code": ("livecodebench", "codeforces"),
    "math": ("aime24", "aime25", "math500"),
    "gpqa": ("gpqa_diamond",),
}
SIX = tuple(name for names in DOMAINS.values() for name in names)
MEANS: Mapping[str, tuple[str, ...]] = {**DOMAINS, "avg": tuple(DOMAINS), "avg_of_six": SIX}
SETS = {"v1": "leaderboard_v1", "v2": "leaderboard_v2", "ruler": "ruler"}  # averages that are the score of a set
NAMES = (*MEANS, *SETS)


def averages(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the averages by name. scores: by set."""
    domains = {name: _mean(scores, sets) for name, sets in DOMAINS.items()}
    return {
        **domains,
        "avg": _mean(domains, MEANS["avg"]),
        "avg_of_six": _mean(scores, SIX),
        **{name: scores.get(of) for name, of in SETS.items()},
    }


def _mean(scores: Mapping[str, float | None], names: tuple[str, ...]) -> float | None:
    values = [value for name in names if (value := scores.get(name)) is not None]
    return fmean(values) if len(values) == len(names) else None


@dataclass(frozen=True)
class Tasks:
    """The tasks of two evaluations, with the number of their questions. sets: the tasks that ask a set, by its name. groups: lm-eval's tasks, by
    the benchmark of a leaderboard that they are parts of."""

    num_questions: Mapping[str, int]
    sets: Mapping[str, frozenset[str]]
    groups: Mapping[str, frozenset[str]]

    def weights(self, measure: str) -> dict[str, float] | None:
        """Return the weights by which tasks make a measure: a task or an average. None: it is no task of these, and no average.

        A name stands for the task of that name, else for the only task that asks the set of that name, else for an average, else for the mean
        over lm-eval's tasks of that benchmark. What an average needs and these do not have is named as a task.
        """
        if measure in self.num_questions:
            return {measure: 1.0}
        if len(of_set := self.sets.get(SETS.get(measure, measure), frozenset()) & self.num_questions.keys()) == 1:
            return dict.fromkeys(of_set, 1.0)
        if measure in MEANS:
            return _sum([(1 / len(MEANS[measure]), self.weights(member) or {member: 1.0}) for member in MEANS[measure]])
        if measure in BY_VERSION:
            board = BY_VERSION[measure]
            return _sum([(1 / len(board), self._of_benchmark(one)) for one in board])
        if parts := self.groups.get(measure):
            return dict.fromkeys(sorted(parts), 1 / len(parts))
        return {SETS[measure]: 1.0} if measure in SETS else None

    def _of_benchmark(self, benchmark: Benchmark) -> dict[str, float]:
        """Return the weights of a benchmark's tasks in its leaderboard's score: where that subtracts guessing, they sum to more than 1.

        Below guessing the leaderboard's score is 0 whatever happens; a change counts here all the same.
        """
        parts = sorted(self.groups.get(benchmark.task, ()))
        if not parts:
            return {benchmark.task: 1.0}
        total = sum(self.num_questions[task] for task in parts)
        share = {task: self.num_questions[task] / total if benchmark.is_pooled else 1 / len(parts) for task in parts}
        return {task: share[task] * slope(benchmark, task.partition("/")[2]) for task in parts}


def _sum(parts: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for share, of_part in parts:
        for task, weight in of_part.items():
            weights[task] = weights.get(task, 0.0) + share * weight
    return weights
