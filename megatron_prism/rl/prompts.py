"""A prompt set as a run reads it: the tokens of each prompt."""

from __future__ import annotations

from megatron_prism.core.errors import InputError, Problem
from megatron_prism.data import chat, tokenizer
from megatron_prism.data.chat import ChatTemplate
from megatron_prism.data.prompts import Prompt, read
from megatron_prism.data.tokenizer import TokenizerSpec

__all__ = ["Prompt", "encode", "read"]


def encode(prompt: Prompt, spec: TokenizerSpec, template: ChatTemplate | None = None) -> list[int]:
    """Return a prompt's tokens. template: the model's, which chat prompts need (chat.load of its folder).

    Raises: InputError for a chat prompt without a template.
    """
    if isinstance(prompt.prompt, str):
        return tokenizer.encode_prompt(prompt.prompt, spec)
    if template is None:
        raise InputError(
            Problem(f"prompt {prompt.id}", "the turns of a chat", "a model with a chat template", "or make the prompts with chat: false")
        )
    return chat.encode(template, spec, prompt.prompt, add_generation_prompt=True)
