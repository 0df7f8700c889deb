"""What a model's responses to a task are like: their length, how sure the model is of them, and which problems they solve.

Standard errors are clustered by problem: the responses to one problem are one cluster. A response whose log-probability was not kept is NaN there,
and left out of what needs one.
Shape legend: N responses, P problems.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_LENGTH_BINS = 10  # quantiles of length in which right and wrong responses are compared
NGRAM = 4  # words
CLOSE = "</think>"


@dataclass(frozen=True, eq=False)
class Responses:
    """A task's responses that have a verdict. problem_N: 0, 1, ... in the order of some list of problems. sample_N: its number.

    neg_logprob_N: the mean over a response's tokens, in nats; NaN: not kept. is_cut_N: it ended for want of room.
    """

    problem_N: np.ndarray
    sample_N: np.ndarray
    is_right_N: np.ndarray
    num_tokens_N: np.ndarray
    neg_logprob_N: np.ndarray
    is_cut_N: np.ndarray


@dataclass(frozen=True)
class Mean:
    """A mean over responses, or a difference of two. Both None: there is nothing to take it of, or one problem alone. num: the responses."""

    value: float | None
    standard_error: float | None
    num: int


@dataclass(frozen=True)
class Lengths:
    """Tokens of responses, cut ones among them. None: there are none."""

    mean: float | None
    quartile_1: float | None
    median: float | None
    quartile_3: float | None


@dataclass(frozen=True)
class Certainty:
    """Negative log-probability per token: the mean over responses, as a reader of the paper's Table 15 would take it.

    by_token: of all tokens together, in which long responses weigh more. wrong_less_right: the difference of both means; _same_length: of
    responses of about one length; _same_problem: of responses to one problem, which leaves out that hard problems have other responses.
    """

    all: Mean
    right: Mean
    wrong: Mean
    by_token: float | None
    wrong_less_right: Mean
    wrong_less_right_same_length: Mean
    wrong_less_right_same_problem: Mean
    num_not_kept: int


@dataclass(frozen=True)
class Solvability:
    """Which problems are solved. histogram: the share of the problems of which so many of num_samples responses are right.

    null: that histogram where every problem had the same chance, the mean pass rate. Problems with fewer responses (faults) are left out.
    """

    num_samples: int
    num_problems: int
    none: float | None
    some: float | None
    all: float | None
    histogram: tuple[float, ...]
    null: tuple[float, ...]


def pass_rate(responses: Responses) -> Mean:
    """Return the share of right responses: the mean over problems of a problem's mean, as prism evaluate's score."""
    num_P = np.bincount(responses.problem_N)
    rate_P = np.bincount(responses.problem_N, responses.is_right_N)[num_P > 0] / num_P[num_P > 0]
    if not rate_P.size:
        return Mean(None, None, 0)
    error = float(rate_P.std(ddof=1) / math.sqrt(rate_P.size)) if rate_P.size > 1 else None
    return Mean(float(rate_P.mean()), error, len(responses.problem_N))


def lengths(num_tokens_N: np.ndarray) -> Lengths:
    """Return quartiles and mean of lengths."""
    if not num_tokens_N.size:
        return Lengths(None, None, None, None)
    first, median, third = (float(value) for value in np.quantile(num_tokens_N, (0.25, 0.5, 0.75)))
    return Lengths(float(num_tokens_N.mean()), first, median, third)


def certainty(responses: Responses) -> Certainty:
    """Return the negative log-probabilities, in all and by correctness."""
    is_kept_N = np.isfinite(responses.neg_logprob_N)
    value_N, problem_N = responses.neg_logprob_N[is_kept_N], responses.problem_N[is_kept_N]
    is_right_N, num_tokens_N = responses.is_right_N[is_kept_N].astype(bool), responses.num_tokens_N[is_kept_N]
    one_stratum_N = np.zeros_like(problem_N)
    return Certainty(
        all=clustered_mean(value_N, problem_N),
        right=clustered_mean(value_N[is_right_N], problem_N[is_right_N]),
        wrong=clustered_mean(value_N[~is_right_N], problem_N[~is_right_N]),
        by_token=float((value_N * num_tokens_N).sum() / num_tokens_N.sum()) if num_tokens_N.any() else None,
        wrong_less_right=difference(value_N, ~is_right_N, one_stratum_N, problem_N),
        wrong_less_right_same_length=difference(value_N, ~is_right_N, length_bins(num_tokens_N), problem_N),
        wrong_less_right_same_problem=difference(value_N, ~is_right_N, problem_N, problem_N),
        num_not_kept=int((~is_kept_N).sum()),
    )


def clustered_mean(value_N: np.ndarray, cluster_N: np.ndarray) -> Mean:
    """Return a mean with its cluster-robust standard error (Liang and Zeger 1986, times clusters / (clusters - 1))."""
    if not value_N.size:
        return Mean(None, None, 0)
    mean = float(value_N.mean())
    return Mean(mean, _clustered_error((value_N - mean) / len(value_N), cluster_N), len(value_N))


def difference(value_N: np.ndarray, is_one_N: np.ndarray, stratum_N: np.ndarray, cluster_N: np.ndarray) -> Mean:
    """Return the mean of ones less that of the others within strata, which count by their overlap, with its clustered standard error.

    It is the coefficient of is_one_N in a least-squares fit with a constant for each stratum. A stratum without either says nothing, and num counts
    the responses of the others.
    """
    _, stratum_N = np.unique(stratum_N, return_inverse=True)
    num_S = np.bincount(stratum_N)
    num_one_S = np.bincount(stratum_N, is_one_N)
    is_compared_N = ((num_one_S > 0) & (num_one_S < num_S))[stratum_N]
    value_N, one_N, stratum_N, cluster_N = (
        values_N[is_compared_N] for values_N in (value_N, is_one_N.astype(np.float64), stratum_N, cluster_N)
    )
    if not value_N.size:
        return Mean(None, None, 0)
    one_N, value_N = (values_N - _stratum_mean(values_N, stratum_N) for values_N in (one_N, value_N))
    square = float(one_N @ one_N)
    slope = float(one_N @ value_N) / square
    return Mean(slope, _clustered_error(one_N * (value_N - slope * one_N) / square, cluster_N), len(value_N))


def _stratum_mean(value_N: np.ndarray, stratum_N: np.ndarray) -> np.ndarray:
    mean_N: np.ndarray = (np.bincount(stratum_N, value_N) / np.maximum(np.bincount(stratum_N), 1))[stratum_N]
    return mean_N


def _clustered_error(influence_N: np.ndarray, cluster_N: np.ndarray) -> float | None:
    """Return the standard error of what the influences of responses add up to. None: one cluster."""
    _, cluster_N = np.unique(cluster_N, return_inverse=True)
    sum_C = np.bincount(cluster_N, influence_N)
    return math.sqrt(len(sum_C) / (len(sum_C) - 1) * float(sum_C @ sum_C)) if len(sum_C) > 1 else None


def length_bins(num_tokens_N: np.ndarray) -> np.ndarray:
    """Return the quantile of each length. Equal lengths are in one."""
    if not num_tokens_N.size:
        return np.zeros(0, dtype=np.int64)
    return np.searchsorted(np.quantile(num_tokens_N, np.arange(1, NUM_LENGTH_BINS) / NUM_LENGTH_BINS), num_tokens_N)


def solvability(responses: Responses) -> Solvability:
    """Return how many problems are solved never, at times and always."""
    num_P = np.bincount(responses.problem_N)
    num_samples = int(num_P.max(initial=0))
    num_right_P = np.bincount(responses.problem_N, responses.is_right_N).astype(int)[(num_P == num_samples) & (num_P > 0)]
    if not num_right_P.size:
        return Solvability(num_samples, 0, None, None, None, (), ())
    histogram = np.bincount(num_right_P, minlength=num_samples + 1) / len(num_right_P)
    chance = float(num_right_P.mean()) / num_samples
    null = [math.comb(num_samples, k) * chance**k * (1 - chance) ** (num_samples - k) for k in range(num_samples + 1)]
    none, every = float(histogram[0]), float(histogram[-1])
    return Solvability(num_samples, len(num_right_P), none, max(0.0, 1 - none - every), every, tuple(map(float, histogram)), tuple(null))


def repetition(text: str) -> float | None:
    """Return the share of a text's 4-grams of words that stood in it before. None: it has fewer than 4 words.

    Source: seq-rep-n of Welleck et al. 2020 (1908.04319), on words instead of tokens.
    """
    words = text.split()
    ngrams = Counter(tuple(words[first : first + NGRAM]) for first in range(len(words) - NGRAM + 1))
    return 1 - len(ngrams) / ngrams.total() if ngrams else None


def compression(text: str) -> float | None:
    """Return the bytes of a text compressed (zlib) over its bytes: little where it repeats itself. None: an empty text. Short texts do not compress."""
    encoded = text.encode("utf-8", "replace")
    return len(zlib.compress(encoded)) / len(encoded) if encoded else None


def has_steps(text: str, pattern: re.Pattern[str] | None = None) -> bool:
    """Say whether a response shows steps before its answer: by a pattern, or else a thinking that is not empty, or two lines with text without tags."""
    if pattern is not None:
        return pattern.search(text) is not None
    if CLOSE in text:
        return bool(text[: text.rfind(CLOSE)].replace("<think>", "").strip())
    return sum(bool(line.strip()) for line in text.splitlines()) > 1


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that there are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
