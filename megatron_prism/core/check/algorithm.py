"""Check what must hold between the keys of an RL algorithm, its grid, and the room of a response."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prism.core.config import AlgorithmConfig
from megatron_prism.core.errors import Problem


def check_algorithm(config: AlgorithmConfig, cp: int, max_tokens: int, prefix: str = "algorithm.") -> Iterator[Problem]:
    """Yield the problems. cp: the context-parallel ranks. max_tokens: the most tokens of a response."""
    if config.loss == "gspo" and cp > 1:
        required = "whole sequences on each rank: parallel.cp 1, or another loss"
        yield Problem(f"{prefix}loss", f"gspo under context parallelism {cp}", required)
    if config.normalization == "constant" and config.constant_tokens is None:
        yield Problem(f"{prefix}constant_tokens", "null under normalization: constant", "a number", f"for example {max_tokens}")
    if config.constant_tokens is not None and config.normalization != "constant":
        found = f"{config.constant_tokens} under normalization: {config.normalization}"
        yield Problem(f"{prefix}constant_tokens", found, "null", f"or {prefix}normalization: constant")
    if config.keep_zero_variance and config.kl_beta == 0:
        found, fix = (
            f"true with {prefix}kl_beta 0",
            f"or {prefix}kl_beta above 0: their advantages are 0, and only the KL term has a gradient",
        )
        yield Problem(f"{prefix}keep_zero_variance", found, "false", fix)
    if config.overlong == "shape" and config.overlong_tokens > max_tokens:
        found = f"{config.overlong_tokens} of a response's {max_tokens} tokens"
        yield Problem(f"{prefix}overlong_tokens", found, "at most the tokens of a response")
