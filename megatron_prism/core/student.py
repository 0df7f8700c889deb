"""Student's t: its tail and its quantile, for every interval and test that rests on a few values."""

from __future__ import annotations

import math


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
