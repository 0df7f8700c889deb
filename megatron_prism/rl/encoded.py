"""Prompt sets as tokens, and what a job that samples responses to them needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_prism.core.config import ModelConfig
from megatron_prism.core.errors import Problem
from megatron_prism.data import chat, tokenizer
from megatron_prism.data.tokenizer import TokenizerSpec
from megatron_prism.rl import prompts as prompt_set
from megatron_prism.rl.prompts import Prompt
from megatron_prism.rl.rollout import Encoded


def encode(
    sets: Mapping[str, tuple[Prompt, ...]], assets: Path, model: ModelConfig, room: int
) -> tuple[TokenizerSpec, list[tuple[Encoded, ...]], list[Problem]]:
    """Return a model's tokenizer, each set's prompts as tokens, and the problems: of the tokenizer, and of prompts of more than `room` tokens.

    sets: by the key that names each. assets: the folder with the tokenizer.
    """
    spec = tokenizer.load(assets)
    problems = tokenizer.check_vocabulary(assets / tokenizer.FILE, model.vocab_size)
    if not spec.end_ids:
        problems.append(Problem("init.checkpoint", "no end token in its files", "an EOS, or no response ends"))
    is_chat = any(not isinstance(prompt.prompt, str) for prompts in sets.values() for prompt in prompts)
    template = chat.load(assets) if is_chat else None
    encoded = [tuple(Encoded(prompt, tuple(prompt_set.encode(prompt, spec, template))) for prompt in prompts) for prompts in sets.values()]
    for where, prompts in zip(sets, encoded, strict=True):
        if longer := [one for one in prompts if len(one.tokens) > room]:
            longest = max(longer, key=lambda one: len(one.tokens))
            found = f"{len(longer)} prompts of more than {room} tokens, for example {longest.prompt.id} of {len(longest.tokens)}"
            required = "room for rollout.max_tokens after each, in batch.seq_length and in the model's positions"
            problems.append(Problem(where, found, required, "leave them out of the set, or lower rollout.max_tokens"))
    return spec, encoded, problems
