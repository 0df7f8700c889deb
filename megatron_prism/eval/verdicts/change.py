"""What changed between two evaluations of a task: the difference of the means, how sure it is, and which questions flipped.

The unit is the question: its samples are averaged first, so that 64 samples of one question are one observation (a cluster), as in
"Adding Error Bars to Evals", arXiv 2411.00640. An average of tasks is the weighted sum of their changes; their questions are independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_prism.core.student import t_quantile, t_tail
from megatron_prism.eval.verdicts.paired import Pairs
from megatron_prism.eval.verdicts.tails import Tails, sign_flip

NUM_RESAMPLES = 10_000  # of the bootstrap
MAX_DRAWN = 5_000_000  # its numbers in memory at once
PLUS_FOUR = 4.0  # responses by which a decision widens the spread (spread_of)
SOLVED = 0.5  # a question is solved where more than this share of its samples is right


@dataclass(frozen=True)
class Spread:
    """Where the variance of a question's score comes from. standard_error: of the mean over questions, clustered by question.

    within: between samples of a question (None: one sample each). between: between questions, without what their samples add.
    standard_error_same_questions: of the samples alone, for whoever asks about these questions and no others.
    samples_to_halve: the samples a question that would halve standard_error. None: no number would, since the questions make it.
    """

    standard_error: float
    within: float | None
    between: float
    standard_error_same_questions: float | None
    samples_to_halve: int | None


@dataclass(frozen=True)
class Flips:
    """The questions that are solved by one evaluation only: by most samples of a question (SOLVED). p_fall: McNemar's, one-sided, exact."""

    lost: tuple[str, ...]
    gained: tuple[str, ...]
    p_fall: float
    p_rise: float


@dataclass(frozen=True)
class Change:
    """A task of two evaluations. differences: new less old, of each question's mean, in the order of `pairs.ids`."""

    pairs: Pairs
    old_score: float
    new_score: float
    differences: np.ndarray
    old: Spread
    new: Spread
    difference: Spread
    flips: Flips

    @property
    def change(self) -> float:
        """The difference of the means."""
        return self.new_score - self.old_score

    @property
    def num_pairs(self) -> int:
        """The paired questions."""
        return len(self.pairs.ids)


def change_of(pairs: Pairs) -> Change:
    """Return the figures of a task's pairs, of which there must be two or more."""
    old_means, new_means = (_means(scores, pairs.question) for scores in (pairs.old, pairs.new))
    lost = (old_means > SOLVED) & (new_means <= SOLVED)
    gained = (old_means <= SOLVED) & (new_means > SOLVED)
    tails = sign_flip(gained.astype(np.float64) - lost, seed=0)  # listed, so no lots are drawn
    return Change(
        pairs,
        float(old_means.mean()),
        float(new_means.mean()),
        new_means - old_means,
        old=_spread(pairs.old, pairs.question),
        new=_spread(pairs.new, pairs.question),
        difference=_spread(pairs.new - pairs.old, pairs.question),
        flips=Flips(_ids(pairs, lost), _ids(pairs, gained), tails.low, tails.high),
    )


def _ids(pairs: Pairs, which: np.ndarray) -> tuple[str, ...]:
    return tuple(pairs.ids[place] for place in np.flatnonzero(which))


def _means(values: np.ndarray, question: np.ndarray) -> np.ndarray:
    return np.bincount(question, weights=values) / np.bincount(question)


def _spread(values: np.ndarray, question: np.ndarray) -> Spread:
    counts, means = np.bincount(question), _means(values, question)
    num_questions = len(means)
    total = float(means.var(ddof=1))
    standard_error = math.sqrt(total / num_questions)
    repeated = counts > 1
    if not repeated.any():
        return Spread(standard_error, None, total, None, None)
    squares = np.bincount(question, weights=(values - means[question]) ** 2)
    within = float((squares[repeated] / (counts[repeated] - 1)).mean())
    of_samples = within * float((1 / counts).mean())
    between = max(total - of_samples, 0.0)
    left = (between + of_samples) / 4 - between
    return Spread(
        standard_error,
        within,
        between,
        math.sqrt(of_samples / num_questions),
        math.ceil(within / left * (1 - 1e-12)) if left > 0 and within > 0 else None,
    )


@dataclass(frozen=True)
class Estimate:
    """A change of a task or an average as a decision reads it: the value, its standard error, Student's degrees of freedom, exact tests.

    by_lot: the exact tests of no difference, in both directions. num_pairs: the fewest of its tasks.
    """

    change: float
    standard_error: float
    df: float
    by_lot: Tails
    num_pairs: int

    def p_below(self, least: float) -> float:
        """Return how probable a change as low is where the true one is `least`; from `least` 0 down, by the exact test too."""
        p = t_tail((least - self.change) / self.standard_error, self.df)
        return max(p, self.by_lot.low) if least <= 0 else p

    def p_above(self, least: float) -> float:
        """Return how probable a change as high is where the true one is `least`; from `least` 0 up, by the exact test too."""
        p = t_tail((self.change - least) / self.standard_error, self.df)
        return max(p, self.by_lot.high) if least >= 0 else p

    def bounds(self, alpha: float) -> tuple[float, float]:
        """Return the change's lower and upper bound, each of which the true change passes in a share alpha of evaluations."""
        reach = t_quantile(alpha, self.df) * self.standard_error
        return self.change - reach, self.change + reach


def estimate(changes: Sequence[tuple[float, Change]], seed: int, test: Literal["permutation", "mcnemar"] = "permutation") -> Estimate:
    """Return the weighted sum of tasks' changes. test: of a single task; several are always tested by lot.

    The standard error is wider than the one that is reported. A test of a margin by the observed spread alone would be sure of everything
    where few questions differ: with no flip among 10 it would exclude any fall. As if four more responses had flipped, two each way, the
    bound of n questions without a flip is 3.3 / n at 95 %, where the exact one is 3 / n (ours; Agresti's "plus four", for pairs).
    """
    parts = [(weight, one, weight**2 * _careful_variance(one)) for weight, one in changes]
    variance = sum(part for _, _, part in parts)
    df = variance**2 / sum(part**2 / (one.num_pairs - 1) for _, one, part in parts)  # Welch and Satterthwaite
    single = changes[0][1] if len(changes) == 1 else None
    if single is not None and test == "mcnemar":
        by_lot = Tails(single.flips.p_fall, single.flips.p_rise, is_exact=True)
    else:
        by_lot = sign_flip(np.concatenate([weight / one.num_pairs * one.differences for weight, one in changes]), seed)
    return Estimate(
        sum(weight * one.change for weight, one in changes),
        math.sqrt(variance),
        df,
        by_lot,
        min(one.num_pairs for _, one in changes),
    )


def _careful_variance(change: Change) -> float:
    """Return the variance of a change as if PLUS_FOUR more responses had flipped."""
    num_pairs = change.num_pairs
    num_samples = len(change.pairs.keys) / num_pairs
    squares = float(((change.differences - change.change) ** 2).sum())
    return (squares + PLUS_FOUR / num_samples) / (num_pairs * (num_pairs - 1))


def bootstrap(changes: Sequence[tuple[float, Change]], alpha: float, seed: int) -> tuple[float, float]:
    """Return the bounds (percentiles alpha and 1 - alpha) of a weighted sum of changes over questions drawn anew, with all their samples."""
    draw, sums = np.random.default_rng(seed), np.zeros(NUM_RESAMPLES)
    for weight, one in changes:
        values, counts = np.unique(one.differences, return_counts=True)  # equal differences are drawn as one: the same distribution
        for part in np.array_split(sums, -(-NUM_RESAMPLES * len(values) // MAX_DRAWN)):
            part += weight * (draw.multinomial(one.num_pairs, counts / one.num_pairs, len(part)) @ values) / one.num_pairs
    low, high = np.quantile(sums, [alpha, 1 - alpha])
    return float(low), float(high)
