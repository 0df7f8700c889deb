"""The reward of a response: 1 where it is right, less its penalties, and whether it counts at all. Pure functions of one response."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_prism.core.config import AlgorithmConfig
from megatron_prism.generate.engine import Ending
from megatron_prism.grade.outcome import Outcome


def reward(outcome: Outcome, ended: Ending, token_ids: Sequence[int], max_tokens: int, config: AlgorithmConfig) -> float:
    """Return 1 for a right answer and 0 for any other, less the penalties for length, for not ending, and for repetition.

    max_tokens: the most tokens that the response could have had. A fault has a reward too: it is not counted (is_counted).
    """
    penalties = overlong_penalty(len(token_ids), max_tokens, config) if config.overlong == "shape" else 0.0
    penalties += config.stop_penalty * (ended != "end_token")
    if config.repetition_penalty:  # milliseconds a long response
        penalties += config.repetition_penalty * repeated_share(token_ids, config.repetition_ngram_tokens)
    return float(outcome == "right") - penalties


def is_counted(outcome: Outcome, ended: Ending, config: AlgorithmConfig) -> bool:
    """Say whether a response belongs to its group's statistics and to the loss: not after a fault of the grader, nor where it is masked."""
    return outcome != "fault" and not (config.overlong == "mask" and ended != "end_token")


def overlong_penalty(num_tokens: int, max_tokens: int, config: AlgorithmConfig) -> float:
    """Return 0 up to max_tokens - overlong_tokens, and from there a line up to overlong_penalty at max_tokens.

    Source: DAPO (arXiv 2503.14476), equation 13.
    """
    over = num_tokens - (max_tokens - config.overlong_tokens)
    return config.overlong_penalty * min(max(over / config.overlong_tokens, 0.0), 1.0)


def repeated_share(token_ids: Sequence[int], ngram_tokens: int) -> float:
    """Return the share of the n-grams that stand in the text earlier, between 0 and 1. A text shorter than an n-gram has none."""
    num_ngrams = len(token_ids) - ngram_tokens + 1
    if num_ngrams < 1:
        return 0.0
    ids = np.array(token_ids, np.int32)
    size, ngram_size = ids.itemsize, ids.itemsize * ngram_tokens
    ids_bytes = ids.tobytes()
    return 1 - len({ids_bytes[at : at + ngram_size] for at in range(0, size * num_ngrams, size)}) / num_ngrams
