"""The metrics of a step by domain: of each domain's responses alone, and together those of all."""

from __future__ import annotations

import pytest

from megatron_prism.grade.outcome import Outcome
from megatron_prism.rl import figures
from megatron_prism.rl.rollout import Response, Rollouts
from megatron_prism.rl.sample import Sample


def response(outcome: Outcome, domain: str, num_tokens: int = 2) -> Response:
    sample = Sample(
        prompt_id="p",
        sample=0,
        domain=domain,
        prompt_tokens=(1,),
        token_ids=(1,) * num_tokens,
        logprobs=(-1.0,) * num_tokens,
        ended="max_tokens" if outcome == "truncated" else "end_token",
        weights_step=0,
        outcome=outcome,
        reward=float(outcome == "right"),
    )
    return Response(sample, "", "")


def test_each_domain_is_counted_for_itself() -> None:
    math = [[response("right", "math"), response("wrong", "math", 4)], [response("right", "math"), response("right", "math")]]
    code = [[response("fault", "code"), response("truncated", "code", 8)]]
    step = Rollouts([*math, *code], [math[0]], num_drawn=3)
    values = figures.by_domain(step)
    assert {name: values[f"{name}/math"] for name in ("right", "kept_groups", "truncated", "grader_faults")} == {
        "right": 0.75,
        "kept_groups": 0.5,
        "truncated": 0.0,
        "grader_faults": 0.0,
    }
    assert (values["response_tokens/math"], values["response_tokens/code"]) == (2.5, 5.0)
    assert (values["grader_faults/code"], values["truncated/code"], values["kept_groups/code"]) == (0.5, 0.5, 0.0)
    assert not values.keys() & figures.of_rollouts(step).keys()  # neither writes over the other
    whole = figures.of_rollouts(step)
    for name in ("right", "truncated", "grader_faults", "response_tokens"):
        assert (4 * values[f"{name}/math"] + 2 * values[f"{name}/code"]) / 6 == pytest.approx(whole[name])
