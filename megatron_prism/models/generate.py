"""Greedy or sampled continuation through the training forward pass, on any TP x PP layout.

The whole text is computed again for every token: slow and exact, the oracle for faster paths. Not under sequence
parallelism (a text's length need not divide by tp).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

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
        logits_V = _next_logits(chunk, tokens, groups)
        choice = torch.zeros(1, dtype=torch.long, device=host.device())
        if logits_V is not None:
            choice[0] = choose(logits_V, sampling, generator)
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


@torch.no_grad()
def _next_logits(chunk: torch.nn.Module, tokens: Sequence[int], groups: Groups) -> torch.Tensor | None:
    """Return the logits after the last token, over the whole vocabulary; None but on the last pipeline stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    tokens_BS = torch.tensor([tokens], device=host.device())
    positions_BS = torch.arange(len(tokens), device=host.device())[None]

    def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        return model(tokens_BS, positions_BS, None), lambda output, non_loss_data: output[0, -1]

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=chunk,
        num_microbatches=1,
        seq_length=len(tokens),
        micro_batch_size=1,
        decoder_seq_length=len(tokens),
        forward_only=True,
        collect_non_loss_data=True,
    )
    return gather_from_tensor_model_parallel_region(outputs[0][None])[0] if outputs else None
