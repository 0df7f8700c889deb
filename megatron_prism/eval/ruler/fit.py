"""The largest size of a question that has room in a length."""

from __future__ import annotations

from collections.abc import Callable

from megatron_prism.core.errors import InputError, Problem


def fit(count: Callable[[int], int], room_tokens: int, smallest: int, largest: int | None, where: str) -> int:
    """Return a size whose count of tokens is at most the room, while the next size's is above it.

    Counts grow about evenly with the size, so that a few are enough: sizes are guessed by a straight line, and then further and further from it.
    count: of a size, by the model's own tokenizer.
    Raises: InputError where the smallest size has no room, or the largest does not fill it.
    """
    low, low_tokens = smallest, count(smallest)
    if low_tokens > room_tokens:
        fix = "take a longer one in ruler.lengths, or leave the sub-task out (ruler.sub_tasks)"
        raise InputError(Problem(where, f"{low_tokens} tokens at its smallest", f"at most {room_tokens}", fix))
    high: int | None = None
    per_unit, step = (
        low_tokens / max(1, low),
        0,
    )  # step: how far beyond the straight line, above it while sizes fit and below while they do not
    while high is None or high - low > 1:
        if low == largest:
            raise InputError(
                Problem(where, f"{low_tokens} tokens of all that there is", f"more than the {room_tokens} to fill", "give more text")
            )
        guess = max(low + 1, low + int((room_tokens - low_tokens) / per_unit) + step)
        top = largest if high is None else high - 1
        size = guess if top is None else min(guess, top)
        tokens = count(size)
        per_unit = max(1e-3, (tokens - low_tokens) / (size - low))
        if tokens > room_tokens:
            high, step = size, min(2 * step, -1)
        else:
            low, low_tokens, step = size, tokens, max(2 * step, 1)
    return low
