"""The figures of a task from its graded responses: exact, and of any order of the responses the same.

A fault says nothing of a response: it is left out of numerator and denominator. A question all of whose responses are faults is left out,
and counted. A task's score is the mean of its questions' means, so that a question with a fault weighs as much as any other.
Source: pass@k, Chen et al. 2021 (2107.03374), equation 1; clustered standard errors, Miller 2024 (2411.00640).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from megatron_prism.eval.question import Result
from megatron_prism.grade.outcome import OUTCOMES


@dataclass(frozen=True)
class Score:
    """What a task came to. Shares are between 0 and 1; None where nothing was judged, or too little for it.

    score: the mean of the questions' means (avg@k). standard_error: of it, clustered by question: the questions are the sample, and a question's
    responses are one cluster. variance_within: of a question's responses, the mean over the questions. variance_between: of the questions'
    means, less what of it the responses' own variance explains; an estimate, which may be below 0. pass_at: by k, of the questions with at least
    k judged responses; empty where a score is neither 0 nor 1. outcomes: the share of all responses, faults too. by: the mean by a question's
    tag. rates: the share of the judged responses by a tag that grading adds. masked_questions: those left out.
    """

    score: float | None
    standard_error: float | None
    num_questions: int
    num_samples: int
    num_faults: int
    masked_questions: tuple[str, ...]
    mean_tokens: float
    variance_within: float | None
    variance_between: float | None
    pass_at: dict[str, float]
    outcomes: dict[str, float]
    by: dict[str, dict[str, float]]
    rates: dict[str, dict[str, float]]


def pass_at(num_judged: int, num_right: int, k: int) -> float:
    """Return the chance that at least one of k responses, drawn from those judged without putting back, is right."""
    if not 1 <= k <= num_judged:
        raise ValueError(f"k {k} of {num_judged} responses")
    return 1 - math.comb(num_judged - num_right, k) / math.comb(num_judged, k)


def of_task(results: Sequence[Result], question_tags: Iterable[str] = ()) -> Score:
    """Return a task's score. question_tags: the tags that are a question's own; any other is a response's."""
    by_id: dict[str, list[Result]] = {}
    for result in results:
        by_id.setdefault(result.id, []).append(result)
    judged = {id: scores for id, own in by_id.items() if (scores := [one.score for one in own if one.score is not None])}
    means = {id: fmean(scores) for id, scores in judged.items()}
    counts: Counter[str] = Counter(result.outcome for result in results)
    own_tags = list(question_tags)
    answered = [result for result in results if result.score is not None]
    return Score(
        score=_mean(means.values()),
        standard_error=math.sqrt(variance(means.values()) / len(means)) if len(means) > 1 else None,
        num_questions=len(by_id),
        num_samples=max((len(own) for own in by_id.values()), default=0),
        num_faults=counts["fault"],
        masked_questions=tuple(id for id in by_id if id not in judged),
        mean_tokens=_mean(result.num_tokens for result in answered) or 0.0,
        **_variances(list(judged.values())),
        pass_at=_pass_at(list(judged.values())),
        outcomes={name: counts[name] / len(results) for name in OUTCOMES} if results else {},
        by={tag: _by(tag, by_id, means) for tag in own_tags},
        rates=_rates(answered, set(own_tags)),
    )


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return fmean(listed) if listed else None


def _variances(judged: Sequence[Sequence[float]]) -> dict[str, float | None]:
    several = [scores for scores in judged if len(scores) > 1]
    within = _mean(variance(scores) for scores in several)
    if within is None or len(several) < 2:
        return {"variance_within": within, "variance_between": None}
    explained = fmean(variance(scores) / len(scores) for scores in several)
    return {"variance_within": within, "variance_between": variance([fmean(scores) for scores in several]) - explained}


def _pass_at(judged: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return pass@k for k of 1, 2, 4, ... and the most responses of a question."""
    if any(score not in (0, 1) for scores in judged for score in scores):
        return {}
    most = max(map(len, judged), default=0)
    ks = sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)} - {0})
    return {str(k): fmean(pass_at(len(scores), int(sum(scores)), k) for scores in judged if len(scores) >= k) for k in ks}


def _by(tag: str, by_id: Mapping[str, Sequence[Result]], means: Mapping[str, float]) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for id, mean in means.items():
        if (value := by_id[id][0].tags.get(tag)) is not None:
            grouped.setdefault(value, []).append(mean)
    return {value: fmean(own) for value, own in sorted(grouped.items())}


def _rates(results: Sequence[Result], own_tags: set[str]) -> dict[str, dict[str, float]]:
    tags = sorted({tag for result in results for tag in result.tags} - own_tags)
    rates = {}
    for tag in tags:
        counts = Counter(result.tags[tag] for result in results if tag in result.tags)
        rates[tag] = {value: count / len(results) for value, count in sorted(counts.items())}
    return rates


def as_values(score: Score) -> dict[str, Any]:
    """Return a score as plain values for summary.json."""
    return {**vars(score), "masked_questions": list(score.masked_questions)}
