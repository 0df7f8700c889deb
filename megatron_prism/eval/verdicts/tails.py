"""The distribution behind an exact test of a verdict: a sum of differences whose signs are drawn by lot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MAX_SUMS = 1_000_000  # where there are more distinct sums, they are drawn and not listed
NUM_DRAWS = 20_000


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
