"""Each loss, its weight and its reports against a plain loop over responses; its gradient against autograd of that loop, in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_prism.core.check.algorithm import check_algorithm
from megatron_prism.core.check.bounds import check_bounds
from megatron_prism.core.config import AlgorithmConfig
from megatron_prism.rl.losses import LOG_RATIO_LIMIT, objective
from megatron_prism.train.objective import Terms

LENGTHS = ((3, 4), (7, 0), (5, 1))  # responses in each row, 0: none; the rest of 9 tokens is masked
GARBAGE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 1e30}


def batch(garbage: float = 0.0, spread: float = 0.5) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return (nll, batch), fp64, (3, 9). A response begins after one masked token; masked tokens hold `garbage`."""
    generator = torch.Generator().manual_seed(3)
    shape = (3, 9)
    log_probs = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    tensors = {"nll": -log_probs}
    for name in ("old_log_probs", "sampler_log_probs", "ref_log_probs"):
        tensors[name] = log_probs + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    mask, shares = torch.zeros(shape), torch.zeros(shape, dtype=torch.float64)
    ids, advantages = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.float64)
    for row, lengths in enumerate(LENGTHS):
        first = 0
        for length in filter(None, lengths):
            tokens = slice(first + 1, first + 1 + length)
            mask[row, tokens], shares[row, tokens], ids[row, first : tokens.stop] = 1, 1 / length, 9 * row + first
            advantages[row, tokens] = torch.randn((), generator=generator, dtype=torch.float64)
            first = tokens.stop
    tensors |= {"advantages": advantages, "sequence_shares": shares}
    tensors = {name: torch.where(mask > 0, tensor, garbage) for name, tensor in tensors.items()}
    nll = tensors.pop("nll").requires_grad_()
    return nll, {**tensors, "loss_mask": mask, "sequence_ids": ids}


def clamp(value: torch.Tensor) -> torch.Tensor:
    return value.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def written(nll: torch.Tensor, of: dict[str, torch.Tensor], config: AlgorithmConfig) -> tuple[Any, float, dict[str, float]]:
    """Return (loss, weight, reports) by the equations, response by response and token by token."""
    loss: Any = 0.0
    weight, sums = 0.0, dict.fromkeys(("ratio", "clipped", "sampler_kl", "kl", "tis_weight"), 0.0)
    responses = [
        [
            (row, token)
            for row, token in zip(*(of["loss_mask"] > 0).nonzero(as_tuple=True), strict=True)
            if of["sequence_ids"][row, token] == name
        ]
        for name in sorted({int(name) for name in of["sequence_ids"][of["loss_mask"] > 0]})
    ]
    for response in responses:
        log_ratios = [-nll[at] - of["old_log_probs"][at] for at in response]
        for at, log_ratio in zip(response, log_ratios, strict=True):
            log_prob, advantage = -nll[at], of["advantages"][at]
            ratio = clamp(sum(log_ratios) / len(response) if config.loss == "gspo" else log_ratio).exp()
            low, high = 1 - config.clip_low, 1 + config.clip_high
            if config.loss == "cispo":
                policy, is_clipped = -min(float(ratio.detach()), high) * advantage * log_prob, ratio > high
            else:
                bounded = min(max(ratio, torch.tensor(low)), torch.tensor(high))
                policy = -min(ratio * advantage, bounded * advantage)
                is_clipped = (ratio > high and advantage > 0) or (ratio < low and advantage < 0)
            tis = clamp(of["old_log_probs"][at] - of["sampler_log_probs"][at]).exp()
            tis = 1.0 if config.tis_cap is None else min(float(tis), config.tis_cap)
            l_ref = log_prob - of["ref_log_probs"][at]
            k2 = l_ref**2 / 2
            kl = {"k1": k2 + (l_ref - k2).detach(), "k2": k2, "k3": (-l_ref).exp() - 1 + l_ref}[config.kl_estimator]
            l_sampler = of["sampler_log_probs"][at] - of["old_log_probs"][at]
            share = 1.0 if config.normalization == "token" else 1 / len(response)
            scale = 1 / config.constant_tokens if config.normalization == "constant" and config.constant_tokens else share
            loss = loss + scale * (policy * tis + config.kl_beta * kl)
            weight += share
            reports = {"ratio": ratio, "clipped": is_clipped, "kl": kl, "tis_weight": tis, "sampler_kl": (-l_sampler).exp() - 1 + l_sampler}
            sums = {name: sums[name] + share * float(torch.as_tensor(value).detach()) for name, value in reports.items()}
    return loss, weight, sums


CONFIGS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "clip": {"kl_beta": 0, "tis_cap": None},
    "gspo": {"loss": "gspo", "normalization": "sequence", "clip_low": 0.05, "clip_high": 0.05},
    "gspo by token": {"loss": "gspo"},
    "cispo": {"loss": "cispo"},
    "k1": {"kl_estimator": "k1", "kl_beta": 0.3},
    "k2": {"kl_estimator": "k2", "kl_beta": 0.3},
    "k3": {"kl_estimator": "k3", "kl_beta": 0.3},
    "low cap": {"tis_cap": 0.9},
    "sequence": {"normalization": "sequence"},
    "constant": {"normalization": "constant", "constant_tokens": 6},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loss_is_its_written_equation(name: str) -> None:
    config = AlgorithmConfig(**CONFIGS[name])
    nll, of = batch()
    what = objective(config)
    terms = what.terms(nll, {name: of[name] for name in what.needs})
    loss, weight, sums = written(nll, of, config)
    torch.testing.assert_close(terms.loss, loss)
    assert float(terms.weight) == pytest.approx(weight) == pytest.approx(20 if config.normalization == "token" else 5)
    assert {name: float(terms.sums[name]) for name in what.reports} == pytest.approx({name: sums[name] for name in what.reports})
    (ours,), (theirs,) = torch.autograd.grad(terms.loss, nll), torch.autograd.grad(loss, nll)
    torch.testing.assert_close(ours, theirs)
    assert not ours[of["loss_mask"] == 0].any() and ours.abs().max() > 0.1
    assert 0 < float(terms.sums["clipped"]) < weight


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_tokens_are_never_read(loss: Any, garbage: str) -> None:
    config = AlgorithmConfig(loss=loss, normalization="sequence")
    results = []
    for value in (0.0, GARBAGE[garbage]):
        nll, of = batch(value)
        terms = objective(config).terms(nll, of)
        results.append([terms.loss, terms.weight, *terms.sums.values(), *torch.autograd.grad(terms.loss, nll)])
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True))


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
def test_a_microbatch_of_padding_alone_adds_nothing(loss: Any) -> None:
    """A rank with fewer rows than another has such ones."""
    nll, of = batch(math.nan)
    terms = objective(AlgorithmConfig(loss=loss)).terms(nll, {**of, "loss_mask": torch.zeros_like(of["loss_mask"])})
    (gradient,) = torch.autograd.grad(terms.loss, nll)
    assert not any(value.any() for value in (terms.loss, terms.weight, *terms.sums.values(), gradient))


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
def test_on_policy_nothing_is_clipped_and_the_gradient_is_the_policys(loss: Any) -> None:
    """With one set of weights each ratio is exactly 1, and the gradient that of A log_prob."""
    config = AlgorithmConfig(loss=loss, normalization="sequence", kl_beta=0.05)
    nll, of = batch(spread=0.0)
    terms = objective(config).terms(nll, of)
    for name, mean in {"ratio": 1, "clipped": 0, "kl": 0, "sampler_kl": 0, "tis_weight": 1}.items():
        assert float(terms.sums[name] / terms.weight) == mean, name
    (gradient,) = torch.autograd.grad(terms.loss, nll)
    shared = of["advantages"] * of["sequence_shares"]
    torch.testing.assert_close(gradient, shared)
    off_policy = objective(config).terms(nll, {**of, "old_log_probs": of["old_log_probs"].roll(1, 1)})
    assert float(off_policy.sums["ratio"] / off_policy.weight) != 1


def test_what_is_reported_and_weighed_has_no_gradient() -> None:
    nll, of = batch()
    terms: Terms = objective(AlgorithmConfig()).terms(nll, of)
    assert not any(value.requires_grad for value in (terms.weight, *terms.sums.values()))


def test_a_group_without_variance_would_carry_the_kl_gradient_alone() -> None:
    """Why such a group is dropped, and not trained on with advantages of 0."""
    nll, of = batch()
    still = {**of, "advantages": torch.zeros_like(of["advantages"])}
    gradients = [torch.autograd.grad(objective(AlgorithmConfig(kl_beta=beta)).terms(nll, still).loss, nll)[0] for beta in (0.05, 0.0)]
    assert gradients[0].abs().max() > 1e-3 and not gradients[1].any()


def test_far_off_policy_stays_finite() -> None:
    """In fp32 a log-ratio of 100 is an infinite ratio."""
    nll, of = batch()
    far = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in of.items()}
    nll_32 = nll.detach().float().requires_grad_()
    for shift in (-100.0, 100.0):
        moved = {**far, **{name: far[name] + shift for name in ("old_log_probs", "ref_log_probs")}}
        terms = objective(AlgorithmConfig()).terms(nll_32, moved)
        (gradient,) = torch.autograd.grad(terms.loss, nll_32)
        assert terms.loss.isfinite() and gradient.isfinite().all() and all(value.isfinite() for value in terms.sums.values())
    assert not torch.tensor(100.0).exp().isfinite()


def test_the_kl_gradients_are_those_of_the_divergences() -> None:
    """Over all tokens of a small vocabulary, weighted by the policy: k1 and k2 give the gradient of KL(policy || reference), k3 the reverse one's."""
    logits = torch.tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.1, 0.4, -0.2, 0.6], dtype=torch.float64), 0)
    policy = torch.log_softmax(logits, 0)
    divergence = (policy.exp() * (policy - reference)).sum()
    reverse = (reference.exp() * (reference - policy)).sum()
    forward_gradient, reverse_gradient = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (divergence, reverse))
    of = {name: torch.zeros(1, 4) for name in ("advantages", "old_log_probs", "sampler_log_probs")}
    of |= {"loss_mask": torch.ones(1, 4), "ref_log_probs": reference[None], "sequence_shares": policy.exp().detach()[None]}
    for estimator, expected in (("k1", forward_gradient), ("k2", forward_gradient), ("k3", reverse_gradient)):
        config = AlgorithmConfig(kl_estimator=estimator, kl_beta=1.0, normalization="sequence")  # type: ignore[arg-type]
        terms = objective(config).terms(-torch.log_softmax(logits, 0)[None], of)
        torch.testing.assert_close(torch.autograd.grad(terms.loss, logits)[0], expected)
        if estimator != "k2":  # k1 and k3 have the divergence itself as their mean
            torch.testing.assert_close(terms.sums["kl"], divergence)
    assert (forward_gradient - reverse_gradient).abs().max() > 0.01


def test_what_does_not_fit_together_is_refused() -> None:
    def wrong(cp: int = 1, **keys: Any) -> list[str]:
        return [problem.where for problem in check_algorithm(AlgorithmConfig(**keys), cp, max_tokens=100)]

    assert wrong() == wrong(cp=2) == wrong(loss="gspo") == wrong(normalization="constant", constant_tokens=100) == []
    assert [problem.where for problem in check_bounds(AlgorithmConfig(clip_low=2, tis_cap=0), "algorithm.")] == [
        "algorithm.clip_low",
        "algorithm.tis_cap",
    ]
    assert wrong(cp=2, loss="gspo") == ["algorithm.loss"]
    assert wrong(normalization="constant") == ["algorithm.constant_tokens"]
    assert wrong(overlong="shape", overlong_tokens=101) == ["algorithm.overlong_tokens"]
    with pytest.raises(ValueError, match="constant_tokens"):
        objective(AlgorithmConfig(normalization="constant"))
