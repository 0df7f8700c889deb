"""Megatron-Core's dynamic engine as a generation engine, over the training model itself: no copy of the weights, no hand-over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import raise_problems
from megatron_prism.generate import dynamic
from megatron_prism.generate.engine import Rollout, Sampling, problems
from megatron_prism.generate.lane import Request
from megatron_prism.models import build
from megatron_prism.parallel import groups
from megatron_prism.parallel.groups import Groups


@dataclass(frozen=True)
class MCore:
    chunks: Sequence[Any]
    model: ModelConfig
    groups: Groups
    num_rows: int = 64
    prefill_tokens: int = 8192
    max_context: int | None = None
    cache_gb: float | None = None
    page_tokens: int = 256

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], num_samples: int, sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        max_context = self.model.max_position_embeddings if self.max_context is None else self.max_context
        raise_problems(problems(prompts, num_samples, sampling, seeds, self.model.vocab_size, max_context))
        longest_first = sorted(range(len(prompts)), key=lambda prompt: -len(prompts[prompt]))
        mine = longest_first[self.groups.dp_rank :: self.groups.dp]
        request = Request(prompts, num_samples, sampling, seeds, self.num_rows, self.prefill_tokens, max_context)
        drafts = dict(enumerate(draft for prompt in mine for draft in request.drafts(prompt)))
        finished = []
        if drafts:
            longest = max(draft.num_prompt_tokens + draft.max_tokens for draft in drafts.values())
            rows = min(self.num_rows, len(drafts))
            room = dynamic.Room(
                rows,
                max(self.prefill_tokens, len(prompts[mine[0]])) + rows,
                max_context,
                rows * -(-longest // self.page_tokens),
                self.page_tokens,
            )
            choices = dynamic.Choices(drafts, sampling, self.model.vocab_size, self.groups)
            finished = dynamic.run(build.unwrap(self.chunks[0]), self.model, room, prompts, choices)
        everyones = groups.gather(finished, self.groups.dp_cp_group) if self.groups.dp > 1 else [finished]
        return sorted((rollout for part in everyones for rollout in part), key=lambda rollout: (rollout.prompt, rollout.sample))
