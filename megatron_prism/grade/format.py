"""The gate: a response counts only as `<think> ... </think> answer`, and only what follows the last `</think>` is its answer.

Each tag may stand there once. A second one, in the thinking or in the answer, is a spoofed tag: the response has no format. All is linear in
the response's length.
"""

from __future__ import annotations

from megatron_prism.core.config.grade import Think
from megatron_prism.grade.outcome import Graded, Item

OPEN, CLOSE = "<think>", "</think>"


def answer_of(item: Item, think: Think) -> str | Graded:
    """Return the answer's text, or the outcome of a response that has none.

    A response that was cut is truncated whatever it holds: its last number may be the beginning of another.
    Source: PRISM section 9.1 (correctness counts only in this format, else 0.0).
    """
    if item.is_truncated:
        return Graded(id=item.id, outcome="truncated", why="cut before its end")
    text = item.response
    num_open, num_close = text.count(OPEN), text.count(CLOSE)
    why = ""
    if think == "free":
        if num_open and not num_close:
            why = f"{OPEN} without {CLOSE}"
    elif num_close == 0:
        why = f"no {CLOSE}"
    elif num_close > 1:
        why = f"{num_close} {CLOSE}"
    elif think == "opened":
        if num_open:
            why = f"{OPEN} again, after the prompt's"
    elif num_open > 1:
        why = f"{num_open} {OPEN}"
    elif not text.lstrip().startswith(OPEN):
        why = f"does not begin with {OPEN}"
    answer = text[text.rfind(CLOSE) + len(CLOSE) :] if num_close else text
    if not why and OPEN in answer:
        why = f"{OPEN} after {CLOSE}"
    if not why and not answer.strip():
        why = "no answer" if not num_close else f"nothing after {CLOSE}"
    return Graded(id=item.id, outcome="no_format", why=why) if why else answer.strip()
