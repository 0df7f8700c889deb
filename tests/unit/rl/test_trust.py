"""The trust gate's arithmetic: how far a sampler is from its trainer, the bounds, and what is refused before anything is compared."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prism.core.errors import ResultFailure
from megatron_prism.generate.engine import Sampling, ids_of, logprobs_of
from megatron_prism.rl import gate
from megatron_prism.rl.gate import BOUNDS, Bound
from megatron_prism.rl.sample import Sample


def samples(*logprobs: tuple[float, ...]) -> list[Sample]:
    known: dict[str, Any] = {"prompt_id": "p", "domain": "math", "prompt_tokens": (1,), "ended": "end_token", "weights_step": 0}
    return [
        Sample(**known, sample=number, token_ids=ids_of(range(len(each))), logprobs=logprobs_of(each), outcome="fault", reward=0.0)
        for number, each in enumerate(logprobs)
    ]


def test_the_divergence_is_of_the_sampler_from_the_trainer() -> None:
    """k3 of the sampler's own tokens, exp(d) - 1 - d with d = trainer - sampler: rare tokens that the trainer likes weigh more."""
    trust = gate.compare(samples((-2.0, -1.0), (-1.0,)), [torch.tensor([-1.0, -1.0]), torch.tensor([-1.5])])
    assert (trust.num_tokens, trust.difference) == (3, 1.0) and trust.worst.startswith("prompt p sample 0: token 0 (id 0)")
    assert trust.kl == pytest.approx((math.e - 2 + math.exp(-0.5) - 1 + 0.5) / 3)


def test_what_is_no_number_is_the_furthest_off_and_within_no_bound() -> None:
    trust = gate.compare(samples((-2.0, -1.0), (-1.0,)), [torch.tensor([-9.0, -1.0]), torch.tensor([math.nan])])
    assert trust.worst.startswith("prompt p sample 1: token 0") and not trust.is_within(Bound(math.inf, math.inf))
    with pytest.raises(ResultFailure, match="trainer nan"):
        gate.require(trust, Bound(math.inf, math.inf))


@pytest.mark.parametrize(("difference", "is_within"), [(0.1, True), (0.2, False)])
def test_in_bf16_a_tenth_of_a_nat_at_every_token_is_rounding_and_a_fifth_is_not(difference: float, is_within: bool) -> None:
    trust = gate.compare(samples((-1.0,) * 8), [torch.full((8,), -1.0 - difference)])
    assert trust.is_within(BOUNDS["bf16"]) is is_within
    assert not gate.compare(samples((-1.0,) * 8), [torch.tensor([-4.0] + [-1.0] * 7)]).is_within(Bound(kl=1.0, difference=2.0))


def test_a_configs_own_divergence_replaces_the_bounds() -> None:
    known = SimpleNamespace(max_sampler_kl=None), SimpleNamespace(max_sampler_kl=0.5)
    assert [gate.bound_of("bf16", sampling) for sampling in known] == [BOUNDS["bf16"], Bound(0.5, BOUNDS["bf16"].difference)]  # type: ignore[arg-type]


def test_a_step_is_judged_by_the_mean_of_all_ranks_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here another rank holds as many tokens, without a difference: the mean is half of this rank's."""
    of = samples((-1.0,) * 4, (-1.0,) * 4)
    mine, theirs = {0: torch.full((4,), -1.5)}, {1: torch.full((4,), -1.0)}
    asked = []

    def gather(value: Any, _: Any) -> list[Any]:
        asked.append(value)
        return [value, theirs if isinstance(value, dict) else [0.0, 4.0]]

    monkeypatch.setattr(gate.ranks, "gather", gather)
    grid: Any = SimpleNamespace(dp_cp_group=None)
    mean = (math.exp(-0.5) - 0.5) / 2
    gate.require_kl(of, mine, Bound(1.01 * mean, 1e-9), grid)  # one token may be far off
    assert len(asked) == 1, "the log-probabilities themselves are gathered where the mean is too large, and only there"
    with pytest.raises(ResultFailure, match="sample 0: token 0"):
        gate.require_kl(of, mine, Bound(0.99 * mean, 9.0), grid)


@pytest.mark.parametrize(("key", "value"), [("temperature", 0.9), ("top_p", 0.9), ("top_k", 5)])
def test_a_sampler_of_another_distribution_is_refused(key: str, value: float) -> None:
    assert [problem.where for problem in gate.check_sampling(Sampling(max_tokens=1, **{"temperature": 1.0, key: value}))] == [
        f"rollout.{key}"
    ]  # type: ignore[arg-type]
    assert not gate.check_sampling(Sampling(max_tokens=1, temperature=1.0))
