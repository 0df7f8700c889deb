"""Greedy or sampled continuation through the training forward pass, on any TP x PP layout.

The whole text is computed again for every token: slow and exact, the oracle for faster paths. Not under sequence
parallelism (a text's length need not divide by tp).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_prism.models.forward import logits
from megatron_prism.parallel import host
from megatron_prism.parallel.groups import Groups


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy; top_p keeps the smallest set of that probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate(
    chunk: torch.nn.Module, prompt: Sequence[int], max_tokens: int, eos_ids: Sequence[int], sampling: Sampling, groups: Groups
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, on every rank the same; ends before an end-of-text token or at max_tokens."""
    chunk.eval()
    generator = torch.Generator(device=host.device()).manual_seed(sampling.seed)
    tokens = list(prompt)
    for _ in range(max_tokens):
        logits_1V = logits([chunk], tokens, groups, last_only=True)
        choice = torch.zeros(1, dtype=torch.long, device=host.device())
        if logits_1V is not None:
            choice[0] = choose(logits_1V[0], sampling, generator)
        if groups.pp > 1:
            dist.broadcast(choice, groups.last_stage_rank, group=groups.pp_group)
        token = int(choice)
        if token in eos_ids:
            return
        tokens.append(token)
        yield token


def choose(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Return the next token's id."""
    if sampling.temperature == 0:
        return logits_V.argmax()
    probability_V, token_V = torch.softmax(logits_V.float() / sampling.temperature, dim=-1).sort(descending=True)
    probability_V[1:][(probability_V.cumsum(0) - probability_V)[1:] >= sampling.top_p] = 0  # the likeliest always stays
    return token_V[torch.multinomial(probability_V, 1, generator=generator)[0]]
