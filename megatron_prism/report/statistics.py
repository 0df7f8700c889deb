"""Intervals of the report: of one evaluation by its own error, of several seeds by their spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from megatron_prism.core.student import t_quantile
from megatron_prism.report.document import Measured

NORMAL = 1.959964  # at .975


def by_error(value: float, error: float | None, n: int | None = None) -> Measured:
    """Return a figure with the 95 % interval of its standard error."""
    if error is None:
        return Measured(value, n=n)
    return Measured(value, value - NORMAL * error, value + NORMAL * error, n)


def over(values: Sequence[Measured]) -> Measured | None:
    """Return the only figure as it is; of several (seeds) their mean, with Student's 95 % interval of it. n: how many."""
    if len(values) < 2:
        return values[0] if values else None
    numbers = [one.value for one in values]
    mean, degrees = fmean(numbers), len(numbers) - 1
    half = t_quantile(0.025, degrees) * stdev(numbers) / math.sqrt(len(numbers))
    return Measured(mean, mean - half, mean + half, len(numbers))
