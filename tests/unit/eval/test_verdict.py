"""What a policy decides on two evaluations, how often it is wrong, and what it refuses to decide."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_prism.core.config.policy import PolicyConfig
from megatron_prism.core.errors import EnvironmentFault, InputError, ResultFailure
from megatron_prism.eval.averages import SIX, Tasks, averages
from megatron_prism.eval.retention.leaderboards import INSTRUCTIONS, LEADERBOARD_V1, LEADERBOARD_V2, average, score
from megatron_prism.eval.verdicts import verdict
from megatron_prism.jobs import evaluate_compare
from tests.unit.eval.two_evaluations import result, scores, write


def folders(tmp_path: Path, num_lost: int, num_questions: int = 200, **changes: object) -> tuple[Path, Path]:
    """Return (new, old): of 200 questions the old model solves 120, and the new one num_lost of these no more."""
    solved = [1.0] * 120 + [0.0] * 80
    old = write(tmp_path / "old", scores("a", solved[-num_questions:]))
    new = [0.0] * num_lost + solved[num_lost:]
    return write(tmp_path / "new", scores("a", new[-num_questions:]), **changes), old


@pytest.mark.parametrize(("num_lost", "decision", "is_failure"), [(0, "GO", False), (60, "NO-GO", True), (8, "INCONCLUSIVE", False)])
def test_the_three_verdicts_and_how_a_job_ends(
    tmp_path: Path, num_lost: int, decision: str, is_failure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    new, old = folders(tmp_path, num_lost)
    one = verdict.compare(new, old, PolicyConfig(max_drop={"a": 0.05}))
    assert one.decision == decision and one.changes["a"].flips.lost == tuple(f"q{number:04d}" for number in range(num_lost))
    text = "\n".join(verdict.lines(one))
    assert f"verdict: {decision}" in text and "a: 60.00 -> " in text and "200 pairs" in text and f"{num_lost} lost, 0 gained" in text
    if is_failure:
        with pytest.raises(ResultFailure, match="a may fall by at most 5 points") as caught:
            verdict.require(one)
        assert caught.value.exit_code == 1
        return
    with caplog.at_level("WARNING", "prism"):
        verdict.require(one)
    assert ("pairs do not say" in caplog.text) == (decision == "INCONCLUSIVE")
    if decision == "INCONCLUSIVE":
        with pytest.raises(ResultFailure):
            verdict.require(dataclasses.replace(one, policy=PolicyConfig(max_drop={"a": 0.05}, on_inconclusive="fail")))


def test_too_few_pairs_are_inconclusive_however_large_the_fall(tmp_path: Path) -> None:
    old = write(tmp_path / "old", scores("a", [1] * 9))
    new = write(tmp_path / "new", scores("a", [0] * 9))
    (rule,) = verdict.compare(new, old, PolicyConfig(max_drop={"a": 0.05})).rules
    assert rule.decision == "INCONCLUSIVE" and "9 pairs of a, and at least 10" in rule.why
    assert verdict.compare(new, old, PolicyConfig(max_drop={"a": 0.05}, min_pairs=9)).decision == "NO-GO"
    two = write(tmp_path / "two", scores("a", [0, 1]))
    assert verdict.compare(two, old, PolicyConfig()).changes["a"].change == -0.5  # what two pairs give is shown
    one = write(tmp_path / "one", scores("a", [0]))
    (rule,) = verdict.compare(one, old, PolicyConfig(max_drop={"a": 0})).rules
    assert rule.num_pairs == 1 and rule.why.startswith("1 pairs of a")


def test_a_fault_is_no_loss(tmp_path: Path) -> None:
    old = write(tmp_path / "old", scores("a", [1] * 40))
    faulty = [None if number % 2 else 1.0 for number in range(40)]
    change = verdict.compare(write(tmp_path / "new", scores("a", faulty)), old, PolicyConfig()).changes["a"]
    assert (change.change, change.num_pairs, change.pairs.num_masked) == (0.0, 20, 20)
    wrong = verdict.compare(write(tmp_path / "wrong", scores("a", [one or 0.0 for one in faulty])), old, PolicyConfig())
    assert wrong.changes["a"].change == -0.5, "the same as wrong answers would be a fall"


def test_a_changed_prompt_becomes_no_verdict(tmp_path: Path) -> None:
    old = write(tmp_path / "old", [*scores("a", [1] * 40), *scores("b", [1] * 40)])
    asked = [result("a", f"q{number:04d}", 0.0, prompt="another") for number in range(40)]
    new = write(tmp_path / "new", [*asked, *scores("b", [1] * 40)])
    with pytest.raises(InputError, match=r"policy.max_drop.a: found a: the prompts of 40 of 40 questions differ"):
        verdict.compare(new, old, PolicyConfig(max_drop={"a": 0.5}))
    said = verdict.compare(new, old, PolicyConfig(max_drop={"b": 0.5}))
    assert said.decision == "GO" and list(said.changes) == ["b"] and "prompts of 40" in said.not_paired["a"][0]
    assert verdict.compare(new, old, PolicyConfig(max_drop={"a": 0.5}, other_prompts="accept")).decision == "NO-GO"


def test_a_policy_that_cannot_be_judged_is_refused_with_all_its_problems(tmp_path: Path) -> None:
    new, old = folders(tmp_path, 0)
    with pytest.raises(InputError) as caught:
        verdict.compare(new, old, PolicyConfig(max_drop={"math5000": 0.1, "math": 0.1}))
    assert [problem.where for problem in caught.value.problems] == ["policy.max_drop.math5000", *["policy.max_drop.math"] * 3]
    assert "aime24: neither evaluation has responses to it" in str(caught.value)
    with pytest.raises(InputError, match=r"policy.max_drop.a: found 1.5(.|\n)*policy.min_gain.a: found a rule in max_drop too"):
        verdict.compare(new, old, PolicyConfig(max_drop={"a": 1.5}, min_gain={"a": 0.1}))
    with pytest.raises(InputError, match="against: found"):
        verdict.compare(old, old, PolicyConfig())
    (tmp_path / "link").symlink_to(old)
    with pytest.raises(InputError, match="against: found"):
        verdict.compare(tmp_path / "link", old, PolicyConfig())
    with pytest.raises(InputError) as caught:
        verdict.compare(tmp_path / "neither", tmp_path / "nor", PolicyConfig())
    assert [problem.where for problem in caught.value.problems] == [str(tmp_path / "nor"), str(tmp_path / "neither")]


def test_without_a_rule_there_is_a_comparison_and_no_verdict(tmp_path: Path) -> None:
    one = verdict.compare(*folders(tmp_path, 60), PolicyConfig())
    assert one.decision is None and "none, the policy has no rule" in next(verdict.lines(one))
    verdict.require(one)


def test_an_average_weighs_as_the_summary_does() -> None:
    draw = np.random.default_rng(0)
    reasoning = Tasks(dict.fromkeys(SIX, 9), {}, {})
    for name in ("code", "math", "gpqa", "avg", "avg_of_six"):
        values = {task: float(draw.random()) for task in SIX}
        weights = reasoning.weights(name)
        assert weights is not None and sum(weights.values()) == pytest.approx(1)
        assert sum(weight * values[task] for task, weight in weights.items()) == pytest.approx(averages(values)[name])
    assert reasoning.weights("v1")["mmlu"] == pytest.approx(1 / 6), "what is missing is named"  # type: ignore[index]
    assert reasoning.weights("ruler") == {"ruler": 1.0} and reasoning.weights("v3") is None
    assert Tasks({"long": 9}, {"ruler": frozenset({"long", "gone"})}, {}).weights("ruler") == {"long": 1.0}


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_a_leaderboard_weighs_as_lm_evals_side_does(name: str) -> None:
    board = {"v1": LEADERBOARD_V1, "v2": LEADERBOARD_V2}[name]
    draw = np.random.default_rng(0)
    parts = {one.task: [one.task] for one in board}
    for one in board:
        if isinstance(one.num_choices, dict):
            parts[one.task] = [f"{one.task}_{of}" for of in one.num_choices]
        elif one.is_pooled or one.task == "mmlu":
            parts[one.task] = [f"{one.task}_{of}" for of in "abc"]
    sizes = {task: int(draw.integers(20, 90)) for tasks in parts.values() for task in tasks}
    old = {task: float(draw.uniform(0.6, 0.8)) for task in sizes}
    new = {task: value + float(draw.uniform(-0.05, 0.15)) for task, value in old.items()}

    def average_of(values: dict[str, float]) -> float:
        by_benchmark = {
            one.task: score(one, {task: dict.fromkeys((one.metric, *INSTRUCTIONS), values[task]) for task in parts[one.task]}, sizes)
            for one in board
        }
        whole = average(by_benchmark, board)
        assert whole is not None
        return whole

    groups = {of: frozenset(f"lm_eval/{task}" for task in tasks) for of, tasks in parts.items()}
    weights = Tasks({f"lm_eval/{task}": size for task, size in sizes.items()}, {}, groups).weights(name)
    assert weights is not None and len(weights) == len(sizes)
    change = sum(weight * (new[task[8:]] - old[task[8:]]) for task, weight in weights.items())
    assert change == pytest.approx(average_of(new) - average_of(old))


def test_an_average_is_judged_as_one(tmp_path: Path) -> None:
    names = ("aime24", "aime25", "math500")
    old = write(tmp_path / "old", [one for name in names for one in scores(name, [1] * 60)])
    new = write(tmp_path / "new", [one for name in names for one in scores(name, [0] * (20 * (name == "math500")) + [1] * 60)[:60]])
    one = verdict.compare(new, old, PolicyConfig(max_drop={"math": 0.02}))
    (rule,) = one.rules
    assert rule.change == pytest.approx(-1 / 9) and rule.decision == one.decision == "NO-GO" and len(rule.tasks) == 3
    (written,) = verdict.as_values(one)["rules"]
    assert written["low"] < written["bootstrap"][0] < -1 / 9 < written["bootstrap"][1] < written["high"]


def test_what_is_written(tmp_path: Path) -> None:
    new, old = folders(tmp_path, 60)
    one = verdict.compare(new, old, PolicyConfig(max_drop={"a": 0.05}))
    verdict.write(new, one)
    written = json.loads((new / "verdict.json").read_text())
    assert (written["kind"], written["decision"], written["rules"][0]["num_pairs"]) == ("verdict", "NO-GO", 200)
    of_task = written["tasks"]["a"]
    assert of_task["change"] == pytest.approx(-0.3) and of_task["num_lost"] == len(of_task["lost"]) == 60 and of_task["is_exact"]
    before = (new / "verdict.json").read_bytes()
    verdict.write(new, verdict.compare(new, old, PolicyConfig(max_drop={"a": 0.05})))
    assert (new / "verdict.json").read_bytes() == before, "a second time the same"


def test_the_form_of_nel_gate(tmp_path: Path) -> None:
    old = write(tmp_path / "old", [*scores("a", [1] * 40), *scores("lm_eval/b", [1, 0, None, 1])])
    new = write(tmp_path / "new", [*reversed(scores("a", [0] * 10 + [1] * 30)), *scores("lm_eval/b", [1, 1, 1, 0])])
    verdict.write(new, verdict.compare(new, old, PolicyConfig(max_drop={"a": 0.05})))
    bundle = json.loads((new / "nel/candidate/lm_eval__b/eval-prism.json").read_text())
    assert bundle["benchmark"] == {"name": "lm_eval/b", "scores": {"mean_reward": {"value": pytest.approx(2 / 3)}}}
    rows = [
        [json.loads(line) for line in (new / f"nel/{side}/a/results.jsonl").read_text().splitlines()] for side in ("baseline", "candidate")
    ]
    pairs = {row["problem_idx"]: row["reward"] for row in rows[1]}
    assert [pairs[row["problem_idx"]] for row in rows[0]] == [0.0] * 10 + [1.0] * 30 and rows[0][9]["metadata"] == {"id": "q0009"}
    assert json.loads((new / "nel/policy.yaml").read_text())["benchmarks"] == {
        "a": {"tier": "critical", "max_drop": 0.05, "metric": "mean_reward"}
    }


def test_what_another_tool_left_is_not_replaced(tmp_path: Path) -> None:
    new, old = folders(tmp_path, 0)
    out, policy = tmp_path / "deep" / "out", PolicyConfig(max_drop={"a": 0})
    for _ in range(2):  # a verdict of ours is made again
        evaluate_compare.run(new, old, policy, out)
    assert "at most 0 points" in json.loads((out / "verdict.json").read_text())["rules"][0]["why"]
    (out / "nel" / "mine.json").write_text("1")
    with pytest.raises(InputError, match="mine.json in .*nel; required a new folder"):
        evaluate_compare.run(new, old, policy, out)
    assert (out / "nel" / "mine.json").exists()
    for place in (out / "verdict.json", out / "verdict.json" / "below"):
        with pytest.raises(EnvironmentFault, match="verdict.json"):
            evaluate_compare.run(new, old, policy, place)


def test_a_seed_that_draws_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="policy.seed: found -1"):
        verdict.compare(*folders(tmp_path, 0), PolicyConfig(max_drop={"a": 0.05}, seed=-1))
