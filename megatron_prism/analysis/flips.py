"""What changed from one model's responses to another's: which problems flipped beyond chance, and where along the first one's pass rate the gain is.

Both models answer a problem several times, so some problems flip though no chance changed. The null of a flip is the first model against itself: two
draws from its own responses to the problem, without putting back. A loss beyond that is a loss of what the first model could do.
Shape legend: P problems, E entries (a problem twice, once a half of its responses).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from megatron_prism.analysis.responses import Mean, Responses, clustered_mean

SOLVED = 0.5  # a problem is solved where more than this share of its responses is right, as in eval/verdicts/change.py
LOW, HIGH = 0.25, 0.75  # of pass rates: halves of 4 or of 8 responses reach both
BINS = ("0", "1-25", "26-74", "75-99", "100")  # in percent


@dataclass(frozen=True)
class Flip:
    """How often a draw of the first model and one of the second differ in one way. chance: for two draws of the first. All None: it has one draw."""

    share: float | None
    chance: float | None
    beyond_chance: float | None
    standard_error: float | None


@dataclass(frozen=True)
class Flips:
    """gained: 0 -> 1. lost: 1 -> 0. Of all problems, by the majority of all their responses; then beside chance.

    _by_half: by the majority of half of the first model's number of responses, drawn from each model. _by_sample: by single responses.
    """

    num_problems: int
    gained: float
    lost: float
    gained_by_half: Flip
    lost_by_half: Flip
    gained_by_sample: Flip
    lost_by_sample: Flip


@dataclass(frozen=True)
class Edge:
    """The gain of problems whose pass rate under the first model lay in a bin, which is named in percent. share: of the problems. share_of_gain: of the whole gain.

    gain: with the bin by one half of the first model's responses and the gain by the other, both ways around. gain_naive: bin and gain by the same
    responses. There, regression to the mean alone lifts what was low and lowers what was high.
    """

    name: str
    share: float
    gain: Mean
    gain_naive: float | None
    share_of_gain: float | None


def counts(responses: Responses, num_problems: int, half: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the responses to each problem, and the right ones. half: 0 or 1, every second of a problem's responses; None: all."""
    is_in_N = np.ones(len(responses.problem_N), dtype=bool)
    if half is not None:
        order_N = np.lexsort((responses.sample_N, responses.problem_N))
        first_N = np.searchsorted(responses.problem_N[order_N], responses.problem_N[order_N])
        is_in_N[order_N] = (np.arange(len(order_N)) - first_N) % 2 == half
    problem_N, is_right_N = responses.problem_N[is_in_N], responses.is_right_N[is_in_N]
    return np.bincount(problem_N, minlength=num_problems), np.bincount(problem_N, is_right_N, minlength=num_problems).astype(np.int64)


def flips(num_old_P: np.ndarray, right_old_P: np.ndarray, num_new_P: np.ndarray, right_new_P: np.ndarray) -> Flips:
    """Return the flips of problems that both models answered at least once."""
    was_P, is_P = right_old_P / num_old_P > SOLVED, right_new_P / num_new_P > SOLVED
    problems = list(zip(*(values_P.tolist() for values_P in (num_old_P, right_old_P, num_new_P, right_new_P)), strict=True))
    several = [problem for problem in problems if problem[0] > 1]  # one response has no other draw to be held against
    by_half = [(min(old // 2, new), old, right_old, new, right_new) for old, right_old, new, right_new in several]
    by_sample = [(1, *problem) for problem in several]
    return Flips(
        len(problems),
        float((~was_P & is_P).mean()),
        float((was_P & ~is_P).mean()),
        *(_flip(drawn, is_gain) for drawn in (by_half, by_sample) for is_gain in (True, False)),
    )


def _flip(problems: Sequence[tuple[int, int, int, int, int]], is_gain: bool) -> Flip:
    """Return one way of flipping. problems: of each, how many responses are drawn, of how many, how many of them right; old, then new."""
    if not problems:
        return Flip(None, None, None, None)
    share_P, chance_P = [], []
    for num_drawn, num_old, right_old, num_new, right_new in problems:
        was, now = _solved(num_drawn, num_old, right_old), _solved(num_drawn, num_new, right_new)
        share_P.append((1 - was) * now if is_gain else was * (1 - now))
        chance_P.append(_redrawn(num_drawn, num_old, right_old))  # a redraw gains as often as it loses
    beyond_P = np.array(share_P) - chance_P
    error = float(beyond_P.std(ddof=1) / math.sqrt(len(beyond_P))) if len(beyond_P) > 1 else None
    return Flip(float(np.mean(share_P)), float(np.mean(chance_P)), float(beyond_P.mean()), error)


@cache
def _solved(num_drawn: int, num: int, num_right: int) -> float:
    """Return the chance that most of num_drawn responses, of num without putting back, are right (hypergeometric)."""
    ways = sum(
        math.comb(num_right, right) * math.comb(num - num_right, num_drawn - right)
        for right in range(num_drawn + 1)
        if right / num_drawn > SOLVED
    )
    return ways / math.comb(num, num_drawn)


@cache
def _redrawn(num_drawn: int, num: int, num_right: int) -> float:
    """Return the chance that one draw is solved, and another of the responses that are left is not."""
    lost = 0.0
    for right in range(min(num_drawn, num_right) + 1):
        if right / num_drawn > SOLVED:
            chance = math.comb(num_right, right) * math.comb(num - num_right, num_drawn - right) / math.comb(num, num_drawn)
            lost += chance * (1 - _solved(num_drawn, num - num_drawn, num_right - right)) if chance else 0.0
    return lost


def edges(old: Responses, new: Responses, num_problems: int) -> tuple[Edge, ...]:
    """Return the gain by the bin of the first model's pass rate. Problems with fewer than two responses of the first, or none of the second, are left out."""
    halves = [counts(old, num_problems, half) for half in (0, 1)]
    num_new_P, right_new_P = counts(new, num_problems)
    is_in_P = (halves[0][0] > 0) & (halves[1][0] > 0) & (num_new_P > 0)
    if not is_in_P.any():
        return ()
    rates = [right_P[is_in_P] / num_P[is_in_P] for num_P, right_P in halves]
    new_P = right_new_P[is_in_P] / num_new_P[is_in_P]
    bin_E = np.concatenate([_bin(rates[0]), _bin(rates[1])])
    gain_E = np.concatenate([new_P - rates[1], new_P - rates[0]])
    problem_E = np.tile(np.arange(len(new_P)), 2)
    num_old_P, right_old_P = counts(old, num_problems)
    whole_P = right_old_P[is_in_P] / num_old_P[is_in_P]
    naive_bin_P, naive_P, total = _bin(whole_P), new_P - whole_P, float(gain_E.sum())
    return tuple(
        Edge(
            name,
            float((bin_E == number).mean()),
            clustered_mean(gain_E[bin_E == number], problem_E[bin_E == number]),
            float(naive_P[naive_bin_P == number].mean()) if (naive_bin_P == number).any() else None,
            float(gain_E[bin_E == number].sum() / total) if abs(total) > 1e-12 else None,
        )
        for number, name in enumerate(BINS)
    )


def _bin(rate_P: np.ndarray) -> np.ndarray:
    """Return the number of each rate's bin."""
    return np.select([rate_P == 0, rate_P <= LOW, rate_P < HIGH, rate_P < 1], range(4), 4)
