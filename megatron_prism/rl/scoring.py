"""From a step's kept groups to what it trains on: minibatches, each of microbatches with the log-probabilities of trainer and reference.

All minibatches are scored before the first update, by the weights that the step begins with. Shape legend: B rows of a microbatch, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prism.core import log
from megatron_prism.core.config import RLConfig
from megatron_prism.generate.engine import Sampling
from megatron_prism.models.forward import log_probs, log_probs_and_entropies
from megatron_prism.parallel.groups import Groups, gather
from megatron_prism.rl import batches, gate, rollout
from megatron_prism.rl.advantages import advantages, group_of
from megatron_prism.rl.record import Observer
from megatron_prism.rl.reference import Reference
from megatron_prism.rl.rollout import Encoded, Rollouts, Sampler
from megatron_prism.rl.sample import Sample

Microbatches = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Scored:
    """A step's minibatches, this rank's part of each, and the mean entropy of the sampled tokens."""

    minibatches: Sequence[Microbatches]
    entropy: float | None  # of no tokens there is none


@dataclass(frozen=True)
class Scorer:
    """What scores a step's responses. bound: of the trust gate; None where the responses come from records."""

    config: RLConfig
    chunks: Sequence[Any]
    groups: Groups
    reference: Reference | None
    bound: gate.Bound | None
    observer: Observer

    def score(self, rollouts: Rollouts, step: int) -> Scored:
        """Return the step's minibatches; every rank calls this, with whole weights (optim.settled).

        Raises: ResultFailure where the weights of this very step sampled a minibatch, and the sampler's log-probabilities are not the trainer's.
        """
        sums_2 = torch.zeros(2, dtype=torch.float64)
        minibatches = []
        for samples, values in _parts(rollouts, self.config):
            plan = batches.plan(samples, shape(self.config), self.groups.dp)
            microbatches = batches.microbatches(plan, self.groups.dp_rank, samples, values, {})
            sums_2 += self._add_log_probs(plan, samples, microbatches, step).cpu()
            self.observer.scored(rollouts, plan, samples, values, microbatches)
            minibatches.append(microbatches)
        entropy, num_tokens = (sum(part) for part in zip(*gather(sums_2.tolist(), self.groups.dp_cp_group), strict=True))
        return Scored(minibatches, entropy / num_tokens if num_tokens else None)

    def _add_log_probs(self, plan: batches.Plan, samples: Sequence[Sample], microbatches: Microbatches, step: int) -> torch.Tensor:
        """Add old_log_probs and ref_log_probs to microbatches; return the sum of the sampled tokens' entropies and their number (2,)."""
        scores = log_probs_and_entropies(self.chunks, microbatches, self.groups)
        if self.bound is not None and samples and all(sample.weights_step == step - 1 for sample in samples):
            old = batches.by_sample(plan, self.groups.dp_rank, [old_BS for old_BS, _ in scores])
            gate.require_kl(samples, old, self.bound, self.groups)
        if self.reference is not None:
            with self.reference.in_place():
                for batch, ref_BS in zip(microbatches, log_probs(self.chunks, microbatches, self.groups), strict=True):
                    batch["ref_log_probs"] = ref_BS
        sums = []
        for batch, (old_BS, entropy_BS) in zip(microbatches, scores, strict=True):
            batch["old_log_probs"] = old_BS
            mask_BS = batch["loss_mask"].to(entropy_BS.device)
            sums.append(torch.stack([(entropy_BS * mask_BS).sum(), mask_BS.sum()]))
        return torch.stack(sums).double().sum(0)

    def require_kl(self, samples: Sequence[Sample]) -> None:
        """Compare samples of the weights of this moment with the trainer; every rank calls this. Raises: ResultFailure (gate.require_kl)."""
        if self.bound is not None and samples:
            plan = batches.plan(samples, shape(self.config), self.groups.dp)
            microbatches = batches.microbatches(plan, self.groups.dp_rank, samples, [0.0] * len(samples), {})
            own = batches.by_sample(plan, self.groups.dp_rank, log_probs(self.chunks, microbatches, self.groups))
            gate.require_kl(samples, own, self.bound, self.groups)


def _parts(rollouts: Rollouts, config: RLConfig) -> list[tuple[list[Sample], list[float]]]:
    """Return the samples that count and their advantages, by minibatch: whole groups, as many in each as can be. Advantages are the batch's."""
    algorithm = config.algorithm
    groups = [group_of(rollout.samples([group]), algorithm) for group in rollouts.kept]
    values = advantages(groups, algorithm)
    num_parts = min(config.batch.num_minibatches, max(len(groups), 1))
    parts: list[tuple[list[Sample], list[float]]] = [([], []) for _ in range(num_parts)]
    for number, (responses, group, values_G) in enumerate(zip(rollouts.kept, groups, values, strict=True)):
        samples, chosen = parts[number * num_parts // len(groups)]
        for response, is_counted, value in zip(responses, group.is_counted_G.tolist(), values_G.tolist(), strict=True):
            if is_counted:
                samples.append(response.sample)
                chosen.append(value)
    return parts


def open_gate(sampler: Sampler, chunks: Sequence[Any], prompts: Sequence[Encoded], bound: gate.Bound, groups: Groups) -> None:
    """Compare sampler and trainer on a few prompts before the first step; every rank calls this, with whole weights (optim.settled).

    Raises: ResultFailure where they are not the same.
    """
    config = sampler.config
    sampling = Sampling(max_tokens=config.rollout.max_tokens, temperature=config.rollout.temperature, end_ids=sampler.spec.end_ids)
    trust = gate.at_start(sampler.engine, chunks, [one.tokens for one in prompts], sampling, shape(config), groups)
    gate.require(trust, bound)
    if groups.rank == 0:
        said = f"KL {trust.kl:.2g}, largest difference {trust.difference:.2g} nats over {trust.num_tokens} tokens"
        log.get().info("sampler and trainer agree: %s", said)


def shape(config: RLConfig) -> batches.Shape:
    """Return what microbatches must look like."""
    grid = config.parallel
    multiple = grid.tp if grid.sequence_parallel else 1
    return batches.Shape(seq_length=config.batch.seq_length, micro_size=config.batch.micro_size, token_multiple=multiple)
