"""A response as a run keeps it, for tests of what is written and read."""

from __future__ import annotations

from megatron_prism.generate.engine import ids_of, logprobs_of
from megatron_prism.rl.rollout import Response
from megatron_prism.rl.sample import Sample


def response(prompt_id: str, number: int, prompt_tokens: tuple[int, ...] = (1, 2), seed: int = 7) -> Response:
    """Return the number-th response to a prompt: two tokens, right."""
    sample = Sample(
        prompt_id=prompt_id,
        sample=number,
        domain="math",
        prompt_tokens=prompt_tokens,
        token_ids=ids_of((3, 4)),
        logprobs=logprobs_of((-1.0, -2.0)),
        ended="end_token",
        weights_step=0,
        outcome="right",
        reward=1.0,
    )
    return Response(sample, "text", "why", seed)
