"""The paper's averages over tasks, and the leaderboards'. An average whose tasks are not all there is None: nothing stands in for a task.

Source: PRISM, Table 6 (Code Avg, Math Avg) and the footnote of section 13 (AVG); the project page's AVG is another mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

CODE = ("livecodebench", "codeforces")
MATH = ("aime24", "aime25", "math500")
GPQA = ("gpqa_diamond",)
SIX = (*CODE, *MATH, *GPQA)
OTHERS = {"v1": "leaderboard_v1", "v2": "leaderboard_v2", "ruler": "ruler"}  # whose score is a mean already


def averages(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the averages of scores by set.

    avg: the paper's, of the means of code, of math, and of GPQA: domains weigh the same. avg_of_six: the project page's, of the six benchmarks.
    """
    code, math, gpqa = (_mean(scores, names) for names in (CODE, MATH, GPQA))
    means: dict[str, float | None] = {"code": code, "math": math, "gpqa": gpqa}
    return {
        **means,
        "avg": _mean(means, tuple(means)),
        "avg_of_six": _mean(scores, SIX),
        **{name: scores.get(of) for name, of in OTHERS.items()},
    }


def _mean(scores: Mapping[str, float | None], names: tuple[str, ...]) -> float | None:
    values = [value for name in names if (value := scores.get(name)) is not None]
    return fmean(values) if len(values) == len(names) else None
