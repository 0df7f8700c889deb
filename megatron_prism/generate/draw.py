"""Draw the next token of each row: invert the distribution at a number that depends only on the rollout and the token's index.

Shape legend: R rows, S draws of a row, V vocabulary, K blocks of it, B tokens (or blocks) of a block, M the likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from megatron_prism.generate.engine import Sampling

BLOCK = 64  # tokens per partial sum: running sums over the whole vocabulary cost more than a small model's layers
LIKELIEST = 256  # tokens sorted for top_p at first; the whole vocabulary is sorted only if these do not suffice
BELOW = 1 - 2.0**-52


def uniforms(streams: Sequence[int], indices: Sequence[int]) -> np.ndarray:
    """Return a number in [0, 1), fp64, for each stream (64 bits) at an index.

    Source: SplitMix64, whose state is a counter (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    """
    mixed = np.asarray(streams, np.uint64) + (np.asarray(indices, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def choose(logits_RV: Tensor, uniform_RS: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the chosen tokens (R, S) and their log-probabilities as engine.Rollout defines them. Greedy draws of a row are equal.

    logits are fp32, and -inf for the vocabulary's padding. Of a row with a NaN or an inf the log-probability is NaN, and the token is any.
    """
    greedy = sampling.temperature == 0
    scaled_RV = logits_RV if greedy or sampling.temperature == 1 else logits_RV / sampling.temperature
    top_R1, likeliest_R1 = scaled_RV.max(-1, keepdim=True) if greedy else (scaled_RV.amax(-1, keepdim=True), None)
    weight_RV = (scaled_RV - top_R1).exp_()
    block_RKB = _blocks(weight_RV)
    sum_R1 = block_RKB.sum(-1).sum(-1, keepdim=True)
    if likeliest_R1 is not None:
        token_RS = likeliest_R1.expand_as(uniform_RS)
    else:
        is_whole = sampling.top_p == 1 and sampling.top_k is None
        token_RS = _invert(block_RKB if is_whole else _blocks(_likeliest(weight_RV, sampling)), uniform_RS).clamp_(
            max=logits_RV.shape[1] - 1
        )
    return token_RS, scaled_RV.gather(1, token_RS) - top_R1 - sum_R1.log()


def _blocks(weight_RV: Tensor) -> Tensor:
    """Return the vocabulary in blocks (R, K, B), the last one padded with zeros."""
    missing = -weight_RV.shape[1] % BLOCK
    return (functional.pad(weight_RV, (0, missing)) if missing else weight_RV).unflatten(1, (-1, BLOCK))


def _invert(weight_RKB: Tensor, uniform_RS: Tensor) -> Tensor:
    """Return the token (R, S) whose share of the row's sum holds the number: first its block (or its block's block), then the token within.

    Running sums are products with a triangle: cumsum has no deterministic kernel on CUDA.
    """
    levels = [weight_RKB]
    while levels[-1].shape[1] > 1:
        levels.append(_blocks(levels[-1].sum(-1).double()))
    triangle_BB = torch.ones(BLOCK, BLOCK, dtype=torch.float64, device=weight_RKB.device).triu()
    place_RS = torch.zeros_like(uniform_RS, dtype=torch.long)
    target_RS = uniform_RS * levels[-1].sum(-1)
    for level_RKB in reversed(levels):
        place_RS = place_RS.clamp(max=level_RKB.shape[1] - 1)  # beyond it: NaN
        part_RSB = level_RKB.gather(1, place_RS[..., None].expand(-1, -1, BLOCK)).double()
        end_RSB = part_RSB @ triangle_BB
        target_RS = torch.minimum(target_RS.clamp(min=0), end_RSB[..., -1] * BELOW)  # never a token of weight 0
        within_RS1 = torch.searchsorted(end_RSB, target_RS[..., None], right=True).clamp_(max=BLOCK - 1)  # beyond it: NaN
        target_RS = target_RS - (end_RSB - part_RSB).gather(2, within_RS1)[..., 0]
        place_RS = place_RS * BLOCK + within_RS1[..., 0]
    return place_RS


def _likeliest(weight_RV: Tensor, sampling: Sampling) -> Tensor:
    """Return the weights, with zero for tokens that top_k or top_p exclude."""
    size_V = weight_RV.shape[1]
    best_RM = weight_RV.topk(min(sampling.top_k or LIKELIEST, size_V)).values
    mass_R1 = (weight_RV if sampling.top_k is None else best_RM).sum(-1, keepdim=True, dtype=torch.float64) * sampling.top_p
    if sampling.top_k is None and best_RM.shape[1] < size_V and bool((best_RM.sum(-1, keepdim=True, dtype=torch.float64) < mass_R1).any()):
        best_RM = weight_RV.sort(descending=True).values
    best_RM, mass_R1 = best_RM.cpu(), mass_R1.cpu()  # running sums are deterministic there
    kept_R1 = ((best_RM.cumsum(-1, dtype=torch.float64) - best_RM) < mass_R1).sum(-1, keepdim=True).clamp_(min=1)
    return weight_RV.masked_fill(weight_RV < best_RM.gather(1, kept_R1 - 1).to(weight_RV.device), 0)
