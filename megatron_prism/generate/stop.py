"""Stop texts: a rollout ends where its own text holds one of them, as evaluation harnesses ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prism.data import tokenizer
from megatron_prism.data.tokenizer import TokenizerSpec

BEFORE = 4  # tokens decoded before those that a stop text may span: a decoder may drop the first token's space


@dataclass(frozen=True)
class StopTexts:
    """Whether the text of a rollout's tokens, decoded alone and without special tokens, holds one of the texts (engine.Stop)."""

    texts: tuple[str, ...]
    spec: TokenizerSpec

    def __call__(self, token_ids: Sequence[int]) -> bool:
        """Look at the end alone first: a token that adds to a text has a byte at least, so a stop text spans no more tokens than its bytes."""
        longest = max(len(text.encode()) for text in self.texts)
        return self._is_in(token_ids[-(longest + BEFORE) :]) and self._is_in(token_ids)

    def _is_in(self, token_ids: Sequence[int]) -> bool:
        text = tokenizer.decode(token_ids, self.spec, skip_special=True)
        return any(stop in text for stop in self.texts)
