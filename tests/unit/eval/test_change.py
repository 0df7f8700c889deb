"""The statistics of a verdict beside scipy's and statsmodels', on synthetic data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_prism.core.config.policy import PolicyConfig
from megatron_prism.core.student import t_quantile, t_tail
from megatron_prism.eval.verdicts.change import Change, Estimate, bootstrap, change_of, estimate
from megatron_prism.eval.verdicts.paired import Pairs
from megatron_prism.eval.verdicts.policy import Rule, holm, judge, whole
from megatron_prism.eval.verdicts.tails import NUM_DRAWS, Tails, sign_flip
from tests.unit.eval.two_evaluations import drawn

stats = pytest.importorskip("scipy.stats", reason="pip install -e '.[dev]'")
api = pytest.importorskip("statsmodels.api", reason="pip install -e '.[dev]'")


def pairs(num_questions: int, num_samples: int, seed: int = 0, fall: float = 0.1) -> Pairs:
    draw = np.random.default_rng(seed)
    old, other = draw.beta(0.5, 0.5, num_questions), draw.beta(0.5, 0.5, num_questions)
    return drawn("a", old, np.clip((old + other) / 2 - fall, 0, 1), num_samples, draw)


def with_faults(whole: Pairs, share: float) -> Pairs:
    """Return pairs of which some are left out, so that questions differ in their samples."""
    kept = np.flatnonzero(np.random.default_rng(1).random(len(whole.keys)) > share)
    keys = tuple(whole.keys[row] for row in kept)
    ids = tuple(sorted({id for id, _ in keys}))
    question = np.array([ids.index(id) for id, _ in keys])
    return Pairs("a", ids, keys, question, whole.old[kept], whole.new[kept], 0, 0, (), ())


@pytest.mark.parametrize("df", [1, 2, 3.7, 29, 14_000])
def test_students_t_is_scipys(df: float) -> None:
    for t in (-5.0, -0.1, 0.0, 0.3, 1.645, 4.0, 40.0):
        assert t_tail(t, df) == pytest.approx(stats.t.sf(t, df), rel=1e-9, abs=1e-300)
    for tail in (0.2, 0.05, 1e-3):
        assert t_quantile(tail, df) == pytest.approx(stats.t.isf(tail, df), rel=1e-9)


@pytest.mark.parametrize(("num_samples", "share"), [(1, 0.0), (8, 0.0), (8, 0.3)])
def test_the_standard_error_is_statsmodels_clustered_by_question(num_samples: int, share: float) -> None:
    data = with_faults(pairs(40, num_samples), share)
    change = change_of(data)
    weights = 1 / np.bincount(data.question)[data.question]  # a question weighs the same however many of its samples are left
    model = api.WLS(data.new - data.old, np.ones(len(data.keys)), weights=weights)
    fit = model.fit(cov_type="cluster", cov_kwds={"groups": data.question, "use_correction": False})
    num = change.num_pairs
    assert change.change == pytest.approx(fit.params[0], abs=1e-12)
    assert change.difference.standard_error == pytest.approx(fit.bse[0] * math.sqrt(num / (num - 1)), rel=1e-9)
    naive = api.WLS(data.new - data.old, np.ones(len(data.keys)), weights=weights).fit()
    assert num_samples == 1 or change.difference.standard_error > 1.2 * naive.bse[0], "8 samples of a question are no 8 questions"


def test_mcnemar_is_statsmodels_exact_and_the_sign_flips_of_single_samples_are_the_same() -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    data = pairs(300, 1)
    change = change_of(data)
    lost, gained = len(change.flips.lost), len(change.flips.gained)
    assert lost == ((data.old == 1) & (data.new == 0)).sum() and gained > 5
    expected = mcnemar([[0, lost], [gained, 0]], exact=True).pvalue
    assert min(1.0, 2 * min(change.flips.p_fall, change.flips.p_rise)) == pytest.approx(expected, rel=1e-9)
    by_lot = estimate([(1.0, change)], seed=0).by_lot
    assert by_lot.is_exact and by_lot.both == pytest.approx(expected, rel=1e-9)
    assert estimate([(1.0, change)], seed=0, test="mcnemar").by_lot.low == pytest.approx(
        stats.binomtest(lost, lost + gained, alternative="greater").pvalue
    )


def test_sign_flips_are_scipys_permutation_test() -> None:
    draw = np.random.default_rng(3)
    few = draw.normal(size=12) + 0.2
    exact = sign_flip(few, seed=0)
    for tail, alternative in ((exact.low, "less"), (exact.high, "greater")):
        test = stats.permutation_test((few,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative=alternative)
        assert tail == pytest.approx(test.pvalue, rel=1e-9)
    assert exact.is_exact


def test_sign_flips_are_listed_where_differences_have_steps_and_drawn_elsewhere() -> None:
    draw = np.random.default_rng(4)
    steps = draw.integers(-12, 14, 500) / 64
    listed = sign_flip(steps, seed=0)
    noise = steps + draw.normal(size=500) * 1e-7  # no two sums are the same any more
    by_lot = sign_flip(noise, seed=0)
    assert (listed.is_exact, by_lot.is_exact) == (True, False) and by_lot != sign_flip(noise, seed=1)
    assert by_lot.high == pytest.approx(listed.high, abs=4 * math.sqrt(listed.high / NUM_DRAWS)) and 0.0005 < listed.high < 0.5
    assert sign_flip(np.zeros(9), seed=0).both == 1.0
    assert sign_flip(1 + draw.random(200), seed=0).high == 1 / (1 + NUM_DRAWS), "the observed sum counts among those that are drawn"


def test_the_bootstrap_is_scipys() -> None:
    change = change_of(pairs(60, 8))
    test = stats.bootstrap((change.differences,), np.mean, confidence_level=0.9, method="percentile", n_resamples=10_000, rng=0)
    interval = test.confidence_interval
    tolerance = 0.05 * (interval.high - interval.low)
    assert bootstrap([(1.0, change)], 0.05, seed=0) == pytest.approx((interval.low, interval.high), abs=tolerance)


def test_holm_is_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    for values in ([0.01, 0.04, 0.03, 0.2], [0.5], [0.9, 0.8], [0.001, 0.001, 1.0]):
        assert holm(values) == pytest.approx(list(multipletests(values, method="holm")[1]))


def test_the_variance_is_of_questions_and_of_their_samples() -> None:
    draw = np.random.default_rng(5)
    chances = draw.choice([0.2, 0.6], 4000)
    spread = change_of(drawn("a", chances, chances, 16, draw)).old
    assert spread.within == pytest.approx((0.2 * 0.8 + 0.6 * 0.4) / 2, abs=0.005) and spread.between == pytest.approx(0.04, abs=0.002)
    assert spread.standard_error_same_questions == pytest.approx(math.sqrt(0.2 / 16 / 4000), rel=0.05)
    assert spread.samples_to_halve is None, "the questions make most of it"


def test_the_samples_that_would_halve_the_error_do() -> None:
    draw = np.random.default_rng(6)
    chances = np.full(2000, 0.5)
    few = change_of(drawn("a", chances, chances, 4, draw)).difference
    assert few.samples_to_halve is not None and 14 <= few.samples_to_halve <= 24
    more = change_of(drawn("a", chances, chances, few.samples_to_halve, draw)).difference
    assert more.standard_error == pytest.approx(few.standard_error / 2, rel=0.1)


def test_an_average_combines_its_tasks() -> None:
    one, two = change_of(pairs(40, 4, seed=1)), change_of(pairs(400, 1, seed=2))
    whole = estimate([(0.25, one), (0.75, two)], seed=0)
    alone = [estimate([(1.0, each)], seed=0) for each in (one, two)]
    assert whole.change == pytest.approx(0.25 * one.change + 0.75 * two.change)
    assert whole.standard_error == pytest.approx(math.hypot(0.25 * alone[0].standard_error, 0.75 * alone[1].standard_error))
    assert 39 < whole.df < 438 and whole.num_pairs == 40
    assert alone[1].df == pytest.approx(399) and alone[1].standard_error > two.difference.standard_error


def test_ten_questions_without_a_flip_exclude_no_fall() -> None:
    solved = np.ones(10)
    nothing = estimate([(1.0, change_of(drawn("a", solved, solved, 1, np.random.default_rng(0))))], seed=0)
    low, high = nothing.bounds(0.05)
    assert -0.45 < low < -0.26 and high == -low, "the exact bound of 0 of 10 is 0.26"
    assert nothing.p_above(-0.02) > 0.05 and nothing.by_lot.both == 1.0


def by_hand(old: list[list[float]], new: list[list[float]]) -> Pairs:
    """Return pairs of each question's responses."""
    keys = tuple((f"q{number}", sample) for number, own in enumerate(old) for sample in range(len(own)))
    question = np.array([int(id[1:]) for id, _ in keys])
    flat = [np.array([value for own in scores for value in own]) for scores in (old, new)]
    return Pairs("a", tuple(dict.fromkeys(id for id, _ in keys)), keys, question, *flat, 0, 0, (), ())


def test_half_of_a_questions_samples_do_not_solve_it() -> None:
    flips = change_of(by_hand([[1, 0], [1, 0], [1, 1]], [[0, 0], [1, 1], [1, 0]])).flips
    assert (flips.lost, flips.gained) == (("q2",), ("q1",))


def test_a_spread_of_questions_with_unlike_samples() -> None:
    """Variances 1/2 and 1/3 of 2 and of 4 samples; then equal means, between which there is no variance, and none below 0."""
    spread = change_of(by_hand([[0, 1], [0, 0, 1, 1]], [[0, 0], [0, 0, 0, 0]])).old
    within = (1 / 2 + 1 / 3) / 2
    assert spread.within == pytest.approx(within) and spread.between == 0.0
    assert spread.standard_error_same_questions == pytest.approx(math.sqrt(within * (1 / 2 + 1 / 4) / 2 / 2))


def test_a_decision_reads_a_spread_as_if_four_responses_more_had_flipped() -> None:
    solved = [[1.0] * 4] * 10
    nothing = estimate([(1.0, change_of(by_hand(solved, solved)))], seed=0)
    assert nothing.standard_error == pytest.approx(math.sqrt(4 / 4 / (10 * 9))), "four of 40 responses, not of 10"


def test_the_exact_test_has_a_say_on_its_own_side_of_no_change() -> None:
    lots = Tails(low=0.3, high=0.4, is_exact=True)
    fall, rise = (Estimate(change, 0.01, 1000.0, lots, 10) for change in (-0.1, 0.1))
    assert [fall.p_below(least) for least in (-0.02, 0.0)] == [0.3, 0.3] and fall.p_below(0.02) < 1e-9
    assert [rise.p_above(least) for least in (0.02, 0.0)] == [0.4, 0.4] and rise.p_above(-0.02) < 1e-9


def test_the_lots_of_an_average_weigh_as_its_tasks_do() -> None:
    """One task fell by 1 and the other rose by 1, so the average is where it was, whatever their numbers of questions."""
    fell, rose = change_of(by_hand([[1]] * 4, [[0]] * 4)), change_of(by_hand([[0]] * 2, [[1]] * 2))
    lots = estimate([(0.5, fell), (0.5, rose)], seed=0).by_lot
    sums = [sum(signs[:4]) / 8 + sum(signs[4:]) / 4 for signs in itertools.product((-1, 1), repeat=6)]
    assert lots.is_exact and lots.low == pytest.approx(np.mean([one <= 0 for one in sums])) and lots.high == pytest.approx(lots.low)


def rules_on(*falls: float) -> tuple[list[tuple[Rule, dict[str, float]]], dict[str, Change]]:
    """Return a rule against any fall of each of some tasks of 100 questions, and their changes: so many questions were lost."""
    names = [f"t{number}" for number in range(len(falls))]
    changes = {
        name: change_of(by_hand([[1]] * 100, [[0]] * int(lost) + [[1]] * (100 - int(lost))))
        for name, lost in zip(names, falls, strict=True)
    }
    return [(Rule(name, 0.0), {name: 1.0}) for name in names], changes


def test_a_rule_among_several_is_judged_by_its_adjusted_probability() -> None:
    """Five questions lost and none gained: 1 / 32, which is below 0.05 alone and above it as the first of two."""
    for falls, decision in (((5,), "NO-GO"), ((5, 0), "INCONCLUSIVE")):
        rules, changes = rules_on(*falls)
        first = judge(rules, changes, dict.fromkeys(changes, 100), PolicyConfig())[0]
        assert (first.decision, first.p_no_go, first.p_no_go_adjusted) == (
            decision,
            pytest.approx(first.p_no_go),
            len(falls) * first.p_no_go,
        )  # type: ignore[operator]


def test_the_pairs_that_a_rule_needs_are_those_of_four_times_of_five() -> None:
    one = change_of(by_hand([[1]] * 98 + [[0]] * 2, [[0]] * 2 + [[1]] * 98))
    (judged,) = judge([(Rule("a", -0.03), {"a": 1.0})], {"a": one}, {"a": 100}, PolicyConfig(alpha=0.05))
    whole_error = estimate([(1.0, one)], seed=0).standard_error
    reach = stats.t.isf(0.05, 99) + stats.t.isf(0.2, 99)
    assert judged.decision == "INCONCLUSIVE" and judged.pairs_needed == math.ceil(100 * (reach * whole_error / 0.03) ** 2)


def test_the_decision_of_all_is_the_least_sure_one() -> None:
    rules, changes = rules_on(0, 20)
    few = judge([(rules[0][0], {"t0": 0.5, "t1": 0.5})], {}, {"t0": 7, "t1": 3}, PolicyConfig())
    assert few[0].num_pairs == 3 and few[0].why.startswith("3 pairs of t1")
    no_go = judge(rules, changes, dict.fromkeys(changes, 100), PolicyConfig())[1]
    go = judge([(Rule("t0", -0.5), {"t0": 1.0})], changes, {"t0": 100}, PolicyConfig())[0]
    assert (go.decision, no_go.decision) == ("GO", "NO-GO")
    assert [whole(each) for each in ([go], [go, *few], [go, *few, no_go], [])] == ["GO", "INCONCLUSIVE", "NO-GO", None]
