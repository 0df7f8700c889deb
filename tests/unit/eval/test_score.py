"""A task's figures: exact, faults masked, errors clustered by question; the paper's averages from the paper's own rows."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from statistics import fmean

import pytest

from megatron_prism.eval import averages, score
from megatron_prism.eval.question import Result


def results(*by_question: list[float | None], tags: dict[str, str] | None = None) -> list[Result]:
    made = []
    for number, scores in enumerate(by_question):
        for sample, value in enumerate(scores):
            outcome = "fault" if value is None else "right" if value == 1 else "wrong"
            own = {"level": str(number % 2), **(tags or {})}
            made.append(Result(task="t", id=f"q{number}", sample=sample, seed=0, outcome=outcome, score=value, num_tokens=4, tags=own))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 5), (6, 3, 4)])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one(n: int, c: int, k: int) -> None:
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert score.pass_at(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=f"k {wrong} of 6"):
            score.pass_at(6, 3, wrong)


def test_all_samples_count_and_a_fault_is_no_zero() -> None:
    """Traps 1 and 5."""
    scored = score.of_task(results([1, 0, 1, 1], [0, None, 0, 1], [None] * 4), ["level"])
    assert scored.score == pytest.approx(fmean([3 / 4, 1 / 3]))
    assert (scored.num_faults, scored.masked_questions, scored.num_questions, scored.num_samples) == (5, ("q2",), 3, 4)
    assert scored.outcomes == {"right": 4 / 12, "wrong": 3 / 12, "no_format": 0, "truncated": 0, "fault": 5 / 12}
    assert scored.pass_at["1"] == pytest.approx(scored.score) and scored.pass_at["4"] == 1.0  # of the one question with four
    assert scored.by == {"level": {"0": 3 / 4, "1": pytest.approx(1 / 3)}} and scored.rates == {}
    as_zeros = score.of_task(results([1, 0, 1, 1], [0, 0, 0, 1], [0] * 4))
    assert as_zeros.score != scored.score  # the control: zeros in place of faults are seen


def test_the_standard_error_is_of_questions_not_of_responses() -> None:
    by_question = [[1.0] * 8, [0.0] * 8, [1.0] * 8, [0.0] * 8, [1.0] * 8]
    scored = score.of_task(results(*by_question))
    means = [fmean(one) for one in by_question]
    mean = fmean(means)
    assert scored.standard_error == pytest.approx((sum((one - mean) ** 2 for one in means) / (4 * 5)) ** 0.5)
    assert scored.standard_error > 2 * score.of_task(results(*[[value] for one in by_question for value in one])).standard_error  # type: ignore[operator]
    assert scored.variance_within == 0 and scored.variance_between == pytest.approx(0.3)


def test_variances_are_those_that_the_responses_were_drawn_from() -> None:
    draw = random.Random(0)
    chances = [draw.choice([0.2, 0.8]) for _ in range(3000)]
    scored = score.of_task(results(*[[float(draw.random() < chance) for _ in range(4)] for chance in chances]))
    assert scored.variance_within == pytest.approx(0.16, abs=0.006) and scored.variance_between == pytest.approx(0.09, abs=0.006)


def test_fractions_have_no_pass_at_and_a_responses_own_tags_are_rates() -> None:
    made = [replace(one, tags={**one.tags, "letter": "AB"[one.sample]}) for one in results([0.5, 1], [0.25, 0])]
    scored = score.of_task(made, ["level"])
    assert scored.score == pytest.approx(0.4375) and scored.pass_at == {}
    assert scored.rates == {"letter": {"A": 0.5, "B": 0.5}} and set(scored.by) == {"level"}
    some = score.of_task([replace(one, tags={"letter": "A"} if one.sample else {}) for one in made])
    assert some.rates == {"letter": {"A": 0.5}}, "of all judged responses, not of those with the tag"


def test_questions_may_have_unlike_numbers_of_samples() -> None:
    """A run that goes on with more of them, say. pass@k is said of the most too, where that is no power of two."""
    scored = score.of_task(results([1], [0, 1, 0], [0, 1]))
    assert scored.num_samples == 3
    assert scored.pass_at == pytest.approx({"1": (1 + 1 / 3 + 1 / 2) / 3, "2": (2 / 3 + 1) / 2, "3": 1.0})


def test_a_fault_is_in_no_mean_length_and_no_rate() -> None:
    answered = [replace(one, num_tokens=1000, tags={"letter": "A"}) for one in results([1, 1])]
    faults = [replace(one, num_tokens=0, tags={"letter": "none"}) for one in results([None, None])]
    scored = score.of_task([*answered, *faults])
    assert scored.mean_tokens == 1000 and scored.rates == {"letter": {"A": 1}}
    assert scored.outcomes["fault"] == 0.5  # which alone say how many there were


def test_nothing_judged_is_no_score() -> None:
    for made in ([], results([None], [None])):
        scored = score.of_task(made)
        assert scored.score is None and scored.standard_error is None and scored.pass_at == {}


def test_the_order_of_the_responses_changes_nothing() -> None:
    made = results([1, 0, 0], [1, 1, 0], [0, 0.3, 0.1])
    shuffled = random.Random(3).sample(made, len(made))
    assert vars(score.of_task(sorted(shuffled, key=lambda one: (one.id, one.sample)))) == vars(score.of_task(made))


# PRISM Table 6 (Granite-3.3, LLaMA-3.1) and Table 11: LCB, CF, GPQA, AI24, AI25, M500; Code Avg, Math Avg, AVG; the project page's AVG
ROWS = [
    ((2.15, 1.99, 22.56, 0.46, 0.31, 26.09), (2.07, 8.95, 11.19), 8.93),
    ((10.63, 10.52, 29.12, 37.18, 27.96, 81.11), (10.58, 48.75, 29.48), None),
    ((0.00, 0.07, 20.20, 0.05, 0.15, 6.51), (0.04, 2.24, 7.49), None),
    ((13.62, 11.41, 34.01, 20.47, 21.67, 77.10), (12.51, 39.75, 28.76), None),
]


@pytest.mark.parametrize(("cells", "means", "page"), ROWS)
def test_both_averages_are_the_papers(cells: tuple[float, ...], means: tuple[float, ...], page: float | None) -> None:
    names = ("livecodebench", "codeforces", "gpqa_diamond", "aime24", "aime25", "math500")
    made = averages.averages(dict(zip(names, cells, strict=True)))
    assert (made["code"], made["math"], made["avg"]) == tuple(pytest.approx(mean, abs=0.011) for mean in means)  # cells are rounded, or cut
    assert made["avg_of_six"] == pytest.approx(page or fmean(cells), abs=0.006) and made["avg_of_six"] != pytest.approx(
        made["avg"], abs=0.3
    )


def test_an_average_of_which_a_set_is_absent_is_none() -> None:
    made = averages.averages(
        {"aime24": 0.5, "aime25": 0.5, "math500": None, "livecodebench": 0.1, "codeforces": 0.3, "leaderboard_v1": 0.6}
    )
    assert made["math"] is None and made["avg"] is None and made["avg_of_six"] is None
    assert made["code"] == pytest.approx(0.2) and made["v1"] == 0.6 and made["v2"] is None
