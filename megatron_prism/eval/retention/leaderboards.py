"""The Open LLM Leaderboard, versions 1 and 2: which of lm-eval's tasks, with how many examples, by which metric, and how they are averaged.

A score is a share between 0 and 1. Version 1 averages six scores as they are; version 2 first subtracts what guessing reaches.
Source: lm-eval's tasks/benchmarks/openllm.yaml and tasks/leaderboard/ (0.4.13), and the leaderboard's own page "Scores Normalization".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Metrics = Mapping[str, Mapping[str, float]]  # by lm-eval task, then by metric: the scores of an evaluation


@dataclass(frozen=True)
class Benchmark:
    """A row of a leaderboard.

    task: of lm-eval, one or a group. metric and filter: whose value is the score. num_choices: of a task, or by its sub-task's last words, where
    guessing is subtracted. is_pooled: a group's documents are counted together; else its sub-tasks' scores are averaged.
    """

    task: str
    num_fewshot: int
    metric: str
    filter: str = "none"
    num_choices: int | Mapping[str, int] | None = None
    is_pooled: bool = False


_BBH = {
    "boolean_expressions": 2,
    "causal_judgement": 2,
    "date_understanding": 6,
    "disambiguation_qa": 3,
    "formal_fallacies": 2,
    "geometric_shapes": 11,
    "hyperbaton": 2,
    "logical_deduction_five_objects": 5,
    "logical_deduction_seven_objects": 7,
    "logical_deduction_three_objects": 3,
    "movie_recommendation": 6,
    "navigate": 2,
    "object_counting": 19,
    "penguins_in_a_table": 5,
    "reasoning_about_colored_objects": 18,
    "ruin_names": 6,
    "salient_translation_error_detection": 6,
    "snarks": 2,
    "sports_understanding": 2,
    "temporal_sequences": 4,
    "tracking_shuffled_objects_five_objects": 5,
    "tracking_shuffled_objects_seven_objects": 7,
    "tracking_shuffled_objects_three_objects": 3,
    "web_of_lies": 2,
}
_MUSR = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
LEADERBOARD_V1 = (
    Benchmark("arc_challenge", 25, "acc_norm"),
    Benchmark("hellaswag", 10, "acc_norm"),
    Benchmark("mmlu", 5, "acc"),
    Benchmark("truthfulqa_mc2", 0, "acc"),
    Benchmark("winogrande", 5, "acc"),
    Benchmark("gsm8k", 5, "exact_match", "strict-match"),
)
LEADERBOARD_V2 = (
    Benchmark("leaderboard_ifeval", 0, "prompt_level_strict_acc"),
    Benchmark("leaderboard_bbh", 3, "acc_norm", num_choices=_BBH),
    Benchmark("leaderboard_math_hard", 4, "exact_match", is_pooled=True),
    Benchmark("leaderboard_gpqa", 0, "acc_norm", num_choices=4, is_pooled=True),
    Benchmark("leaderboard_musr", 0, "acc_norm", num_choices=_MUSR),
    Benchmark("leaderboard_mmlu_pro", 5, "acc", num_choices=10),
)
BY_VERSION = {"v1": LEADERBOARD_V1, "v2": LEADERBOARD_V2}
LEADERBOARDS = {f"leaderboard_{name}": table for name, table in BY_VERSION.items()}  # by the name of the set
INSTRUCTIONS = ("prompt_level_strict_acc", "inst_level_strict_acc")  # IFEval's score is the mean of these two


def above_guessing(score: float, num_choices: int) -> float:
    """Return how far a score lies between guessing (0) and all right (1); 0 below guessing."""
    return max(0.0, (score - 1 / num_choices) / (1 - 1 / num_choices))


def slope(benchmark: Benchmark, task: str) -> float:
    """Return the slope of a benchmark's score over the metric of its only task, where that lies above guessing."""
    return 1.0 if benchmark.num_choices is None else 1 / (1 - 1 / _num_choices(benchmark, task))


def score(benchmark: Benchmark, scores: Metrics, num_documents: Mapping[str, int]) -> float | None:
    """Return a benchmark's score as its leaderboard shows it, over 100; None where a sub-task that scores name is missing.

    scores: of the benchmark's own sub-tasks alone, or of its one task.
    """
    if not scores or any(benchmark.metric not in metrics for metrics in scores.values()):
        return None
    if benchmark.metric in INSTRUCTIONS:
        values = [metrics[metric] for metrics in scores.values() for metric in INSTRUCTIONS]
        return sum(values) / len(values)
    by_task = {task: metrics[benchmark.metric] for task, metrics in scores.items()}
    if benchmark.is_pooled:
        total = sum(num_documents[task] for task in by_task)
        by_task = {benchmark.task: sum(value * num_documents[task] for task, value in by_task.items()) / total}
    if benchmark.num_choices is not None:
        by_task = {task: above_guessing(value, _num_choices(benchmark, task)) for task, value in by_task.items()}
    return sum(by_task.values()) / len(by_task)


def average(by_benchmark: Mapping[str, float | None], leaderboard: tuple[Benchmark, ...]) -> float | None:
    """Return the mean over a leaderboard's benchmarks, or None where one has no score."""
    values = [by_benchmark.get(benchmark.task) for benchmark in leaderboard]
    return None if None in values else sum(value for value in values if value is not None) / len(values)


def _num_choices(benchmark: Benchmark, task: str) -> int:
    choices = benchmark.num_choices
    if isinstance(choices, Mapping):
        return choices[task.removeprefix(f"{benchmark.task}_")]
    assert choices is not None
    return choices
