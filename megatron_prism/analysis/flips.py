"""What changed from one model's responses to another's: which problems flipped beyond chance, and where along the first one's pass rate the gain is.

Both models answer a problem several times, so some problems flip though no chance changed. The null of a flip is the first model against itself: two
draws from its own responses to the problem, without putting back. A loss beyond that is a loss of what the first model could do.
prism evaluate samples both models by the same seeds, so responses of one number are alike where the models are. No figure below holds a response
beside the one of its number: draws from both models have no number in common, as two draws from one model have none.
Shape legend: P problems, E entries (a problem twice, once a half of its responses).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

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
    """The gain of problems whose pass rate under the first model lay in a bin, which is named in percent. share: of the problems.

    share_of_gain: of the whole gain; None where that is not above twice its standard error, as in analysis/path.py.

    gain: with the bin by one half of the first model's responses and the gain by the other half of both models', both ways around. gain_naive: bin
    and gain by the same responses. There, regression to the mean alone lifts what was low and lowers what was high.
    """

    name: str
    share: float
    gain: Mean
    gain_naive: float | None
    share_of_gain: float | None


def counts(responses: Responses, num_problems: int, half: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the responses to each problem, and the right ones. half: 0 or 1, those of even or of odd number; None: all."""
    is_in_N = np.ones(len(responses.problem_N), dtype=bool) if half is None else responses.sample_N % 2 == half
    problem_N, is_right_N = responses.problem_N[is_in_N], responses.is_right_N[is_in_N]
    return np.bincount(problem_N, minlength=num_problems), np.bincount(problem_N, is_right_N, minlength=num_problems).astype(np.int64)


@dataclass(frozen=True)
class Answered:
    """How many responses to a problem are right. both: by number, of the samples that both models have: (right, right), (right, wrong), (wrong,
    right) and (wrong, wrong) of the first and the second. second_only: (right, wrong) of the second's samples that the first lacks.
    """

    num_first: int
    right_first: int
    both: tuple[int, int, int, int]
    second_only: tuple[int, int] = (0, 0)

    @property
    def num_second(self) -> int:
        return sum(self.both) + sum(self.second_only)

    @property
    def right_second(self) -> int:
        return self.both[0] + self.both[2] + self.second_only[0]

    @property
    def first_again(self) -> Answered:
        """The first model in the place of the second."""
        return Answered(self.num_first, self.right_first, (self.right_first, 0, 0, self.num_first - self.right_first))


def answered(old: Responses, new: Responses) -> list[Answered]:
    """Return how each problem that both models answered was."""
    first, second = (_by_problem(one) for one in (old, new))
    return [_answered(first[problem], second[problem]) for problem in sorted(first.keys() & second.keys())]


def _by_problem(responses: Responses) -> dict[int, dict[int, bool]]:
    """Return by problem whether each sample is right."""
    by_problem: dict[int, dict[int, bool]] = {}
    for problem, sample, is_right in zip(*(values_N.tolist() for values_N in _columns(responses)), strict=True):
        by_problem.setdefault(problem, {})[sample] = is_right
    return by_problem


def _columns(responses: Responses) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return responses.problem_N, responses.sample_N, responses.is_right_N


def _answered(first: Mapping[int, bool], second: Mapping[int, bool]) -> Answered:
    both = Counter((first[sample], second[sample]) for sample in first.keys() & second.keys())
    only = Counter(is_right for sample, is_right in second.items() if sample not in first)
    cells = [both[one, other] for one in (True, False) for other in (True, False)]
    return Answered(len(first), sum(first.values()), (cells[0], cells[1], cells[2], cells[3]), (only[True], only[False]))


def flips(old: Responses, new: Responses) -> Flips:
    """Return the flips of problems that both models answered at least once."""
    problems = answered(old, new)
    was_P = np.array([one.right_first / one.num_first > SOLVED for one in problems])
    is_P = np.array([one.right_second / one.num_second > SOLVED for one in problems])
    several = [one for one in problems if one.num_first > 1]  # one response has no other draw to be held against
    halves, samples = [min(one.num_first // 2, one.num_second) for one in several], [1] * len(several)
    return Flips(
        len(problems),
        float((~was_P & is_P).mean()),
        float((was_P & ~is_P).mean()),
        *(_flip(several, nums, way) for nums in (halves, samples) for way in (0, 1)),
    )


def _flip(problems: Sequence[Answered], nums: Sequence[int], way: int) -> Flip:
    """Return one way of flipping, 0 -> 1 (way 0) or 1 -> 0 (way 1). nums: how many responses to each problem are drawn."""
    if not problems:
        return Flip(None, None, None, None)
    share_P = np.array([_flipped(one, num)[way] for one, num in zip(problems, nums, strict=True)])
    chance_P = np.array([_flipped(one.first_again, num)[way] for one, num in zip(problems, nums, strict=True)])
    beyond_P = share_P - chance_P
    error = float(beyond_P.std(ddof=1) / math.sqrt(len(beyond_P))) if len(beyond_P) > 1 else None
    return Flip(float(share_P.mean()), float(chance_P.mean()), float(beyond_P.mean()), error)


@cache
def _flipped(problem: Answered, num: int) -> tuple[float, float]:
    """Return the chances of 0 -> 1 and of 1 -> 0 between num responses of the first model and num of the second, of no number in common.

    The second's are drawn from all of its own, and then the first's from those of other numbers.
    """
    cells = (*problem.both, *problem.second_only)
    gained = lost = 0.0
    for drawn in product(*(range(min(cell, num) + 1) for cell in cells[:-1])):
        last = num - sum(drawn)
        if not 0 <= last <= cells[-1]:
            continue
        chance = math.prod(map(math.comb, cells, (*drawn, last))) / math.comb(problem.num_second, num)
        was = _solved(num, problem.num_first - sum(drawn[:4]), problem.right_first - drawn[0] - drawn[1])
        if (drawn[0] + drawn[2] + drawn[4]) / num > SOLVED:
            gained += chance * (1 - was)
        else:
            lost += chance * was
    return gained, lost


@cache
def _solved(num_drawn: int, num: int, num_right: int) -> float:
    """Return the chance that most of num_drawn responses, of num without putting back, are right (hypergeometric)."""
    ways = sum(
        math.comb(num_right, right) * math.comb(num - num_right, num_drawn - right)
        for right in range(num_drawn + 1)
        if right / num_drawn > SOLVED
    )
    return ways / math.comb(num, num_drawn)


def edges(old: Responses, new: Responses, num_problems: int) -> tuple[Edge, ...]:
    """Return the gain by the bin of the first model's pass rate. A half without responses of both models gives no gain, one of none no bin."""
    olds, news = ([counts(one, num_problems, half) for half in (0, 1)] for one in (old, new))
    bins, gains, problems = [], [], []
    for half, other in ((0, 1), (1, 0)):
        is_in_P = (olds[half][0] > 0) & (olds[other][0] > 0) & (news[other][0] > 0)
        bins.append(_bin(_rate(olds[half], is_in_P)))
        gains.append(_rate(news[other], is_in_P) - _rate(olds[other], is_in_P))
        problems.append(np.nonzero(is_in_P)[0])
    bin_E, gain_E, problem_E = np.concatenate(bins), np.concatenate(gains), np.concatenate(problems)
    if not len(problem_E):
        return ()
    is_in_P = np.isin(np.arange(num_problems), problem_E)
    whole_P = _rate(counts(old, num_problems), is_in_P)
    naive_P, naive_bin_P, whole = _rate(counts(new, num_problems), is_in_P) - whole_P, _bin(whole_P), clustered_mean(gain_E, problem_E)
    is_told = abs(whole.value or 0.0) > 2 * (whole.standard_error or 0.0)
    return tuple(
        Edge(
            name,
            float((bin_E == number).mean()),
            clustered_mean(gain_E[bin_E == number], problem_E[bin_E == number]),
            float(naive_P[naive_bin_P == number].mean()) if (naive_bin_P == number).any() else None,
            float(gain_E[bin_E == number].sum() / gain_E.sum()) if is_told else None,
        )
        for number, name in enumerate(BINS)
    )


def _rate(counted: tuple[np.ndarray, np.ndarray], is_in_P: np.ndarray) -> np.ndarray:
    """Return the pass rates of some problems."""
    num_P, right_P = counted
    rate_P: np.ndarray = right_P[is_in_P] / num_P[is_in_P]
    return rate_P


def _bin(rate_P: np.ndarray) -> np.ndarray:
    """Return the number of each rate's bin."""
    return np.select([rate_P == 0, rate_P <= LOW, rate_P < HIGH, rate_P < 1], range(4), 4)
