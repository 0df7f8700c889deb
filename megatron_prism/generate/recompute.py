"""The reference engine: it recomputes the whole text for every token with the training forward pass, one rollout after another.

It is slow, and as exact as training. Its layouts are those of forward.logits, so no context parallelism; its own tests ran it on one rank.
It does not divide the prompts among data-parallel replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import raise_problems
from megatron_prism.generate.draw import choose, uniforms
from megatron_prism.generate.engine import Rollout, Sampling, problems
from megatron_prism.generate.lane import Draft, Request
from megatron_prism.models.forward import logits
from megatron_prism.parallel.groups import Groups


@dataclass(frozen=True)
class Recompute:
    """An engine (engine.Engine) that shares with cached.py only the choice of a token."""

    chunks: Sequence[Any]
    model: ModelConfig
    groups: Groups
    max_context: int | None = None

    def generate(self, prompts: Sequence[Sequence[int]], num_samples: int, sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        max_context = self.model.max_position_embeddings if self.max_context is None else self.max_context
        raise_problems(problems(prompts, num_samples, sampling, seeds, self.model.vocab_size, max_context))
        request = Request(prompts, num_samples, sampling, seeds, 1, max_context, max_context)
        return [self._finish(draft, request) for prompt in range(len(prompts)) for draft in request.drafts(prompt)]

    def _finish(self, draft: Draft, request: Request) -> Rollout:
        rollout = None
        while rollout is None:
            logits_1V = logits(self.chunks, [*request.prompts[draft.prompt], *draft.token_ids], self.groups, last_only=True)
            choice = torch.zeros(2, dtype=torch.float64)
            if logits_1V is not None:
                uniform = torch.from_numpy(uniforms([draft.stream], [len(draft.token_ids)]))[None]
                shown_1V = logits_1V[:, : self.model.vocab_size].float()
                token, logprob = choose(shown_1V, uniform.to(shown_1V.device), request.sampling)
                choice = torch.cat([token[0].double(), logprob[0].double()]).cpu()
            if self.groups.pp > 1:
                dist.broadcast(choice, self.groups.last_stage_rank, group=self.groups.pp_group)
            rollout = draft.extend(int(choice[0]), float(choice[1]), request.sampling)
        return rollout
