"""Figures of responses against statsmodels, scipy and numpy, and with differences planted in them."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import statsmodels.api as sm
from typer.testing import CliRunner

from megatron_prism.analysis import flips, responses
from megatron_prism.analysis.responses import Responses
from megatron_prism.cli.analyze import app
from megatron_prism.core.errors import InputError
from megatron_prism.eval.question import Result
from megatron_prism.jobs import analyze_responses
from megatron_prism.report import analysis
from tests.unit.eval.two_evaluations import write


def drawn(chance_P: np.ndarray, num_samples: int, seed: int, **others: Any) -> Responses:
    draw = np.random.default_rng(seed)
    problem_N = np.repeat(np.arange(len(chance_P)), num_samples)
    num = len(problem_N)
    values = {
        "sample_N": np.tile(np.arange(num_samples), len(chance_P)),
        "is_right_N": draw.random(num) < chance_P[problem_N],
        "num_tokens_N": draw.integers(10, 1000, num),
        "neg_logprob_N": draw.random(num),
        "is_cut_N": np.zeros(num, bool),
    }
    return Responses(problem_N=problem_N, **(values | others))


def chances(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).beta(0.5, 0.7, num)


def least_squares(value_N: np.ndarray, one_N: np.ndarray, stratum_N: np.ndarray, cluster_N: np.ndarray) -> tuple[float, float]:
    """Return statsmodels' coefficient and clustered error, without its factor for the number of coefficients."""
    columns = np.column_stack([one_N, *(stratum_N == stratum for stratum in np.unique(stratum_N))]).astype(float)
    fit = sm.OLS(value_N, columns).fit(cov_type="cluster", cov_kwds={"groups": cluster_N, "use_correction": False})
    num = len(np.unique(cluster_N))
    return float(fit.params[0]), float(fit.bse[0]) * math.sqrt(num / (num - 1))


def test_means_and_differences_are_those_of_a_clustered_fit() -> None:
    of = drawn(chances(40), 6, 1)
    value_N = of.neg_logprob_N + 0.3 * np.random.default_rng(2).standard_normal(40)[of.problem_N]
    mean = responses.clustered_mean(value_N, of.problem_N)
    fit = sm.OLS(value_N, np.ones_like(value_N)).fit(cov_type="cluster", cov_kwds={"groups": of.problem_N})
    assert (mean.value, mean.standard_error) == pytest.approx((fit.params[0], fit.bse[0]))
    assert mean.standard_error > 1.5 * value_N.std() / math.sqrt(len(value_N))  # an error that knows no clusters is too small
    wrong_N = ~of.is_right_N
    for stratum_N in (np.zeros_like(of.problem_N), of.problem_N, responses.length_bins(of.num_tokens_N)):
        found = responses.difference(value_N, wrong_N, stratum_N, of.problem_N)
        has_both_N = np.isin(stratum_N, [s for s in np.unique(stratum_N) if 0 < wrong_N[stratum_N == s].mean() < 1])
        wanted = least_squares(*(values[has_both_N] for values in (value_N, wrong_N, stratum_N, of.problem_N)))
        assert (found.value, found.standard_error) == pytest.approx(wanted)
        assert found.num == has_both_N.sum()


def test_what_length_alone_explains_is_gone_among_equal_lengths_and_what_it_does_not_stays() -> None:
    of = drawn(np.full(200, 0.5), 8, 3)
    draw = np.random.default_rng(4)
    num_tokens_N = np.where(of.is_right_N, draw.integers(50, 600, len(of.problem_N)), draw.integers(200, 1000, len(of.problem_N)))
    by_length_N = 0.1 + 0.0005 * num_tokens_N
    for planted in (0.0, 0.05):
        neg_logprob_N = by_length_N + planted * ~of.is_right_N + 0.02 * draw.standard_normal(len(of.problem_N))
        made = responses.certainty(drawn(np.full(200, 0.5), 8, 3, num_tokens_N=num_tokens_N, neg_logprob_N=neg_logprob_N))
        assert made.wrong_less_right.value is not None and made.wrong_less_right.value > planted + 0.1
        assert made.wrong_less_right_same_length.value == pytest.approx(planted, abs=0.015)
    assert made.num_not_kept == 0 and made.by_token == pytest.approx(float(neg_logprob_N @ num_tokens_N / num_tokens_N.sum()))


def test_a_log_probability_that_was_not_kept_is_left_out_and_counted() -> None:
    of = drawn(chances(20), 4, 5)
    neg_logprob_N = np.where(of.sample_N < 2, of.neg_logprob_N, np.nan)
    made = responses.certainty(drawn(chances(20), 4, 5, neg_logprob_N=neg_logprob_N))
    assert made.num_not_kept == 40 and made.all.num == 40 and made.all.value == pytest.approx(np.nanmean(neg_logprob_N))
    none = responses.certainty(drawn(chances(20), 4, 5, neg_logprob_N=np.full(80, np.nan)))
    assert none.all == responses.Mean(None, None, 0) and none.by_token is None and none.wrong_less_right.value is None


def test_solvability_and_its_null() -> None:
    of = drawn(chances(500), 8, 6)
    made = responses.solvability(of)
    right_P = np.array([of.is_right_N[of.problem_N == problem].sum() for problem in range(500)])
    assert made.histogram == pytest.approx([(right_P == k).mean() for k in range(9)])
    assert made.null == pytest.approx(scipy.stats.binom.pmf(np.arange(9), 8, right_P.mean() / 8))
    assert made.none is not None and made.none > 10 * made.null[0]  # hard problems are there, and chance does not make them
    assert (made.none, made.some, made.all) == pytest.approx(
        ((right_P == 0).mean(), ((right_P > 0) & (right_P < 8)).mean(), (right_P == 8).mean())
    )
    alike = responses.solvability(drawn(np.full(4000, 0.5), 8, 7))
    assert alike.histogram == pytest.approx(alike.null, abs=0.03)
    uneven = replace(answers(1, 1, 0, 1), problem_N=np.array([0, 0, 1, 2]), sample_N=np.array([0, 1, 0, 0]))
    found = responses.solvability(uneven)
    assert (found.num_samples, found.num_problems, found.all, found.histogram) == (2, 1, 1.0, (0.0, 0.0, 1.0)), "those with a fault are out"


def test_a_model_against_itself_flips_as_chance_and_a_change_beyond() -> None:
    chance_P = chances(2000)
    old, same = (drawn(chance_P, 8, seed) for seed in (8, 9))
    made = flips.flips(old, same)
    for flip in (made.gained_by_half, made.lost_by_half, made.gained_by_sample, made.lost_by_sample):
        assert flip.chance is not None and flip.beyond_chance is not None and flip.standard_error is not None
        assert flip.chance > 0.05 and abs(flip.beyond_chance) < 3.5 * flip.standard_error
    moved_P = np.where(np.arange(2000) % 10 == 0, 1 - chance_P, 0.2 + 0.8 * chance_P)  # a tenth is another, the rest gains
    new = drawn(moved_P, 8, 10)
    made = flips.flips(old, new)
    for flip in (made.gained_by_half, made.gained_by_sample):
        assert flip.beyond_chance is not None and flip.standard_error is not None and flip.beyond_chance > 8 * flip.standard_error
    made = flips.flips(*(of_problems(one, one.problem_N % 10 == 0) for one in (old, new)))
    for flip in (made.lost_by_half, made.lost_by_sample):
        assert flip.beyond_chance is not None and flip.standard_error is not None and flip.beyond_chance > 4 * flip.standard_error
        assert flip.share == pytest.approx(flip.chance + flip.beyond_chance)


def test_responses_by_the_same_seeds_are_not_held_beside_each_other() -> None:
    """prism evaluate samples both models by the same seeds: the same model, or nearly the same, gives the same responses by number."""
    old = drawn(chances(300), 8, 8)
    made = flips.flips(old, old)
    for flip in (made.gained_by_half, made.lost_by_half, made.gained_by_sample, made.lost_by_sample):
        assert flip.chance is not None and flip.chance > 0.05 and flip.share == pytest.approx(flip.chance)
    assert all(edge.gain.value == edge.gain_naive == 0 for edge in flips.edges(old, old, 300))


def of_problems(one: Responses, is_in_N: np.ndarray) -> Responses:
    return Responses(**{name: getattr(one, name)[is_in_N] for name in one.__dataclass_fields__})


def answers(*right: int, first: int = 0) -> Responses:
    """Return the responses to one problem, numbered from `first`."""
    values = [np.arange(first, first + len(right)), np.array(right, bool)]
    nothing_N = np.zeros(len(right))
    return Responses(np.zeros(len(right), np.int64), *values, nothing_N, nothing_N, nothing_N)


@pytest.mark.parametrize("first", [0, 2, 5])
def test_shares_and_chances_of_flips_are_those_of_every_draw(first: int) -> None:
    old, new = (1, 1, 1, 0, 0), (1, 0, 0, 1)  # first: 4, 3 or none of their numbers are in common
    made = flips.flips(answers(*old), answers(*new, first=first))
    pairs: dict[int, list[tuple[bool, bool]]] = {1: [], 2: []}
    for num in pairs:
        for drawn_new in itertools.combinations(range(4), num):
            others = [number for number in range(5) if number - first not in drawn_new]
            draws_old = list(itertools.combinations(others, num))
            repeated = math.lcm(1, 3, 4, 5, 6, 10) // len(draws_old)  # each draw of the second counts the same
            now = sum(new[number] for number in drawn_new) > num / 2
            pairs[num] += [(sum(old[number] for number in draw) > num / 2, now) for draw in draws_old for _ in range(repeated)]
    for num, gained, lost in ((1, made.gained_by_sample, made.lost_by_sample), (2, made.gained_by_half, made.lost_by_half)):
        assert gained.share == pytest.approx(np.mean([now and not was for was, now in pairs[num]]))
        assert lost.share == pytest.approx(np.mean([was and not now for was, now in pairs[num]]))
        halves = [(sum(draw[:num]) > num / 2, sum(draw[num : 2 * num]) > num / 2) for draw in itertools.permutations(old)]
        assert lost.chance == pytest.approx(np.mean([one and not other for one, other in halves])) == pytest.approx(gained.chance)
    assert (made.gained, made.lost) == (0, 1) and made.lost_by_half.standard_error is None
    single = flips.flips(answers(1), answers(1))
    assert single.lost_by_sample == flips.Flip(None, None, None, None) and single.lost == 0  # one draw says nothing of another
    assert flips.flips(answers(1, 0), answers(0)).lost_by_sample.share == 0  # of the one that has another number


def test_the_edge_knows_regression_to_the_mean() -> None:
    chance_P = chances(3000)
    old, same = (drawn(chance_P, 8, seed) for seed in (11, 12))
    for edge in flips.edges(old, same, 3000):
        assert edge.gain.value is not None and edge.gain.standard_error is not None
        assert abs(edge.gain.value) < 4 * edge.gain.standard_error  # nothing changed
        assert edge.share_of_gain is None, "a share of noise"
    naive = {edge.name: edge.gain_naive for edge in flips.edges(old, same, 3000)}
    assert naive["0"] is not None and naive["0"] > 0.015 and naive["100"] is not None and naive["100"] < -0.015  # and this says that it did
    at_edge_P = np.where((chance_P > 0.1) & (chance_P < 0.6), chance_P + 0.3, chance_P)
    gains = {edge.name: edge for edge in flips.edges(old, drawn(at_edge_P, 8, 13), 3000)}
    assert gains["26-74"].gain.value is not None and gains["26-74"].gain.value > 0.2
    assert gains["100"].gain.value is not None and abs(gains["100"].gain.value) < 0.03
    assert sum(edge.share for edge in gains.values()) == pytest.approx(1)
    assert sum(edge.share_of_gain or 0 for edge in gains.values()) == pytest.approx(1)


def test_the_ends_of_the_bins_are_a_quarter_and_three_quarters() -> None:
    rates = np.array([0.0, 0.01, 0.25, 0.26, 0.74, 0.75, 0.99, 1.0])
    assert [flips.BINS[number] for number in flips._bin(rates)] == ["0", "1-25", "1-25", "26-74", "26-74", "75-99", "75-99", "100"]


def test_a_half_without_responses_of_either_model_gives_no_gain() -> None:
    """The new model has answers of odd number alone, so only the bin by the even half and the gain by the odd one are known."""
    old, new = answers(1, 0, 0, 0), answers(1, first=1)
    edges = {edge.name: edge for edge in flips.edges(old, new, 1)}
    assert (edges["26-74"].share, edges["26-74"].gain.value, edges["26-74"].share_of_gain) == (1.0, 1.0, 1.0)
    still = {edge.name: edge for edge in flips.edges(old, old, 1)}
    assert all(edge.share_of_gain is None for edge in still.values()), "a gain of 0 has no shares"


def test_a_pass_rate_counts_problems_whatever_their_responses() -> None:
    of = of_problems(drawn(np.array([1.0, 0.0, 0.0]), 4, 1), np.arange(12) != 1)  # a fault
    rate = responses.pass_rate(of_problems(of, np.arange(11) != 0))
    assert (rate.value, rate.standard_error, rate.num) == pytest.approx((1 / 3, 1 / 3, 10))
    assert responses.lengths(np.arange(101)) == responses.Lengths(50, 25, 50, 75)


def test_repetition_and_steps() -> None:
    assert responses.repetition("a b c") is None and responses.repetition("a b c d e f") == 0
    assert responses.repetition("a b c d " * 50) == pytest.approx(1 - 4 / 197)
    looped, plain = responses.compression("the same words " * 40), responses.compression(str(np.random.default_rng(0).integers(0, 9, 150)))
    assert looped is not None and plain is not None and looped < 0.1 < plain
    assert responses.has_steps("<think>so 2</think>2") and not responses.has_steps("<think> </think>2")
    assert responses.has_steps("so\n2") and not responses.has_steps("2\n\n")
    assert responses.has_steps("<4,4>1", re.compile("<[^>]+>")) and not responses.has_steps("<>1", re.compile("<[^>]+>"))
    assert responses.has_steps("<think></think> so 2 </think>2")  # the thinking ends at the last mark


def written(folder: Path, right: list[list[bool]], prompt: str = "", faults: int = 0) -> Path:
    """Write an evaluation of one task: right answers of 20 tokens, wrong ones cut at 64."""
    results = [
        Result(
            task="math",
            id=f"q{number}",
            sample=sample,
            seed=1,
            outcome="right" if is_right else "truncated",
            score=float(is_right),
            prompt_sha256=prompt or f"q{number}",
            num_tokens=20 if is_right else 64,
            ended="end_token" if is_right else "max_tokens",
            mean_logprob=None if number == 0 else -0.1 if is_right else -0.3,
            text="so\nit is 4" if is_right else "4 " * 50,
        )
        for number, samples in enumerate(right)
        for sample, is_right in enumerate(samples)
    ]
    results += [replace(results[0], id=f"f{number}", outcome="fault", score=None, ended="") for number in range(faults)]
    results.append(replace(results[0], task="lm_eval/arc", id="0", ended=""))  # scored, and not sampled
    return write(folder, results)


def test_evaluations_on_the_command_line(tmp_path: Path) -> None:
    one = written(tmp_path / "one", [[True] * 4, [False] * 4, [True, False, False, False]], faults=2)
    two = written(tmp_path / "two", [[True] * 4, [True] * 3 + [False], [False] * 4])
    done = CliRunner().invoke(app, ["responses", f"base={one}", str(two), "--json", str(tmp_path / "a.json")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "a.json").read_text())
    assert (result["kind"], result["analysis"], list(result["models"])) == ("analysis", "responses", ["base", "two"])
    base = result["models"]["base"]["tasks"]
    assert list(base) == ["math"]
    figures = base["math"]
    assert figures["pass_rate"]["value"] == pytest.approx((1 + 0 + 0.25) / 3)
    assert (figures["num_problems"], figures["num_responses"], figures["num_faults"]) == (3, 12, 2)
    assert figures["share_cut"] == figures["tokens"]["wrong"]["median"] / 64 * 7 / 12 == pytest.approx(7 / 12)
    assert figures["neg_logprob"]["num_not_kept"] == 4 and figures["neg_logprob"]["wrong"]["value"] == pytest.approx(0.3)
    assert figures["solvability"]["histogram"] == pytest.approx({"0": 1 / 3, "1": 1 / 3, "2": 0, "3": 0, "4": 1 / 3})
    assert figures["pass_at"]["1"] == pytest.approx(figures["pass_rate"]["value"]) and figures["pass_at"]["4"] == pytest.approx(2 / 3)
    assert figures["share_with_steps"] == pytest.approx(5 / 12) and figures["sampling"]["temperature"] == 0.6
    flip = result["flips"]["base->two"]["math"]
    assert (flip["gained"], flip["lost"]) == pytest.approx((1 / 3, 0)) and tuple(flip["edge"]) == flips.BINS
    assert any(line.startswith("base->two") for line in done.output.splitlines())


def test_folders_that_are_no_pair_are_named(tmp_path: Path) -> None:
    one, other = written(tmp_path / "one", [[True, False]] * 3), written(tmp_path / "other", [[True, False]] * 3, prompt="changed")
    made = analyze_responses.run([str(one), str(other)], [], None)
    assert "prompts of 3 of 3" in made["flips"]["one->other"]["math"]["not_compared"][0]
    assert any("not compared" in line for line in analysis.responses(made))
    for words, tasks, steps, said in (
        ([str(one), f"one={other}"], [], None, "'one' twice"),
        ([str(one)], ["code"], None, "responses to math"),
        ([str(one)], [], "(", "--steps"),
        ([str(tmp_path)], [], None, "no summary.json; required the folder of an evaluation"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            analyze_responses.run(words, tasks, steps)
