"""What a step saw, in the order of its walk: a Step. An observer stands beside the loop, looks, and hands the Step on once the step has ended.

`prism rl --record` hands it to rl/record_files.py, which writes it; `prism rl replay` to rl/compare.py, which holds it against the one that was
written. The observer is the same, so a replay computes its figures as the run did. It changes nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_prism.checkpoint import fingerprint
from megatron_prism.checkpoint.fingerprint import Fingerprints
from megatron_prism.core.config import ModelConfig, RLConfig
from megatron_prism.core.load import to_dict
from megatron_prism.core.manifest import versions
from megatron_prism.models.batch import Batch
from megatron_prism.parallel import groups as ranks
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups
from megatron_prism.rl import batches
from megatron_prism.rl.batches import Plan
from megatron_prism.rl.reference import Reference
from megatron_prism.rl.rollout import Response, Rollouts
from megatron_prism.rl.sample import Sample
from megatron_prism.train import optim
from megatron_prism.train.step import Means

ByResponse = Mapping[int, Any]  # values of those that were trained on, by the response's number among all of the step


@dataclass(frozen=True, kw_only=True)
class Step:
    """Everything that one step saw.

    platform: what decides its bits beside its inputs. responses: all that were sampled, group after group. advantages and log-probabilities
    (R,): of the responses that were trained on. plan: for each data-parallel rank the [response, row, first token, first label, labels] of
    its microbatches. figures: loss, its weight and reports, grad_norm, lr. tensors: fingerprints by stage.
    """

    step: int
    platform: Mapping[str, Any]
    responses: Sequence[Response]
    advantages: ByResponse
    plan: Sequence[Sequence[Sequence[int]]]
    old_log_probs: ByResponse
    ref_log_probs: ByResponse
    figures: Mapping[str, float]
    tensors: Mapping[str, Fingerprints]


class Observer(Protocol):
    """What the loop calls in each step. Every rank calls it, and its weights are whole (optim.settled) where a step begins."""

    def begins(self, step: int) -> None:
        """Look at what a step begins with."""

    def scored(
        self, rollouts: Rollouts, plan: Plan, samples: Sequence[Sample], advantages: Sequence[float], microbatches: Sequence[Batch]
    ) -> None:
        """Look at what it trains on: the plan's samples, and this rank's microbatches with all their log-probabilities."""

    def measured(self, means: Means, grad_norm: float, lr: float) -> None:
        """Look at loss and gradients, before they are clipped."""

    def ends(self) -> None:
        """Look at what it leaves."""


class Unobserved:
    """The observer of a run that keeps no records."""

    def begins(self, step: int) -> None:
        """See nothing."""

    def scored(
        self, rollouts: Rollouts, plan: Plan, samples: Sequence[Sample], advantages: Sequence[float], microbatches: Sequence[Batch]
    ) -> None:
        """See nothing."""

    def measured(self, means: Means, grad_norm: float, lr: float) -> None:
        """See nothing."""

    def ends(self) -> None:
        """See nothing."""


@dataclass
class Witness:
    """An observer that makes a Step of each step that is due, and hands it to `take` on every rank."""

    config: RLConfig
    model: ModelConfig
    groups: Groups
    chunks: Sequence[Any]
    optimizer: Any
    reference: Reference | None
    is_due: Callable[[int], bool]
    take: Callable[[Step], None]
    _seen: dict[str, Any] = field(default_factory=dict)
    _tensors: dict[str, Fingerprints] = field(default_factory=dict)

    def begins(self, step: int) -> None:
        """Take the fingerprints of weights, optimizer and reference."""
        self._seen = {"step": step} if self.is_due(step) else {}
        if self._seen:
            self._tensors = {
                "weights_before": fingerprint.of_weights(self.chunks, self.model),
                "optimizer_before": fingerprint.of_optimizer(self.chunks, self.optimizer, self.model),
                "reference_before": self._of_reference(),
            }

    def scored(
        self, rollouts: Rollouts, plan: Plan, samples: Sequence[Sample], advantages: Sequence[float], microbatches: Sequence[Batch]
    ) -> None:
        """Keep the responses, their advantages, where they stand, and the log-probabilities under old weights and reference."""
        if not self._seen:
            return
        responses = [response for group in rollouts.groups for response in group]
        number_of = {id(response.sample): number for number, response in enumerate(responses)}
        numbers = [number_of[id(sample)] for sample in samples]
        self._seen |= {
            "responses": tuple(responses),
            "advantages": dict(zip(numbers, advantages, strict=True)),
            "plan": [
                [[numbers[place.sample], place.row, place.first, place.first_label, place.num_labels] for place in places]
                for places in plan.places
            ],
        }
        for name in ("old_log_probs", "ref_log_probs"):
            held = [batch[name] for batch in microbatches if name in batch]
            mine = batches.by_sample(plan, self.groups.dp_rank, held) if held else {}
            parts = ranks.gather(mine, self.groups.dp_cp_group) if self.groups.dp > 1 else [mine]
            everyones = {index: values for part in parts for index, values in part.items()}
            self._seen[name] = {numbers[index]: everyones[index] for index in sorted(everyones)}

    def measured(self, means: Means, grad_norm: float, lr: float) -> None:
        """Keep loss, reports, gradient norm and learning rate, and the gradients' fingerprints."""
        if self._seen:
            figures = {"loss": means.loss, "weight": means.weight, **means.reports, "grad_norm": grad_norm, "lr": lr}
            self._seen["figures"] = figures
            self._tensors["gradients"] = fingerprint.of_gradients(self.chunks, self.optimizer, self.model)

    def ends(self) -> None:
        """Take the fingerprints of what the step leaves, and hand the Step on."""
        if not self._seen:
            return
        with optim.settled(self.chunks, self.config.parallel):
            self._tensors["weights_after"] = fingerprint.of_weights(self.chunks, self.model)
            self._tensors["reference_after"] = self._of_reference()
        seen, self._seen = self._seen, {}
        self.take(Step(platform=platform_of(self.config, self.groups), tensors=self._tensors, **seen))

    def _of_reference(self) -> Fingerprints:
        if self.reference is None:
            return {}
        with self.reference.in_place():
            return fingerprint.of_weights(self.chunks, self.model)


def platform_of(config: RLConfig, groups: Groups) -> dict[str, Any]:
    """Return what decides a step's bits beside its inputs: device, threads, versions, layout, dtype, engine."""
    names = ranks.gather(host.device_name() if host.has_cuda() else _cpu())
    parallel = to_dict(config)["parallel"]
    return {
        "devices": sorted(set(names)),
        "num_threads": torch.get_num_threads(),
        "world_size": groups.world_size,
        "parallel": {key: value for key, value in parallel.items() if value not in (None, False, 1)},
        "precision": config.precision,
        "engine": config.rollout.engine,
        "deterministic": config.deterministic,
        "versions": versions(),
    }


def _cpu() -> str:
    """Return what chooses the kernels on a host: its model, and the instructions that torch uses."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
