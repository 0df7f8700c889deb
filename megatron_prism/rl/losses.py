"""The loss of policy optimisation, as an objective of the training step: a ratio of new to old weights, a KL term, and a weight for the sampler.

A token's loss is the policy's, times the sampler's weight, plus kl_beta times the KL term. What a masked token holds is never read, so it may be
-inf or NaN. Log-ratios are clamped to +-20 before they are exponentiated: beyond, a token has no gradient, where fp32 would soon have inf.
Shape legend: B sequences of a microbatch, S tokens of a sequence. With packing B is 1 and S is the tokens of all rows. Under context
parallelism S is this rank's part.
"""

from __future__ import annotations

from functools import partial

import torch

from megatron_prism.core.config import AlgorithmConfig
from megatron_prism.models.batch import Batch
from megatron_prism.train.objective import Objective, Terms

LOG_RATIO_LIMIT = 20.0  # as verl clamps it; ours for the sampler's weight too


def objective(config: AlgorithmConfig) -> Objective:
    """Return the config's loss as an objective. Of a batch it reads, for each token, what `needs` names.

    loss_mask is 1 where the label was sampled and is trained on. advantages: of its response. old_log_probs: under the weights at which the
    batch's training began. sampler_log_probs: the engine's. ref_log_probs: the reference's, if kl_beta is above 0. sequence_shares: 1 / tokens
    of its response. sequence_ids: a number of its response, unique in the microbatch and below B * S; only gspo reads it.
    Reports: ratio and clipped (share of tokens whose gradient is clipped away), kl (from the reference), tis_weight, and sampler_kl:
    KL(sampler || old weights), by k3. Each is a mean over tokens, or over responses of their mean.
    Raises: ValueError for a constant normalization without its constant.
    """
    if config.normalization == "constant" and config.constant_tokens is None:
        raise ValueError("normalization: constant needs constant_tokens")
    needs = ["loss_mask", "advantages", "old_log_probs", "sampler_log_probs"]
    needs += ["ref_log_probs"] if config.kl_beta > 0 else []
    needs += ["sequence_shares"] if config.normalization != "token" else []
    needs += ["sequence_ids"] if config.loss == "gspo" else []
    reports = ["ratio", "clipped", "sampler_kl"]
    reports += ["kl"] if config.kl_beta > 0 else []
    reports += ["tis_weight"] if config.tis_cap is not None else []
    return Objective(partial(terms, config=config), tuple(needs), tuple(reports))


def terms(nll_BS: torch.Tensor, batch: Batch, config: AlgorithmConfig) -> Terms:
    """Return the sum of the tokens' losses and of their weights.

    token (the paper): sum_t loss_t / sum_i |o_i|. sequence: 1/N sum_i 1/|o_i| sum_t loss_t. constant: 1/N sum_i 1/constant_tokens sum_t loss_t.
    t runs over sampled tokens, i over the N responses of the batch that have any, o_i being the tokens of one.
    """
    mask_BS = batch["loss_mask"] > 0
    log_probs_BS = torch.where(mask_BS, -nll_BS, 0.0)
    old_BS, sampler_BS, advantages_BS = (_at(mask_BS, batch[name]) for name in ("old_log_probs", "sampler_log_probs", "advantages"))

    log_ratio_BS = log_probs_BS - old_BS
    if config.loss == "gspo":
        log_ratio_BS = sequence_mean(log_ratio_BS, mask_BS, batch["sequence_ids"])
    ratio_BS = _clamp(log_ratio_BS).exp()
    policy = cispo if config.loss == "cispo" else clip
    loss_BS, clipped_BS = policy(ratio_BS, log_probs_BS, advantages_BS, config)
    values = {"ratio": ratio_BS, "clipped": clipped_BS, "sampler_kl": k3(_clamp(sampler_BS - old_BS))}
    if config.tis_cap is not None:
        values["tis_weight"] = tis_weight(old_BS, sampler_BS, config.tis_cap)
        loss_BS = loss_BS * values["tis_weight"]
    if config.kl_beta > 0:
        values["kl"] = kl(log_probs_BS, _at(mask_BS, batch["ref_log_probs"]), config)
        loss_BS = loss_BS + config.kl_beta * values["kl"]

    share_BS = mask_BS.float() if config.normalization == "token" else _at(mask_BS, batch["sequence_shares"])
    scale_BS = mask_BS / (config.constant_tokens or 1) if config.normalization == "constant" else share_BS
    sums = {name: (value_BS.detach() * share_BS).sum() for name, value_BS in values.items()}
    return Terms((loss_BS * scale_BS).sum(), share_BS.sum(), sums)


def clip(
    ratio_BS: torch.Tensor, log_probs_BS: torch.Tensor, advantages_BS: torch.Tensor, config: AlgorithmConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -min(r A, clamp(r, 1 - clip_low, 1 + clip_high) A), and where the clamp has taken the gradient.

    Source: PPO (arXiv 1707.06347), equation 7, with two bounds as DAPO has them (arXiv 2503.14476). GSPO (arXiv 2507.18071, equation 5) is the
    same of a sequence's ratio.
    """
    loss_BS = -ratio_BS * advantages_BS
    bounded_BS = -ratio_BS.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages_BS
    return torch.maximum(loss_BS, bounded_BS), bounded_BS > loss_BS


def cispo(
    ratio_BS: torch.Tensor, log_probs_BS: torch.Tensor, advantages_BS: torch.Tensor, config: AlgorithmConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -stop_gradient(min(r, 1 + clip_high)) A log_prob, and where the ratio is cut. Every token keeps a gradient.

    Source: MiniMax-M1 (arXiv 2506.13585), equation 4, without a lower bound, as its authors train.
    """
    bound = 1 + config.clip_high
    return -ratio_BS.detach().clamp(max=bound) * advantages_BS * log_probs_BS, ratio_BS > bound


def sequence_mean(values_BS: torch.Tensor, mask_BS: torch.Tensor, sequence_ids_BS: torch.Tensor) -> torch.Tensor:
    """Return at each token the mean of the values over its sequence's unmasked tokens, 0 where masked. A whole sequence must be in the microbatch."""
    ids, zeros = sequence_ids_BS.reshape(-1), values_BS.new_zeros(values_BS.numel())
    mask = mask_BS.reshape(-1).to(values_BS.dtype)
    sums = zeros.index_add(0, ids, values_BS.reshape(-1) * mask)
    counts = zeros.index_add(0, ids, mask).clamp(min=1)
    return ((sums / counts).index_select(0, ids) * mask).view_as(values_BS)


def tis_weight(old_BS: torch.Tensor, sampler_BS: torch.Tensor, cap: float) -> torch.Tensor:
    """Return min(pi_old / pi_sampler, cap): truncated importance sampling (the paper, section 9.1). It has no gradient."""
    return _clamp(old_BS - sampler_BS).exp().clamp(max=cap).detach()


def kl(log_probs_BS: torch.Tensor, ref_BS: torch.Tensor, config: AlgorithmConfig) -> torch.Tensor:
    """Return an estimate of KL(policy || reference) for each token, of l = log(policy / reference).

    Values: k1 = l, k2 = l^2 / 2, k3 = exp(-l) - 1 + l. Gradients, with g that of the log-probability: k2's is l g, in the mean over the policy's
    own samples that of the KL divergence. k1 has it too, by a straight-through term: its own, g, is 0 in the mean. k3's is (1 - exp(-l)) g, in the
    mean that of KL(reference || policy). The samples are taken for the policy's own; no ratio corrects that.
    Source: http://joschu.net/blog/kl-approx.html; k3 in GRPO: arXiv 2402.03300, equation 4.
    """
    log_ratio_BS = _clamp(log_probs_BS - ref_BS)
    if config.kl_estimator == "k3":
        return k3(log_ratio_BS)
    k2_BS = log_ratio_BS.square() / 2
    return k2_BS if config.kl_estimator == "k2" else k2_BS + (log_ratio_BS - k2_BS).detach()


def k3(log_ratio_BS: torch.Tensor) -> torch.Tensor:
    """Return exp(-l) - 1 + l: 0 or more, its mean over p's samples is KL(p || q) for l = log(p / q)."""
    return torch.expm1(-log_ratio_BS) + log_ratio_BS


def _at(mask_BS: torch.Tensor, values_BS: torch.Tensor) -> torch.Tensor:
    return torch.where(mask_BS, values_BS, 0.0)


def _clamp(log_ratio_BS: torch.Tensor) -> torch.Tensor:
    return log_ratio_BS.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
