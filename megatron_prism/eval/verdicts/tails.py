"""The distributions behind a verdict: Student's t, and a sum of differences whose signs are drawn by lot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MAX_SUMS = 1_000_000  # where there are more distinct sums, they are drawn and not listed
NUM_DRAWS = 20_000


def t_tail(t: float, df: float) -> float:
    """Return P(T > t) of Student's t with df degrees of freedom. Source: DLMF 8.17, the regularised incomplete beta function."""
    half = 0.5 * _beta_share(df / 2, 0.5, df / (df + t * t))
    return half if t >= 0 else 1.0 - half


def t_quantile(tail: float, df: float) -> float:
    """Return the t with P(T > t) = tail, by bisection, for a tail below one half."""
    low, high = 0.0, 1.0
    while t_tail(high, df) > tail:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > tail else (low, middle)
    return high


def _beta_share(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b). Source: DLMF 8.17.22, evaluated by Lentz's method."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # here the fraction of the mirrored function converges fast
        return 1.0 - _beta_share(b, a, 1.0 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 10_000):
        before = value
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for part in (even, odd):
            c, d = 1.0 + part / c, 1.0 / (1.0 + part * d)
            value *= c * d
        if abs(value - before) <= 1e-16 * abs(value):
            break
    return front * value


@dataclass(frozen=True)
class Tails:
    """How probable a sum as low, as high, or as far from 0 as the observed one is where the signs are by lot."""

    low: float
    high: float
    is_exact: bool

    @property
    def both(self) -> float:
        """The two-sided probability; the distribution is symmetric."""
        return min(1.0, 2 * min(self.low, self.high))


def sign_flip(differences: np.ndarray, seed: int) -> Tails:
    """Return the tails of the sum of differences where each one's sign is drawn by lot: the paired permutation test.

    Exact as long as the distinct sums can be listed: differences of equal steps (shares of k samples) make few. Else NUM_DRAWS sums are
    drawn; the observed one counts among them, so that the test keeps its level.
    Where all differences are 1, 0 and -1 it is the exact McNemar test.
    """
    scaled = differences / (float(np.abs(differences).max(initial=0.0)) or 1.0)
    sizes, counts = np.unique(np.abs(scaled[scaled != 0]).round(12), return_counts=True)
    observed, tolerance = float(scaled.sum()), 1e-9 * max(len(scaled), 1)
    if (listed := _sums(sizes, counts)) is not None:
        sums, shares = listed
        low, high = float(shares[sums <= observed + tolerance].sum()), float(shares[sums >= observed - tolerance].sum())
        return Tails(min(low, 1.0), min(high, 1.0), is_exact=True)
    draw = np.random.default_rng(seed)
    drawn = sum(size * (2.0 * draw.binomial(count, 0.5, NUM_DRAWS) - count) for size, count in zip(sizes, counts, strict=True))
    as_low, as_high = int(np.count_nonzero(drawn <= observed + tolerance)), int(np.count_nonzero(drawn >= observed - tolerance))
    return Tails((1 + as_low) / (1 + NUM_DRAWS), (1 + as_high) / (1 + NUM_DRAWS), is_exact=False)


def _sums(sizes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the distinct sums of sizes with signs by lot, and their probabilities. None: too many."""
    sums: np.ndarray = np.zeros(1)
    shares: np.ndarray = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        if len(sums) * (count + 1) > MAX_SUMS:
            return None
        parts = size * (2.0 * np.arange(count + 1) - count)
        raw = np.add.outer(sums, parts).ravel()
        _, first, place = np.unique(raw.round(9), return_index=True, return_inverse=True)
        sums = raw[first]  # unrounded: rounding again and again would tell equal sums apart
        shares = np.bincount(place, weights=np.multiply.outer(shares, _coin(int(count))).ravel())
    return sums, shares


def _coin(count: int) -> np.ndarray:
    """Return the probabilities of 0, 1, ... count heads."""
    heads = np.arange(count)
    logs = np.concatenate([[0.0], np.cumsum(np.log((count - heads) / (heads + 1)))])
    return np.exp(logs - count * math.log(2))
