"""The metrics of graded samples: what counts in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_prism.generate.engine import ids_of, logprobs_of
from megatron_prism.grade.outcome import Outcome
from megatron_prism.rl import figures
from megatron_prism.rl.rollout import Response, Rollouts
from megatron_prism.rl.sample import Sample


def sample(outcome: Outcome, domain: str = "math", num_tokens: int = 2, ended: str = "end_token", penalty: float = 0.0) -> Sample:
    return Sample(
        prompt_id="p",
        sample=0,
        domain=domain,
        prompt_tokens=(1,),
        token_ids=ids_of((1,) * num_tokens),
        logprobs=logprobs_of((-1.0,) * num_tokens),
        ended=ended,  # type: ignore[arg-type]
        weights_step=0,
        outcome=outcome,
        reward=float(outcome == "right") - penalty,
    )


def rollouts(groups: Sequence[Sequence[Sample]], num_kept: int) -> Rollouts:
    responses = [[Response(one, "", "", seed=0) for one in group] for group in groups]
    return Rollouts(responses, responses[:num_kept], num_drawn=len(groups))


def test_rewards_are_of_what_was_graded_and_shares_of_what_was_sampled() -> None:
    math = [sample("right"), sample("no_format", num_tokens=6, ended="max_tokens"), sample("fault"), sample("wrong", penalty=0.5)]
    code = [sample("right", "code"), sample("right", "code", num_tokens=4)]
    values = figures.of_rollouts(rollouts([math, code], num_kept=1))
    assert values == {
        "reward": pytest.approx(2.5 / 5),  # the fault is out
        "reward/code": 1.0,
        "reward/math": pytest.approx(0.5 / 3),
        "right": 3 / 6,
        "kept_groups": 0.5,
        "response_tokens": 3.0,
        "truncated": pytest.approx(1 / 6),
        "no_format": pytest.approx(1 / 6),
        "grader_faults": pytest.approx(1 / 6),
    }


def test_a_step_of_faults_has_no_reward_and_says_so() -> None:
    values = figures.of_rollouts(rollouts([[sample("fault"), sample("fault")]], num_kept=0))
    assert values["reward"] == 0.0 and values["grader_faults"] == 1.0 and "reward/math" not in values


def test_validation_is_by_domain_and_leaves_faults_out() -> None:
    groups = [
        [sample("right"), sample("wrong"), sample("wrong"), sample("wrong")],
        [sample("right"), sample("fault"), sample("fault"), sample("fault")],  # one was judged, and it is right
        [sample("fault")] * 4,  # nothing is known of this prompt
        [sample("wrong", "science"), sample("no_format", "science"), sample("truncated", "science"), sample("wrong", "science")],
    ]
    assert figures.of_validation(groups) == {
        "math/grader_faults": pytest.approx(7 / 12),
        "science/grader_faults": 0.0,
        "math/pass_at_1": pytest.approx((0.25 + 1) / 2),
        "math/pass_at_4": 1.0,
        "science/pass_at_1": 0.0,
        "science/pass_at_4": 0.0,
    }


def test_one_sample_a_prompt_gives_pass_at_1_alone() -> None:
    assert figures.of_validation([[sample("right")], [sample("wrong")]]) == {"math/grader_faults": 0.0, "math/pass_at_1": 0.5}


def test_a_domains_kept_groups_are_those_that_are_trained_on() -> None:
    groups = [[sample("wrong"), sample("wrong")], [sample("right"), sample("wrong")], [sample("right", "code")]]
    sampled = rollouts(groups, num_kept=0)
    sampled = replace(sampled, kept=[sampled.groups[1]])  # not the first of its domain
    seen: list[Rollouts] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "of_rollouts", lambda one: seen.append(one) or {"kept_groups": len(one.kept) / len(one.groups)})
        assert figures.by_domain(sampled) == {"kept_groups/code": 0.0, "kept_groups/math": 0.5}
    assert [list(one.kept) for one in seen] == [[], [sampled.groups[1]]]
